"""Neural memories: weights that gradient descent trains while the model reads."""

from titans.memory.neural import MemoryState, NeuralMemory

__all__ = ["MemoryState", "NeuralMemory"]
