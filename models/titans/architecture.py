"""The layers that a model is made of: the body's own, and how a memory stands among them (Titans, section 4).

    MAL  a memory, then attention (section 4.3):       h += M(h), then the body's layer
    MAG  a memory beside attention (section 4.2):      h += Attn(h) * M(h)
    MAC  a memory as attention's context (section 4.1): h += y * M(h + y), y = Attn(persistent | M before | h)
    LMM  a memory in place of attention

All are on a residual, and the body's feed-forward follows. Persistent tokens (eq. 19) are in attention; those that the
paper puts in front of the memory are part of the weights that the memory starts from, which are learnt.

Shapes: B sessions · T tokens · D hidden · G kv heads · W window · E head dim · H memory heads ·
N floats of weights a head · R inputs that a memory keeps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titans.attention import Attention, Placement
from titans.config import TitansConfig
from titans.layers import RMSNorm, SwiGLU
from titans.memory.neural import MemoryState, NeuralMemory
from titans.mixing import Ring
from titans.state import Parts


@dataclass(frozen=True)
class Run:
    """What a memory knows of one run of tokens: where it stands, and what is wanted."""

    position_B: Tensor  # [B]: tokens before
    lengths_B: Tensor | None  # [B]: tokens that count; None: all of them
    write: bool  # True: each token is learnt before it is answered
    recall: bool  # False: the memories answer nothing

    def after(self, num_tokens: int) -> Tensor:
        """[B]: tokens before what comes next, where the run is so long."""
        return self.position_B + (num_tokens if self.lengths_B is None else self.lengths_B)


@dataclass(frozen=True)
class Call(Run):
    """What all layers know of it."""

    place: Placement


class Layer(nn.Module):
    """What the model walks over: hidden states in and out, parts in and out; rings are written in place."""

    def new_parts(self, batch: int, dtype: torch.dtype) -> Parts:
        """What the layer carries when it has read nothing; `dtype` is that of the hidden states."""
        raise NotImplementedError

    def forward(self, h_BTD: Tensor, call: Call, parts: Parts) -> tuple[Tensor, Parts]:
        """[B, T, D] to [B, T, D]."""
        raise NotImplementedError

    def learn(self, h_BTD: Tensor, call: Call, parts: Parts) -> tuple[Tensor, Parts]:
        """The same where nothing but the state is wanted: what the layers above are given later, and the parts."""
        return self(h_BTD, call, parts)  # type: ignore[no-any-return]

    def settle(self, parts: Parts, position_B: Tensor) -> Parts:
        """The parts as a reader that writes nothing finds them: the memory as of the last token written."""
        for memory in self.memories:
            parts = parts | {"weights": memory.settle(_state_of(parts, position_B))}
        return parts

    @property
    def memories(self) -> list[NeuralMemory]:
        """The layer's memory, if it has one."""
        return [child for child in self.children() if isinstance(child, NeuralMemory)]


class AttentionLayer(Layer):
    """One block of the body: attention, then SwiGLU, each on a residual."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        body = config.backbone
        self.ring_shape = (body.num_kv_heads, config.window, body.head_dim)
        self.attention_norm = RMSNorm(body.hidden_size, body.norm_eps)
        self.attention = Attention(
            body.hidden_size, body.num_heads, body.num_kv_heads, body.head_dim, config.num_persistent
        )
        self.mlp_norm = RMSNorm(body.hidden_size, body.norm_eps)
        self.mlp = SwiGLU(body.hidden_size, body.intermediate_size)

    def new_parts(self, batch: int, dtype: torch.dtype) -> Parts:
        """An empty window: keys and values [B, G, W, E]."""
        return self._new_ring("", batch, dtype)

    def forward(self, h_BTD: Tensor, call: Call, parts: Parts) -> tuple[Tensor, Parts]:
        """h + Attn(h), then the feed-forward."""
        ring = Ring(parts["keys"], parts["values"])
        h_BTD = h_BTD + self.attention(self.attention_norm(h_BTD), call.place, ring)
        return self._feed_forward(h_BTD), parts

    def _feed_forward(self, h_BTD: Tensor) -> Tensor:
        return h_BTD + self.mlp(self.mlp_norm(h_BTD))  # type: ignore[no-any-return]

    def _new_ring(self, prefix: str, batch: int, dtype: torch.dtype) -> Parts:
        device = self.mlp_norm.weight.device
        return {f"{prefix}{x}": torch.zeros(batch, *self.ring_shape, dtype=dtype, device=device) for x in _RING}


class MemoryLayer(Layer):
    """MAL's first half: what the memory answers is added to the residual. It writes what the layers below made."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.memory = new_memory(config)

    def new_parts(self, batch: int, dtype: torch.dtype) -> Parts:
        """A memory that has read nothing."""
        return _parts_of(self.memory.new_state(batch, dtype))

    def forward(self, h_BTD: Tensor, call: Run, parts: Parts) -> tuple[Tensor, Parts]:
        """h + M(h)."""
        y_BTD, parts = self.answer(h_BTD, call, parts)
        return h_BTD + y_BTD, parts

    def answer(self, h_BTD: Tensor, call: Run, parts: Parts) -> tuple[Tensor, Parts]:
        """M(h) by itself."""
        return _consult(self.memory, h_BTD, call, parts)

    def learn(self, h_BTD: Tensor, call: Run, parts: Parts) -> tuple[Tensor, Parts]:
        """Write alone: the layers above are given the last window later as the layers below left it."""
        state = self.memory.write(h_BTD, _state_of(parts, call.position_B), call.lengths_B)
        return h_BTD, _parts_of(state)


class MemoryAloneLayer(MemoryLayer):
    """LMM: a memory, then SwiGLU, each on a residual; no attention."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.mlp_norm = RMSNorm(config.backbone.hidden_size, config.backbone.norm_eps)
        self.mlp = SwiGLU(config.backbone.hidden_size, config.backbone.intermediate_size)

    def forward(self, h_BTD: Tensor, call: Run, parts: Parts) -> tuple[Tensor, Parts]:
        """h + M(h), then the feed-forward."""
        h_BTD, parts = super().forward(h_BTD, call, parts)
        return h_BTD + self.mlp(self.mlp_norm(h_BTD)), parts

    def learn(self, h_BTD: Tensor, call: Run, parts: Parts) -> tuple[Tensor, Parts]:
        """All of it."""
        return self(h_BTD, call, parts)  # type: ignore[no-any-return]


class GatedLayer(AttentionLayer):
    """MAG: attention and memory see the same input, and their answers are multiplied (eq. 26-28)."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.memory = new_memory(config)
        self.merge = Merge(config.backbone.hidden_size, config.backbone.norm_eps)

    def new_parts(self, batch: int, dtype: torch.dtype) -> Parts:
        """An empty window and a memory that has read nothing."""
        return super().new_parts(batch, dtype) | _parts_of(self.memory.new_state(batch, dtype))

    def forward(self, h_BTD: Tensor, call: Call, parts: Parts) -> tuple[Tensor, Parts]:
        """h + Attn(h) * M(h), then the feed-forward."""
        x_BTD = self.attention_norm(h_BTD)
        y_BTD = self.attention(x_BTD, call.place, Ring(parts["keys"], parts["values"]))
        m_BTD, parts = _consult(self.memory, x_BTD, call, parts)
        return self._feed_forward(h_BTD + self.merge(y_BTD, m_BTD)), parts


class ContextLayer(GatedLayer):
    """MAC: what the memory knew before the segment is attention's context; it learns tokens as attention leaves them.

    That is, attention's answer on its residual: the answer alone is a mixture of tokens, and small at first.
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.segment = config.window

    def new_parts(self, batch: int, dtype: torch.dtype) -> Parts:
        """As with MAG; and the memory's answers of the segment so far, with what gave them."""
        parts = super().new_parts(batch, dtype)
        width = self.memory.config.conv_width - 1
        before = {"before": parts["weights"].clone(), "asked": parts["recent"][:, :width].clone()}
        return parts | self._new_ring("context_", batch, dtype) | before

    def forward(self, h_BTD: Tensor, call: Call, parts: Parts) -> tuple[Tensor, Parts]:
        """One segment's tokens at most (eq. 21-25), then the feed-forward."""
        x_BTD = self.attention_norm(h_BTD)
        known_BTD, asked = self.memory.read(x_BTD, parts["before"], parts["asked"], call.lengths_B)  # eq. 21
        known_BTD = known_BTD if call.recall else torch.zeros_like(known_BTD)
        context = self.attention_norm(known_BTD), Ring(parts["context_keys"], parts["context_values"])
        ring = Ring(parts["keys"], parts["values"])
        y_BTD = self.attention(x_BTD, call.place, ring, context)  # eq. 22, 23
        m_BTD, parts = _consult(self.memory, h_BTD + y_BTD, call, parts)  # eq. 24
        ends_BHN = (call.after(h_BTD.shape[1]) % self.segment == 0)[:, None, None]
        before = torch.where(ends_BHN, parts["weights"], parts["before"])
        return self._feed_forward(h_BTD + self.merge(y_BTD, m_BTD)), parts | {"asked": asked, "before": before}


class Merge(nn.Module):
    """y * M (eq. 25, 28): what attention says, dimension by dimension more or less by what the memory says.

    The memory's side is normalised with a learned vector. Nothing answered leaves attention as it is.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(size, eps)

    def forward(self, y_BTD: Tensor, m_BTD: Tensor) -> Tensor:
        """[B, T, D], both of them."""
        return y_BTD * (1 + self.norm(m_BTD))  # type: ignore[no-any-return]


def new_memory(config: TitansConfig) -> NeuralMemory:
    """One of a model's memories."""
    return NeuralMemory(config.memory, config.backbone.hidden_size, config.backbone.norm_eps)


_RING = "keys", "values"


def _state_of(parts: Parts, position_B: Tensor) -> MemoryState:
    none = parts["recent"].new_empty(*parts["weights"].shape[:2], 0, 0)
    return MemoryState(position_B, parts["weights"], parts["momentum"], parts["recent"], parts.get("kept", none))


def _parts_of(state: MemoryState) -> Parts:
    """weights and momentum [B, H, N], recent [B, R, D] and, where keys are protected, kept [B, H, P, K].

    The position is the session's.
    """
    parts = {"weights": state.weights, "momentum": state.momentum, "recent": state.recent}
    return parts | {"kept": state.kept} if state.kept.shape[2] else parts


def _consult(memory: NeuralMemory, x_BTD: Tensor, call: Run, parts: Parts) -> tuple[Tensor, Parts]:
    """What a memory answers to each token [B, T, D], and the parts after it."""
    if call.write:
        y_BTD, state = memory(x_BTD, _state_of(parts, call.position_B), call.lengths_B)
        parts = parts | _parts_of(state)
    else:
        y_BTD, recent = memory.read(x_BTD, parts["weights"], parts["recent"], call.lengths_B, parts.get("kept"))
        parts = parts | {"recent": recent}
    return (y_BTD if call.recall else torch.zeros_like(y_BTD)), parts
