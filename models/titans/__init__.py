"""Titans: language models with a neural memory that learns while it reads (arXiv 2501.00663)."""

from titans import waiting  # noqa: F401 — first
from titans.backbone import Backbone, BackboneError, load_backbone
from titans.checkpoint import CheckpointError, Loaded, load
from titans.config import BackboneConfig, MemoryConfig, TitansConfig
from titans.memory import MemoryState, NeuralMemory
from titans.model import TitansModel
from titans.state import State, Stream
from titans.tokenizer import Tokenizer

__all__ = [
    "Backbone",
    "BackboneConfig",
    "BackboneError",
    "CheckpointError",
    "Loaded",
    "MemoryConfig",
    "MemoryState",
    "NeuralMemory",
    "State",
    "Stream",
    "TitansConfig",
    "TitansModel",
    "Tokenizer",
    "load",
    "load_backbone",
]
