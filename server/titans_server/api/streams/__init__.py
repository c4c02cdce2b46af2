"""Streams of events that can be picked up again: a ring for each, a task that fills it, one reader that empties it."""
