"""What a session IS: every tensor that the next token needs, and nothing else.

A state is a pure function of the tokens ingested so far. Its size is fixed by the model: the millionth token
costs what the first did. There is no input or output here; `titans_server.sessions.codec` writes it down.

Shapes: B sessions · L layers below the memory · G kv heads · W window · E head dim · D hidden ·
H memory heads · N floats of weights a head · R inputs that the memory keeps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from titans.attention import Ring
from titans.config import TitansConfig
from titans.memory.neural import MemoryState


@dataclass(frozen=True)
class State:
    """The states of B sessions side by side. The model never changes one that it was given."""

    position: Tensor  # [B] int64: tokens ingested
    weights: Tensor  # [B, H, N] float32: the memory, M
    momentum: Tensor  # [B, H, N] float32: its momentum, S (no heads where the memory has none)
    recent: Tensor  # [B, R, D]: the memory's last inputs
    keys: Tensor  # [B, L, G, W, E]: the window of the layers below the memory; token p in slot p % W
    values: Tensor  # [B, L, G, W, E]
    tail: Tensor  # [B, W, D]: hidden states of the last W tokens where the memory stands; slots as above

    @classmethod
    def start(cls, config: TitansConfig, memory: MemoryState) -> "State":
        """Sessions that have read nothing, whose memories are `memory`."""
        body, recent = config.backbone, memory.recent
        batch = recent.shape[0]
        window = (batch, config.num_lower_layers, body.num_kv_heads, config.window, body.head_dim)
        return cls(
            position=memory.position,
            weights=memory.weights,
            momentum=memory.momentum,
            recent=recent,
            keys=recent.new_zeros(window),
            values=recent.new_zeros(window),
            tail=recent.new_zeros(batch, config.window, body.hidden_size),
        )

    @classmethod
    def cat(cls, states: Sequence["State"]) -> "State":
        """One batch of all the sessions, in order; a copy."""
        return cls(**{name: torch.cat([getattr(s, name) for s in states]) for name in cls.part_names()})

    @classmethod
    def part_names(cls) -> list[str]:
        """The names of the tensors, in order."""
        return [field.name for field in fields(cls)]

    def parts(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: getattr(self, name) for name in self.part_names()}

    def split(self) -> list["State"]:
        """Each session's state by itself; copies, so that one does not keep the batch alive."""
        return [self.select([row]) for row in range(self.batch_size)]

    def select(self, rows: Sequence[int]) -> "State":
        """Some of the sessions, in any order, any number of times; a copy."""
        index = torch.tensor(rows, device=self.position.device)
        return State(**{name: x[index] for name, x in self.parts().items()})

    def clone(self) -> "State":
        """A copy that shares nothing."""
        return State(**{name: x.clone() for name, x in self.parts().items()})

    @property
    def batch_size(self) -> int:
        """B."""
        return self.position.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all the tensors."""
        return sum(x.numel() * x.element_size() for x in self.parts().values())

    @property
    def memory(self) -> MemoryState:
        """The part that the memory carries."""
        return MemoryState(self.position, self.weights, self.momentum, self.recent)

    def ring(self, layer: int) -> Ring:
        """The window of one layer below the memory: views."""
        return Ring(self.keys[:, layer], self.values[:, layer])


@dataclass(frozen=True)
class Stream:
    """B sessions being read from: a private copy of their states, and the window of the layers above the memory.

    A stream's rings are written in place as it moves on; the sessions' own states are not touched.
    """

    state: State
    keys: Tensor  # [B, U, G, W, E], U layers above the memory
    values: Tensor  # [B, U, G, W, E]
    weights: Tensor  # [B, H, N]: the memory as a reader finds it
    recall: bool  # False: the memory answers nothing (the control)

    @classmethod
    def cat(cls, streams: Sequence["Stream"]) -> "Stream":
        """One batch of streams that agree on `recall`; a copy."""
        assert len({s.recall for s in streams}) == 1
        return cls(
            State.cat([s.state for s in streams]),
            torch.cat([s.keys for s in streams]),
            torch.cat([s.values for s in streams]),
            torch.cat([s.weights for s in streams]),
            streams[0].recall,
        )

    def select(self, rows: Sequence[int]) -> "Stream":
        """Some of the streams; a copy."""
        index = torch.tensor(rows, device=self.keys.device)
        return Stream(self.state.select(rows), self.keys[index], self.values[index], self.weights[index], self.recall)

    def ring(self, layer: int) -> Ring:
        """The window of one layer above the memory: views."""
        return Ring(self.keys[:, layer], self.values[:, layer])
