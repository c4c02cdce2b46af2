"""The neural memory as a layer: hidden states in, answers out, and the memory after reading them.

Queries, keys and values are projections of the layer's input, each with a causal depth-wise convolution; queries and
keys pass SiLU, or become products of their own floats, and have unit length; step size, forgetting and momentum are
gates of every token, head and layer of the memory (Titans, section 4.4). How the memory learns and answers is its
rule's affair.

Shapes: B batch · T tokens · D hidden · H memory heads · K feature dim · V value dim · N floats of weights a head,
N' of momentum · R inputs that a state keeps: those the convolutions reach, and of a rule bound to chunks those of the
chunk begun · P protected keys, each of K' numbers · T' = T - conv_width + 1.
"""

import math
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans.config import MemoryConfig
from titans.layers import RMSNorm
from titans.memory.chunk import Writes
from titans.memory.linear import LinearRule
from titans.memory.margin import margins, told
from titans.memory.mlp import MLPRule
from titans.memory.protection import protect
from titans.memory.quantization import as_floats, quantize
from titans.memory.rule import Rule

_TOGETHER = 256  # tokens whose directions are found at once


class MemoryState(NamedTuple):
    """What the memory carries from token to token. Never changed in place."""

    position: Tensor  # [B] int64: tokens written
    weights: Tensor  # M [B, H, N], float32; of a rule bound to chunks, as they were when the chunk began
    momentum: Tensor  # S as its rule keeps it [B, H, N'], float32, likewise; H = 0 where the memory has none
    recent: Tensor  # [B, R, D]: the last inputs, normed and centred, in the dtype of h; zeros before the first token
    kept: Tensor  # [B, H, P, K']: the last keys written well (`titans.memory.protection`), in eight bits or in float32


class Kernels(Protocol):
    """A faster way to do what NeuralMemory does, for inference."""

    def read(
        self, h_BTD: Tensor, weights: Tensor, recent: Tensor, lengths_B: Tensor | None, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `NeuralMemory.read`."""

    def write(self, h_BTD: Tensor, state: MemoryState, lengths_B: Tensor | None) -> MemoryState:
        """See `NeuralMemory.write`."""


def make_rule(config: MemoryConfig) -> Rule:
    """The rule that a config names."""
    return LinearRule(config) if config.rule == "exact" else MLPRule(config)


class NeuralMemory(nn.Module):
    """h -> what the memory answers to it, and the memory after reading it.

    `size` is D, `eps` that of its RMSNorms. h is float32 or bfloat16; keys, values, gates and the memory are float32.
    """

    def __init__(self, config: MemoryConfig, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: what chunks compute is computed again in the backward pass, not kept
        self.kernels: Kernels | None = None  # where there are any (`titans.packed`)
        heads, key, value = config.num_heads, config.key_dim, config.value_dim
        self.rule = make_rule(config)
        self.norm = RMSNorm(size, eps)
        self.center = nn.Parameter(torch.zeros(size))  # what all tokens have in common is not worth remembering
        self.query = nn.Linear(size, heads * key, bias=False)
        self.key = nn.Linear(size, heads * key, bias=False)
        self.value = nn.Linear(size, heads * value, bias=False)
        self.query_conv = nn.Parameter(torch.zeros(heads * key, config.conv_width))
        self.key_conv = nn.Parameter(torch.zeros(heads * key, config.conv_width))
        self.value_conv = nn.Parameter(torch.zeros(heads * value, config.conv_width))
        if config.gate_width > 1:
            self.gate_conv = nn.Parameter(torch.zeros(size, config.gate_width))
        self.gates = nn.Linear(size, config.num_gates * heads * config.depth)  # theta, alpha, eta
        self.read_norm = RMSNorm(value, eps) if config.output_norm else nn.Identity()
        self.out_gate = nn.Linear(size, heads * value)
        self.out = nn.Linear(heads * value, size, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start where retrofitting works: a key is made of the tokens before its own, a query of the last ones.

        So the memory holds (what was known before token t -> token t), and queries ask as keys answer, from the
        first step of training. Changes all but the norms, the center and the rule's start, in place.
        """
        nn.init.orthogonal_(self.key.weight)
        self.query.weight.copy_(self.key.weight)
        nn.init.orthogonal_(self.value.weight)
        self.out.weight.copy_(0.5 * self.value.weight.T)
        further = [0.25] * (self.config.conv_width - 4)
        look_back = torch.tensor([*further, 0.5, 0.5, 1.0])[-self.config.conv_width :]
        for conv, taps in ((self.query_conv, look_back), (self.key_conv, look_back), (self.value_conv, look_back[-1:])):
            end = -1 if conv is self.key_conv and self.config.conv_width > 1 else conv.shape[1]
            taps = taps[-conv[:, :end].shape[1] :]
            conv.zero_()[:, :end][:, -len(taps) :] = taps
        if self.config.gate_width > 1:
            self.gate_conv.zero_()[:, -1] = 1.0
        nn.init.zeros_(self.gates.weight)
        biases = torch.tensor([0.0, *[-9.0] * self.config.forgetting, *[0.0] * self.config.momentum])
        self.gates.bias.copy_(biases.repeat_interleave(self.config.num_heads * self.config.depth))
        nn.init.zeros_(self.out_gate.weight)
        nn.init.constant_(self.out_gate.bias, -1.0)

    def cast_projections(self, dtype: torch.dtype) -> None:
        """Keep the large matrices in `dtype` for serving, in place; gates, convolutions and norms stay as they are."""
        for linear in (self.query, self.key, self.value, self.out_gate, self.out):
            linear.weight.data = linear.weight.data.to(dtype)

    @property
    def most_momentum(self) -> float:
        """What eta stays below. One half under the exact rule: with more, text that repeats can grow without end."""
        return 1.0 if self.rule.bound_to_chunks else 0.5

    def new_state(self, batch: int, dtype: torch.dtype = torch.float32) -> MemoryState:
        """A memory that has read nothing; `dtype` is that of the hidden states it will read.

        In half precision keys are kept in eight bits (`titans.memory.quantization`). The state's weights are a view of
        those that it starts from, so that training reaches them.
        """
        config, device = self.config, self.center.device
        heads = config.num_heads if config.momentum else 0
        kept = torch.zeros(batch, config.num_heads, config.protected_keys, config.key_dim, device=device)
        return MemoryState(
            torch.zeros(batch, dtype=torch.int64, device=device),
            self.rule.start(batch),
            torch.zeros(batch, heads, config.num_momentum, device=device),
            torch.zeros(batch, config.num_recent, self.center.shape[0], dtype=dtype, device=device),
            quantize(kept) if dtype.itemsize < 4 else kept.to(dtype),
        )

    def forward(self, h_BTD: Tensor, state: MemoryState, lengths_B: Tensor | None = None) -> tuple[Tensor, MemoryState]:
        """Write the first `lengths_B[b]` tokens of each row (all of them by default), each before it is answered.

        Returns y [B, T, D] in h's dtype, which is also that of `state.recent`: each token's answer from the memory as
        of that token (eq. 15). T is 1 or more. `lengths_B` [B] int64, 0 to T (not checked): what lies past it must be
        finite, and its answers mean nothing.
        """
        x_BTD = self._input(h_BTD)
        reads, margins_BT, state = self._absorb(x_BTD, state, lengths_B, answering=True)
        assert reads is not None
        return self._answer(reads, x_BTD, margins_BT), state

    def write(self, h_BTD: Tensor, state: MemoryState, lengths_B: Tensor | None = None) -> MemoryState:
        """Write as `forward` does, answering none. T may be 0."""
        if self.kernels is not None:
            return self.kernels.write(h_BTD, state, lengths_B)
        return self._absorb(self._input(h_BTD), state, lengths_B, answering=False)[2]

    def settle(self, state: MemoryState) -> Tensor:
        """The weights M [B, H, N] as of the last token written: what a reader asks.

        They are the state's own, not a copy, unless a row is inside a chunk.
        """
        begun_B = state.position % self.config.chunk_size
        most = int(begun_B.max()) if self.rule.bound_to_chunks else 0
        if not most:
            return state.weights
        writes = self._writes(self._from_chunk(state.recent, begun_B, most))
        with _as_written(state.weights):
            return self.rule.absorb(writes, state.weights, state.momentum, None, begun_B).weights

    def read(
        self,
        h_BTD: Tensor,
        weights: Tensor,
        recent: Tensor,
        lengths_B: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Answer every token from settled weights, writing none. Returns y [B, T, D] and `recent` moved on, a copy.

        `weights` [B, H, N] as `settle` gives them. `recent` [B, R, D] as states keep it; the last conv_width - 1 inputs
        will do. `lengths_B` as in `forward`; it counts for `recent` alone. Without `kept` [B, H, P, K'], as states keep
        it, no answer is doubted.
        """
        if self.kernels is not None:
            return self.kernels.read(h_BTD, weights, recent, lengths_B, kept)
        x_BTD = self._input(h_BTD)
        joined = torch.cat((recent, x_BTD), dim=1)
        queries = self._queries(joined[:, recent.shape[1] - self.config.conv_width + 1 :])
        margins_BT = None
        if kept is not None and self.config.margin_threshold:
            with _as_written(weights):
                margins_BT = margins(queries, self._expand(as_floats(_in_use(kept)).float()), kept.shape[2])
        y = self._answer(self._ask(weights, queries), x_BTD, margins_BT)
        return y, self._recent(joined, recent.shape[1], lengths_B)

    def norms(self, state: MemoryState) -> tuple[Tensor, Tensor]:
        """|M| and |S|, the Frobenius norms [B, H]; no heads of S where there is no momentum."""
        return state.weights.norm(dim=-1), self.rule.surprise(state.momentum).norm(dim=-1)

    @torch.no_grad()
    def surprise(self, h_BTD: Tensor, state: MemoryState) -> Tensor:
        """|M(k_t) - v_t|^2 of each token (eq. 12), [B, H, T]: how far it is from what the memory now expects.

        The tokens are those that follow `state`; none is written.
        """
        reach = self.config.conv_width - 1
        context = state.recent[:, state.recent.shape[1] - reach :]
        writes = self._writes(torch.cat((context, self._input(h_BTD)), dim=1))
        return (self._ask(self.settle(state), writes.keys) - writes.values).square().sum(-1)

    def queries(self, h_BTD: Tensor) -> Tensor:
        """What tokens ask, but for the first conv_width - 1, which are context: [B, H, T', K], unit length, float32."""
        return self._queries(self._input(h_BTD))

    def answer(self, reads_BHTV: Tensor, h_BTD: Tensor) -> Tensor:
        """What tokens h are answered where their queries read this: [B, T, D] in h's dtype."""
        return self._answer(reads_BHTV, self._input(h_BTD))

    def writes(self, h_BTD: Tensor) -> Writes:
        """What tokens ask to be written, but for the first conv_width - 1, which are context: T' of them.

        Theta is as it is where it is too small to be written, too.
        """
        return self._writes(self._input(h_BTD), threshold=0.0)

    def _absorb(
        self, x_BTD: Tensor, state: MemoryState, lengths_B: Tensor | None, *, answering: bool
    ) -> tuple[Tensor | None, Tensor | None, MemoryState]:
        """Walk over the chunks.

        Returns the reads [B, H, T, V] where they are wanted, their margins [B, T] where they have any, and the state at
        the end.
        """
        num_tokens = x_BTD.shape[1]
        joined = torch.cat((state.recent, x_BTD), dim=1)
        ends_B, aligned, most = lengths_B, joined, 0
        if self.rule.bound_to_chunks:
            begun_B = state.position % self.config.chunk_size
            most = int(begun_B.max())
            all_begin = joined[:, self.config.chunk_size - 1 :]
            aligned = self._from_chunk(joined, begun_B, most + num_tokens) if most else all_begin
            ends_B = begun_B + (num_tokens if lengths_B is None else lengths_B)
        queries = self._queries(aligned) if answering else None
        factors, kept, margins_BT = self._factors(aligned), state.kept, None
        writes = self._writes(aligned, factors=factors)
        with _as_written(state.weights):
            if self.config.protected_keys:
                asked = queries if self.config.margin_threshold else None
                writes, margins_BT, kept = self._protect(writes, factors, kept, lengths_B, asked)
            weights, momentum, reads = self.rule.walk(
                writes, state.weights, state.momentum, queries, ends_B, keeping=not self.checkpointing
            )
        if reads is not None and most:
            columns = begun_B[:, None] + torch.arange(num_tokens, device=x_BTD.device)
            reads = reads.take_along_dim(columns[:, None, :, None], dim=2)
        position = state.position + (num_tokens if lengths_B is None else lengths_B)
        recent = self._recent(joined, self.config.num_recent, lengths_B)
        return reads, margins_BT, MemoryState(position, weights, momentum, recent, kept)

    def _protect(
        self, writes: Writes, factors: Tensor, kept: Tensor, lengths_B: Tensor | None, queries: Tensor | None
    ) -> tuple[Writes, Tensor | None, Tensor]:
        """What is written along directions that leave the keys kept, margins of the queries, and what is kept after."""
        parts = [x.split(_TOGETHER, 2) for x in (writes.keys, factors, writes.theta[:, :, 0])]
        asked = [None] * len(parts[0]) if queries is None else queries.split(_TOGETHER, 2)
        directions, found, degree = [], [], 2 if self.config.products else 1
        for i, (keys, made_of, theta, asking) in enumerate(zip(*parts, asked, strict=True)):
            protection = protect(keys, made_of, theta, kept, expand=self._expand, degree=degree)
            directions.append(protection.directions)
            if asking is not None:
                found.append(margins(asking, protection.expanded, kept.shape[2], protection.in_sight()))
            kept = protection.kept(None if lengths_B is None else lengths_B - i * _TOGETHER)
        writes = writes._replace(directions=torch.cat(directions, dim=2))
        return writes, torch.cat(found, dim=1) if found else None, kept

    def _from_chunk(self, joined: Tensor, begun_B: Tensor, num_tokens: int) -> Tensor:
        """`num_tokens` inputs of each row from where its chunk began, and before them what the convolutions reach."""
        first_B = self.config.chunk_size - 1 - begun_B
        columns = first_B[:, None] + torch.arange(self.config.conv_width - 1 + num_tokens, device=joined.device)
        return joined.take_along_dim(columns.clamp(max=joined.shape[1] - 1)[..., None], dim=1)

    def _input(self, h_BTD: Tensor) -> Tensor:
        x_BTD: Tensor = self.norm(h_BTD) - self.center.to(h_BTD.dtype)
        return x_BTD

    def _writes(self, joined: Tensor, *, threshold: float | None = None, factors: Tensor | None = None) -> Writes:
        x = joined[:, self.config.conv_width - self.config.gate_width :].float()
        if self.config.gate_width > 1:
            x = _convolve(x, self.gate_conv)
        with _as_written(x):
            gates = F.linear(x, self.gates.weight.float(), self.gates.bias.float())
        shape = (self.config.num_gates, self.config.num_heads, self.config.depth)
        theta, *more = gates.unflatten(-1, shape).permute(2, 0, 3, 4, 1)
        theta = theta.sigmoid()
        threshold = self.config.write_threshold if threshold is None else threshold
        if threshold:
            theta = theta * _passed(threshold, theta)
        log_keep = F.logsigmoid(-more.pop(0)) if self.config.forgetting else torch.zeros_like(theta)
        eta = more.pop() if self.config.momentum else None
        if self.rule.bound_to_chunks:  # all steps of a chunk start from one place: together they are one step
            theta = theta / self.config.chunk_size
        if eta is not None:  # and so are all that momentum makes of one
            theta = theta * (1 - self.most_momentum + self.most_momentum * (-eta).sigmoid())
        return Writes(
            keys=F.normalize(self._expand(self._factors(joined) if factors is None else factors), dim=-1),
            values=self._project(joined, self.value, self.value_conv),
            theta=theta,
            log_keep=log_keep,
            log_eta=None if eta is None else F.logsigmoid(eta) + math.log(self.most_momentum),
        )

    def _queries(self, joined: Tensor) -> Tensor:
        return F.normalize(self._expand(self._factors(joined, asked=True)), dim=-1)

    def _factors(self, joined: Tensor, *, asked: bool = False) -> Tensor:
        """What keys, or queries where they are `asked`, are made of: [B, H, T, key dim]."""
        projected = self._project(joined, *((self.query, self.query_conv) if asked else (self.key, self.key_conv)))
        return projected if self.config.products else F.silu(projected)

    def _expand(self, factors: Tensor) -> Tensor:
        """Keys or queries as the memory sees them, but for their length: [B, H, T, key dim] to [B, H, T, K].

        Products of a projection's floats with their neighbours (DPFP, Schlag et al. 2021, section 5.3, without its
        rectifier) make two keys about as similar as the square of what their projections are: what is similar by half
        disturbs an answer by a quarter, and a head has room for more (Atlas, Behrouz et al. 2025, on polynomial keys).
        """
        neighbours = range(1, self.config.products + 1)
        return torch.cat([factors * factors.roll(i, -1) for i in neighbours], dim=-1) if neighbours else factors

    def _project(self, joined: Tensor, linear: nn.Linear, taps: Tensor) -> Tensor:
        """A causal depth-wise convolution of a projection: [B, H, T, K], float32."""
        projected = F.linear(joined, linear.weight.to(joined.dtype)).float()
        heads: Tensor = _convolve(projected, taps).unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)
        return heads

    def _ask(self, weights: Tensor, queries: Tensor) -> Tensor:
        with _as_written(weights):
            return self.rule.read(weights, queries)

    def _answer(self, reads_BHTV: Tensor, x_BTD: Tensor, margins_BT: Tensor | None = None) -> Tensor:
        gate = F.linear(x_BTD, self.out_gate.weight.to(x_BTD.dtype)) + self.out_gate.bias
        reads = gate.float().sigmoid() * self.read_norm(reads_BHTV).transpose(1, 2).flatten(2)
        y = F.linear(reads.to(x_BTD.dtype), self.out.weight.to(x_BTD.dtype))
        threshold = self.config.read_threshold
        if not threshold:
            return y
        y = (y.float() * _passed(threshold, _size(y))).to(y.dtype)
        if margins_BT is None:
            return y
        share = told(margins_BT[..., None], self.config.margin_threshold)
        few = threshold / _size(y).clamp(min=threshold)
        return (y.float() * (share + (1 - share) * few)).to(y.dtype)

    @staticmethod
    def _recent(joined: Tensor, reach: int, lengths_B: Tensor | None) -> Tensor:
        """The last `reach` valid inputs of each row."""
        if lengths_B is None:
            return joined[:, joined.shape[1] - reach :].clone()
        index = lengths_B[:, None] + torch.arange(reach, device=joined.device)
        return joined.take_along_dim(index[..., None], dim=1)


def _convolve(x: Tensor, taps: Tensor) -> Tensor:
    """Causal and depth-wise, without the first W - 1 of x [B, T, D]; taps [D, W], the last for a token itself."""
    num_tokens = x.shape[1] - taps.shape[1] + 1
    first, *others = ((x[:, i : i + num_tokens], taps[:, i].float()) for i in range(taps.shape[1]))
    return reduce(lambda total, part: torch.addcmul(total, *part), others, first[0] * first[1])


def _size(y_BTD: Tensor) -> Tensor:
    """The root mean square of each token's answer [B, T, 1]."""
    size: Tensor = y_BTD.float().norm(dim=-1, keepdim=True) / math.sqrt(y_BTD.shape[-1])
    return size


def _passed(threshold: float, x: Tensor) -> Tensor:
    """The share of x that counts: none below the threshold, and from twice that on all.

    Without a jump: two ways to compute x differ in its last bits, and must not differ by all of it.
    """
    return (x / threshold - 1).clamp(0, 1)


def _in_use(kept: Tensor) -> Tensor:
    """Without what comes before any session's first row, which mostly is much; one row at least."""
    if not kept.is_cpu:
        return kept  # to count them another device would have to be waited for
    used = kept.any(dim=-1).flatten(0, 1).any(dim=0)  # [P]
    used[-1] = True
    return kept[:, :, int(used.int().argmax()) :]


def _as_written(x: Tensor) -> torch.autocast:
    """What adds up over a session is float32, also where training runs the large products in half precision."""
    return torch.autocast(x.device.type, enabled=False)
