"""The linear neural memory, exact per-token rule.

Inner loss l(M; x_t) = 1/2 |k_t M_{t-1} - v_t|^2 (Titans, eq. 12, for a matrix M with rows as keys), its
gradient k_t^T (k_t M_{t-1} - v_t) taken at the weights as of the token before. The errors of a chunk depend on
one another only through M_{t-1}, so ONE unit-lower-triangular solve gives them all, and the chunk size changes
the speed and never the result. Without momentum this is the gated delta rule (Yang et al. 2024).

Shapes: B batch · T tokens · D hidden · H memory heads · K key dim · V value dim · C chunk · P = C + 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans.config import MemoryConfig
from titans.layers import RMSNorm
from titans.memory.chunk import coefficients


class MemoryState(NamedTuple):
    """What the memory carries from token to token. Never changed in place."""

    weights: Tensor  # M [B, H, K, V], float32
    momentum: Tensor  # S [B, H, K, V], float32; H = 0 where the memory has none
    recent: Tensor  # [B, conv_width - 1, D]: the inputs that the convolutions still reach

    @classmethod
    def zeros(
        cls, config: MemoryConfig, size: int, batch: int, dtype: torch.dtype, device: torch.device
    ) -> "MemoryState":
        """An empty memory that has read nothing."""
        heads = config.num_heads if config.momentum else 0
        return cls(
            torch.zeros(batch, config.num_heads, config.key_dim, config.value_dim, device=device),
            torch.zeros(batch, heads, config.key_dim, config.value_dim, device=device),
            torch.zeros(batch, config.conv_width - 1, size, dtype=dtype, device=device),
        )


class Writes(NamedTuple):
    """What a run of tokens asks of the memory; float32."""

    keys: Tensor  # [B, H, T, K], unit length
    values: Tensor  # [B, H, T, V]
    theta: Tensor  # [B, H, T]: step size
    log_keep: Tensor  # [B, H, T]: log(1 - alpha)
    log_eta: Tensor | None  # [B, H, T]


class LinearMemory(nn.Module):
    """h -> what the memory answers to it, and the memory after reading it."""

    def __init__(self, config: MemoryConfig, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.config = config
        heads, key, value = config.num_heads, config.key_dim, config.value_dim
        self.norm = RMSNorm(size, eps)
        self.center = nn.Parameter(torch.zeros(size))  # what all tokens have in common is not worth remembering
        self.query = nn.Linear(size, heads * key, bias=False)
        self.key = nn.Linear(size, heads * key, bias=False)
        self.value = nn.Linear(size, heads * value, bias=False)
        self.query_conv = nn.Parameter(torch.zeros(heads * key, config.conv_width))
        self.key_conv = nn.Parameter(torch.zeros(heads * key, config.conv_width))
        self.value_conv = nn.Parameter(torch.zeros(heads * value, config.conv_width))
        self.gates = nn.Linear(size, (3 if config.momentum else 2) * heads)  # theta, alpha, eta
        self.out_gate = nn.Linear(size, heads * value)
        self.out = nn.Linear(heads * value, size, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start where retrofitting works: a key is made of the three tokens before its own, a query of the last three.

        So the memory holds (what was known before token t -> token t), and queries ask as keys answer, from the
        first step of training.
        """
        nn.init.orthogonal_(self.key.weight)
        self.query.weight.copy_(self.key.weight)
        nn.init.orthogonal_(self.value.weight)
        self.out.weight.copy_(0.5 * self.value.weight.T)
        look_back = torch.tensor([0.5, 0.5, 1.0])
        for conv, taps in ((self.query_conv, look_back), (self.key_conv, look_back), (self.value_conv, look_back[2:])):
            end = -1 if conv is self.key_conv else conv.shape[1]
            conv.zero_()[:, :end][:, -len(taps) :] = taps
        nn.init.zeros_(self.gates.weight)
        biases = torch.tensor([0.0, -9.0, 0.0][: self.gates.out_features // self.config.num_heads])
        self.gates.bias.copy_(biases.repeat_interleave(self.config.num_heads))
        nn.init.zeros_(self.out_gate.weight)
        nn.init.constant_(self.out_gate.bias, -1.0)

    def cast_projections(self, dtype: torch.dtype) -> None:
        """Keep the large matrices in `dtype` for serving; gates, convolutions and norms stay as they are."""
        for linear in (self.query, self.key, self.value, self.out_gate, self.out):
            linear.weight.data = linear.weight.data.to(dtype)

    def forward(self, h_BTD: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """Write every token and answer it with the memory as of that token (eq. 15). Returns y [B, T, D]."""
        x_BTD = self._input(h_BTD)
        joined = torch.cat((state.recent, x_BTD), dim=1)
        weights, momentum, reads = self._absorb(self._writes(joined), state, self._queries(joined), None)
        assert reads is not None
        return self._answer(reads, x_BTD), MemoryState(weights, momentum, self._recent(joined))

    def write(self, h_BTD: Tensor, state: MemoryState, lengths_B: Tensor | None = None) -> MemoryState:
        """Write the first `lengths_B[b]` tokens of each row (all of them by default), answering none."""
        joined = torch.cat((state.recent, self._input(h_BTD)), dim=1)
        weights, momentum, _ = self._absorb(self._writes(joined), state, None, lengths_B)
        return MemoryState(weights, momentum, self._recent(joined, lengths_B))

    def read(self, h_BTD: Tensor, state: MemoryState, lengths_B: Tensor | None = None) -> tuple[Tensor, MemoryState]:
        """Answer every token, writing none. Returns y [B, T, D]; only `recent` moves in the state."""
        x_BTD = self._input(h_BTD)
        joined = torch.cat((state.recent, x_BTD), dim=1)
        y = self._answer(self._queries(joined) @ state.weights, x_BTD)
        return y, state._replace(recent=self._recent(joined, lengths_B))

    def queries(self, h_BTD: Tensor) -> Tensor:
        """What tokens ask, but for the first conv_width - 1, which are context: [B, H, T', K]."""
        return self._queries(self._input(h_BTD))

    def writes(self, h_BTD: Tensor) -> Writes:
        """What tokens ask to be written, but for the first conv_width - 1, which are context."""
        return self._writes(self._input(h_BTD))

    def _absorb(
        self, writes: Writes, state: MemoryState, queries: Tensor | None, lengths_B: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Walk over the chunks: weights and momentum at the end, and the reads where there are queries."""
        weights, momentum, reads = state.weights, state.momentum, []
        num_tokens, size = writes.keys.shape[2], self.config.chunk_size
        for start in range(0, num_tokens, size):
            part = Writes(*(None if x is None else x[:, :, start : start + size] for x in writes))  # type: ignore[arg-type]
            asked = None if queries is None else queries[:, :, start : start + size]
            ends = None if lengths_B is None else (lengths_B - start).clamp(0, part.keys.shape[2])
            weights, momentum, read = absorb_chunk(part, weights, momentum, asked, ends)
            reads.append(read)
        joined = torch.cat(reads, dim=2) if queries is not None else None  # type: ignore[arg-type]
        return weights, momentum, joined

    def _input(self, h_BTD: Tensor) -> Tensor:
        x_BTD: Tensor = self.norm(h_BTD) - self.center.to(h_BTD.dtype)
        return x_BTD

    def _writes(self, joined: Tensor) -> Writes:
        x = joined[:, self.config.conv_width - 1 :].float()
        gates = F.linear(x, self.gates.weight.float(), self.gates.bias.float())
        theta, alpha, *eta = gates.unflatten(-1, (-1, self.config.num_heads)).permute(2, 0, 3, 1)
        return Writes(
            keys=F.normalize(F.silu(self._project(joined, self.key, self.key_conv)), dim=-1),
            values=self._project(joined, self.value, self.value_conv),
            theta=theta.sigmoid(),
            log_keep=F.logsigmoid(-alpha),
            log_eta=F.logsigmoid(eta[0]) if eta else None,
        )

    def _queries(self, joined: Tensor) -> Tensor:
        return F.normalize(F.silu(self._project(joined, self.query, self.query_conv)), dim=-1)

    def _project(self, joined: Tensor, linear: nn.Linear, taps: Tensor) -> Tensor:
        """A causal depth-wise convolution of a projection: [B, H, T, K], float32."""
        projected = F.linear(joined, linear.weight.to(joined.dtype)).float()
        num_tokens = joined.shape[1] - self.config.conv_width + 1
        mixed = sum(projected[:, i : i + num_tokens] * taps[:, i].float() for i in range(self.config.conv_width))
        assert isinstance(mixed, Tensor)
        heads: Tensor = mixed.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)
        return heads

    def _answer(self, reads_BHTV: Tensor, x_BTD: Tensor) -> Tensor:
        gate = F.linear(x_BTD, self.out_gate.weight.to(x_BTD.dtype)) + self.out_gate.bias
        reads = gate.float().sigmoid() * reads_BHTV.transpose(1, 2).flatten(2)
        return F.linear(reads.to(x_BTD.dtype), self.out.weight.to(x_BTD.dtype))

    def _recent(self, joined: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """The last conv_width - 1 valid inputs of each row."""
        reach = self.config.conv_width - 1
        if lengths_B is None:
            return joined[:, joined.shape[1] - reach :].clone()
        index = lengths_B[:, None] + torch.arange(reach, device=joined.device)
        return joined.gather(1, index[..., None].expand(-1, -1, joined.shape[-1]))


def absorb_chunk(
    writes: Writes,
    weights_BHKV: Tensor,
    momentum_BHKV: Tensor,
    queries_BHCK: Tensor | None = None,
    ends_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One chunk of the exact rule: (M, S) after the first `ends_B[b]` tokens of row b, and the causal reads.

    reads_t = q_t M_t, [B, H, C, V], where queries are given. `titans.memory.reference` is the same, token by token.
    """
    keys, theta = writes.keys, writes.theta[..., None, :]
    c = coefficients(writes.log_keep, writes.log_eta)
    has_momentum = writes.log_eta is not None
    num_tokens = keys.shape[2]
    # (I + strict_tril(W_1 * K K^T) diag(theta)) e = A_1 * (K M_0) + f_1 * (K S_0) - V, subscript 1: one token ago
    system = c.weight_BHPC[..., :num_tokens, :] * (keys @ keys.transpose(-1, -2)) * theta
    expected = c.keep_BHP[..., :num_tokens, None] * (keys @ weights_BHKV) - writes.values
    if has_momentum:
        expected = expected + c.carry_BHP[..., :num_tokens, None] * (keys @ momentum_BHKV)
    # (the solver reads the strict lower triangle alone: the diagonal counts as 1)
    errors = torch.linalg.solve_triangular(system, expected, upper=False, unitriangular=True)

    reads = None
    if queries_BHCK is not None:
        similar = c.weight_BHPC[..., 1:, :] * (queries_BHCK @ keys.transpose(-1, -2)) * theta
        reads = c.keep_BHP[..., 1:, None] * (queries_BHCK @ weights_BHKV) - similar @ errors
        if has_momentum:
            reads = reads + c.carry_BHP[..., 1:, None] * (queries_BHCK @ momentum_BHKV)

    keep, carry, decay, weight, share = (_row(x, ends_B) for x in c)
    steps = (keys * (weight * theta[..., 0, :])[..., None]).transpose(-1, -2)
    end_weights = keep[..., None, None] * weights_BHKV - steps @ errors
    end_momentum = momentum_BHKV
    if has_momentum:
        end_weights = end_weights + carry[..., None, None] * momentum_BHKV
        shares = (keys * (share * theta[..., 0, :])[..., None]).transpose(-1, -2)
        end_momentum = decay[..., None, None] * momentum_BHKV - shares @ errors
    return end_weights, end_momentum, reads


def _row(rows: Tensor, ends_B: Tensor | None) -> Tensor:
    """Row `ends_B[b]` of dimension 2 for each batch row; the last one by default."""
    if ends_B is None:
        return rows[:, :, -1]
    return rows[torch.arange(rows.shape[0], device=rows.device), :, ends_B]
