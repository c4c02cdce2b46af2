"""Titans: language models with a neural memory that learns while it reads (arXiv 2501.00663)."""

from titans.backbone import Backbone, BackboneError, load_backbone
from titans.checkpoint import CheckpointError, Loaded, load
from titans.config import BackboneConfig, MemoryConfig, TitansConfig
from titans.memory import LinearMemory, MemoryState
from titans.model import TitansModel
from titans.state import State, Stream
from titans.tokenizer import Tokenizer

__all__ = [
    "Backbone",
    "BackboneConfig",
    "BackboneError",
    "CheckpointError",
    "LinearMemory",
    "Loaded",
    "MemoryConfig",
    "MemoryState",
    "State",
    "Stream",
    "TitansConfig",
    "TitansModel",
    "Tokenizer",
    "load",
    "load_backbone",
]
