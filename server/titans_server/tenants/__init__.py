"""Who asks, and how much they may have: API keys, who a request is from, quotas. Knows no HTTP and no model."""
