"""What a small model is made of and how it is trained; and what the ablations leave out."""

from dataclasses import dataclass, replace
from typing import Any

from titans.config import Architecture, BackboneConfig, MemoryConfig, TitansConfig
from titans.training.scratch.tasks import TASKS

_MEMORY = MemoryConfig(
    num_heads=2,
    key_dim=32,
    value_dim=32,
    chunk_size=16,
    momentum=True,
    learned_start=True,
    output_norm=True,
)
_DEEP: dict[str, Any] = {"rule": "chunk", "depth": 2, "expansion": 2}


@dataclass(frozen=True)
class ScratchConfig:
    """Everything that decides the outcome."""

    architecture: Architecture = "mac"
    task: str = "recall"
    seed: int = 0
    memory: MemoryConfig = _MEMORY
    hidden_size: int = 64
    num_layers: int = 2
    num_persistent: int = 4
    window: int = 32
    num_tokens: int = 128  # of a document in training
    batch_size: int = 32
    num_steps: int = 500
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_norm: float = 1.0

    def model(self) -> TitansConfig:
        """The model's shape."""
        body = BackboneConfig(
            vocab_size=TASKS[self.task].vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=4,
            num_kv_heads=4,
            head_dim=self.hidden_size // 4,
            intermediate_size=2 * self.hidden_size,
            rope_theta=10_000.0,
            norm_eps=1e-5,
            tie_embeddings=True,
            bos_token=0,
            eos_token=0,
        )
        every = tuple(range(self.num_layers))
        return TitansConfig(body, self.memory, every, self.architecture, self.window, self.num_persistent)


def ablations(config: ScratchConfig) -> dict[str, ScratchConfig]:
    """The paper's ablations (Titans, table 5), each one change from the whole; deep memories, two of them."""
    memory, deep = config.memory, replace(config.memory, **_DEEP)
    return {
        "all": config,
        "deep memory": replace(config, memory=deep),
        "deep, no forgetting": replace(config, memory=replace(deep, forgetting=False)),
        "no momentum": replace(config, memory=replace(memory, momentum=False)),
        "no forgetting": replace(config, memory=replace(memory, forgetting=False)),
        "no convolution": replace(config, memory=replace(memory, conv_width=1)),
        "no persistent tokens": replace(config, num_persistent=0),
    }


# What the paper's table 5 has for these changes: accuracy on long contexts, in per cent. Its whole is a deep memory by
# itself (LMM), and it counts other tasks: the order of the changes is what compares.
PAPER = {
    "all": 85.34,  # its linear memory
    "deep memory": 92.68,
    "no momentum": 87.12,
    "no forgetting": 85.60,
    "no convolution": 90.28,
    "no persistent tokens": 92.49,
}
