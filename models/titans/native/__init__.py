"""Kernels of our own, where torch has none: one token's arithmetic without the cost of calling operations."""
