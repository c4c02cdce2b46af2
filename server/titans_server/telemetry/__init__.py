"""What an operator sees of a server at work: metrics, logs, traces. Numbers and names, never a user's text."""
