"""Kernels of our own, where torch has none: arithmetic without the cost of calling an operation for each step."""
