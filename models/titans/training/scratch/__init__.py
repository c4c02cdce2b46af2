"""Small models of any architecture, trained from nothing."""
