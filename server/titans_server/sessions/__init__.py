"""Where sessions are kept: what is written down, and the stores that keep it."""
