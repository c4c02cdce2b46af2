"""A Titans model: a frozen body with a neural memory as one of its layers (MAL, Titans section 4.3, on a residual).

    tokens -> layers below -> h --------------------> + -> layers above -> logits
                              \\-> memory: write, read -^

The memory is written with what the layers below make of a token, so `ingest` runs nothing else: half of the
body and no head. Reading (`open`, then `forward`) runs all of it and leaves the session's state alone.

Shapes: B sessions · T tokens · D hidden · N vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans.attention import Attention, Block, Ring, Rings
from titans.config import BackboneConfig, TitansConfig
from titans.layers import RMSNorm, SwiGLU
from titans.memory.neural import MemoryState, NeuralMemory
from titans.state import State, Stream


class Layer(nn.Module):
    """One block of the body: attention, then SwiGLU, each on a residual."""

    def __init__(self, config: BackboneConfig, *, sink: bool) -> None:
        super().__init__()
        size = config.hidden_size
        self.attention_norm = RMSNorm(size, config.norm_eps)
        self.attention = Attention(size, config.num_heads, config.num_kv_heads, config.head_dim, sink=sink)
        self.mlp_norm = RMSNorm(size, config.norm_eps)
        self.mlp = SwiGLU(size, config.intermediate_size)

    def forward(self, h_BTD: Tensor, block: Block, ring: Ring) -> Tensor:
        """[B, T, D] to [B, T, D]; the ring moves on."""
        h_BTD = h_BTD + self.attention(self.attention_norm(h_BTD), block, ring)
        return h_BTD + self.mlp(self.mlp_norm(h_BTD))  # type: ignore[no-any-return]


class TitansModel(nn.Module):
    """The body, its memory, and the ways to run them."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        body = config.backbone
        self.config = config
        self.embedding = nn.Embedding(body.vocab_size, body.hidden_size)
        layers = (Layer(body, sink=config.sink) for _ in range(body.num_layers))
        self.layers = cast(Sequence[Layer], nn.ModuleList(layers))
        self.memory = NeuralMemory(config.memory, body.hidden_size, body.norm_eps)
        self.norm = RMSNorm(body.hidden_size, body.norm_eps)
        self.head = nn.Linear(body.hidden_size, body.vocab_size, bias=False)
        if body.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.place = partial(Block.place, window=config.window, head_dim=body.head_dim, theta=body.rope_theta)

    @property
    def dtype(self) -> torch.dtype:
        """What the body computes in, and what a state keeps its windows in."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.embedding.weight.device

    def new_state(self, batch: int = 1) -> State:
        """Sessions that have read nothing."""
        return State.start(self.config, self.memory.new_state(batch, self.dtype))

    @torch.no_grad()
    def ingest(self, tokens_BT: Tensor, state: State, lengths: Sequence[int] | None = None) -> State:
        """The states after reading the first `lengths[b]` tokens of each row (all by default).

        Runs the layers below the memory and writes the memory; any number of tokens, a window at a time.
        """
        state = state.clone()
        lengths_B = self._lengths(tokens_BT, lengths)
        for start in range(0, tokens_BT.shape[1], self.config.window):
            part = tokens_BT[:, start : start + self.config.window]
            state = self._ingest_window(part, state, (lengths_B - start).clamp(0, part.shape[1]))
        return state

    def _ingest_window(self, tokens_BT: Tensor, state: State, lengths_B: Tensor) -> State:
        block = self.place(state.position, lengths_B, tokens_BT.shape[1])
        h_BTD = self.lower(self.embedding(tokens_BT), block, state)
        state.tail[block.rows, block.slots] = h_BTD[block.rows, block.columns]
        return _moved(state, self.memory.write(h_BTD, state.memory, lengths_B))

    @torch.no_grad()
    def open(self, state: State, *, recall: bool = True) -> Stream:
        """Begin to read from sessions: the layers above the memory look at the last window.

        The tail passes as the body left it; what comes after it asks the memory, unless `recall` is False.
        """
        body, window = self.config.backbone, self.config.window
        shape = (state.batch_size, self.config.num_upper_layers, body.num_kv_heads, window, body.head_dim)
        keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        stream = Stream(state.clone(), keys, torch.zeros_like(keys), self.memory.settle(state.memory), recall)
        length = int(state.position.max().clamp(max=window))
        if length:  # oldest first; columns before a session's first token are masked by their position
            start_B = state.position - length
            slots = (start_B[:, None] + torch.arange(length, device=self.device)) % window
            tail = state.tail.gather(1, slots[..., None].expand(-1, -1, body.hidden_size))
            block = self.place(start_B, torch.full_like(start_B, length), length)
            self.upper(tail, block, stream)
        return stream

    def forward(
        self,
        tokens_BT: Tensor,
        stream: Stream,
        lengths: Sequence[int] | None = None,
        *,
        write: bool = False,
    ) -> tuple[Tensor, Stream]:
        """Hidden states [B, T, D] of tokens that follow a stream, and the stream after them (`logits` scores them).

        Each token reads the memory; with `write` it is also learnt, before the next one reads, and the stream's
        state is then what `ingest` makes of the tokens, but for its tail; a stream writes all its tokens or none.
        At most a window of tokens at a time where T > 1. The stream given must not be used again: its rings have
        moved on.
        """
        lengths_B = self._lengths(tokens_BT, lengths)
        state = stream.state
        block = self.place(state.position, lengths_B, tokens_BT.shape[1])
        h_BTD = self.lower(self.embedding(tokens_BT), block, state)
        if write:
            assert lengths is None, "rows of one length only, where tokens are learnt as they are read"
            y_BTD, memory = self.memory(h_BTD, state.memory)
        else:
            y_BTD, recent = self.memory.read(h_BTD, stream.weights, state.recent, lengths_B)
            memory = state.memory._replace(position=state.position + lengths_B, recent=recent)
        if stream.recall:
            h_BTD = h_BTD + y_BTD
        h_BTD = self.upper(h_BTD, block, stream)
        return h_BTD, Stream(_moved(state, memory), stream.keys, stream.values, stream.weights, stream.recall)

    def logits(self, h: Tensor) -> Tensor:
        """[..., D] hidden states to [..., N] scores, float32."""
        return self.head(self.norm(h)).float()  # type: ignore[no-any-return]

    def lower(self, h_BTD: Tensor, block: Block, rings: Rings) -> Tensor:
        """The layers below the memory; the rings move on."""
        for i, layer in enumerate(self.layers[: self.config.memory.layer]):
            h_BTD = layer(h_BTD, block, rings.ring(i))
        return h_BTD

    def upper(self, h_BTD: Tensor, block: Block, rings: Rings) -> Tensor:
        """The layers above the memory; the rings move on."""
        for i, layer in enumerate(self.layers[self.config.memory.layer :]):
            h_BTD = layer(h_BTD, block, rings.ring(i))
        return h_BTD

    @torch.no_grad()
    def set_sinks(self) -> None:
        """Run the bos token once: its keys and values are what every later token can always look at."""
        token = torch.tensor([[self.config.backbone.bos_token]], device=self.device)
        h_BTD = self.embedding(token)
        for layer in self.layers:
            _, key, value = layer.attention.split(layer.attention_norm(h_BTD))
            layer.attention.sink_key.copy_(key[0, 0])
            layer.attention.sink_value.copy_(value[0, 0])
            alone = value.repeat_interleave(self.config.backbone.num_heads // value.shape[2], dim=2)
            h_BTD = h_BTD + layer.attention.out(alone.flatten(2))
            h_BTD = h_BTD + layer.mlp(layer.mlp_norm(h_BTD))

    def _lengths(self, tokens_BT: Tensor, lengths: Sequence[int] | None) -> Tensor:
        batch, num_tokens = tokens_BT.shape
        return torch.tensor(lengths or [num_tokens] * batch, device=self.device)


def _moved(state: State, memory: MemoryState) -> State:
    """The state with its memory moved on; the rings and the tail have moved in place."""
    return State(**{**state.parts(), **memory._asdict()})


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats; targets of -100 do not count."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-100)
