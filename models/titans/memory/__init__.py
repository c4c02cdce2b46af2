"""Neural memories: weights that gradient descent trains while the model reads."""

from titans.memory.linear import LinearMemory, MemoryState

__all__ = ["LinearMemory", "MemoryState"]
