"""HTTP: routes, what they take and give, and nothing that computes."""
