"""The closed form of a chunk: what b steps of momentum and forgetting do, without taking the steps.

Unrolling S_t = eta_t S_{t-1} - theta_t u_t (Titans, eq. 10) and M_t = (1 - alpha_t) M_{t-1} + S_t (eq. 13)
from M_0, S_0 gives, with u_j the gradient at token j,

    M_t = keep_t M_0 + carry_t S_0 - sum_{j<=t} weight_tj theta_j u_j
    S_t = decay_t S_0               - sum_{j<=t} share_tj  theta_j u_j

Row t of each coefficient stands for "after t tokens", t = 0..b: row 0 is the chunk's start (1, 0, 1, 0, 0).
Everything is taken in log space and float32 (or float64), differences masked before exp.

Shapes: B batch · H memory heads · L layers of the memory · T tokens · K key dim · V value dim · C tokens of the chunk ·
P = C + 1 rows of a coefficient; any dimensions go before.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_TOGETHER = 8  # chunks: fewer, larger operations; and what is computed again at once where activations are not kept


class Writes(NamedTuple):
    """What a run of tokens asks of the memory; float32 (float64 in the oracle)."""

    keys: Tensor  # [B, H, T, K], unit length
    values: Tensor  # [B, H, T, V]
    theta: Tensor  # [B, H, L, T]: step as taken: the gate / chunk_size in the chunk rule, * (1 - eta) with momentum
    log_keep: Tensor  # [B, H, L, T]: log(1 - alpha), finite
    log_eta: Tensor | None  # [B, H, L, T], finite; None: no momentum
    directions: Tensor | None = None  # [B, H, T, K]: along which M moves (`titans.memory.protection`); None: the keys

    def split(self, sizes: list[int]) -> "list[Writes]":
        """One run of tokens after the other, of these sizes, T together: views."""
        keys, values = self.keys.split(sizes, dim=2), self.values.split(sizes, dim=2)
        theta, log_keep = self.theta.split(sizes, dim=-1), self.log_keep.split(sizes, dim=-1)
        none = [None] * len(sizes)
        log_eta = none if self.log_eta is None else self.log_eta.split(sizes, dim=-1)
        directions = none if self.directions is None else self.directions.split(sizes, dim=2)
        return [Writes(*parts) for parts in zip(keys, values, theta, log_keep, log_eta, directions, strict=True)]


class Coefficients(NamedTuple):
    """How the start and every token of a chunk weigh in the memory after t tokens. Theta is not in them."""

    keep_P: Tensor  # [..., P]: beta_t = prod (1 - alpha)
    carry_P: Tensor  # [..., P]: f_t, what the starting momentum has added by now
    decay_P: Tensor  # [..., P]: m_t = prod eta
    weight_PC: Tensor  # [..., P, C]: W = D E
    share_PC: Tensor  # [..., P, C]: E


class Chunk(NamedTuple):
    """Tokens that are learnt together, and what asks while they are."""

    keys: Tensor  # [B, H, C, K]
    directions: Tensor  # [B, H, C, K]
    values: Tensor  # [B, H, C, V]
    theta: Tensor  # [B, H, L, C], as in `Writes`
    weighing: Coefficients  # [B, H, L, P] and [B, H, L, P, C]
    queries: Tensor | None  # [B, H, C, K]; None: nobody asks


def stretches(writes: Writes, size: int, queries: Tensor | None) -> Iterator[tuple[Writes, Tensor | None]]:
    """Runs of a few whole chunks of `size` tokens and, at the end, of less than one. `queries` are [B, H, T, K]."""
    num_tokens = writes.keys.shape[2]
    whole = num_tokens - num_tokens % size
    bounds = [*range(0, whole, _TOGETHER * size), whole, *[num_tokens] * (whole < num_tokens)]
    sizes = [stop - start for start, stop in itertools.pairwise(bounds)]
    return zip(
        writes.split(sizes), [None] * len(sizes) if queries is None else queries.split(sizes, dim=2), strict=True
    )


def chunks(writes: Writes, size: int, queries: Tensor | None) -> Iterator[Chunk]:
    """One chunk of `size` tokens after the other, T a multiple of it. `queries` are [B, H, T, K]."""

    def cut(x: Tensor, dim: int) -> tuple[Tensor, ...]:
        pieces: tuple[Tensor, ...] = x.unflatten(dim, (-1, size)).unbind(dim)
        return pieces

    log_eta = None if writes.log_eta is None else writes.log_eta.unflatten(3, (-1, size))
    weighing = coefficients(writes.log_keep.unflatten(3, (-1, size)), log_eta)
    keys, values, theta = cut(writes.keys, 2), cut(writes.values, 2), cut(writes.theta, 3)
    directions = keys if writes.directions is None else cut(writes.directions, 2)
    asked = [None] * len(keys) if queries is None else cut(queries, 2)
    each = (Coefficients(*parts) for parts in zip(*(x.unbind(3) for x in weighing), strict=True))
    return itertools.starmap(Chunk, zip(keys, directions, values, theta, each, asked, strict=True))


def coefficients(log_keep_C: Tensor, log_eta_C: Tensor | None) -> Coefficients:
    """From log(1 - alpha_t) and log(eta_t), [..., C] each (None: no momentum), to the chunk's coefficients.

    Both must be finite: alpha = 1 or eta = 0 gives NaN.
    """
    keep_P, spread_CC = _products(log_keep_C)
    if log_eta_C is None:
        none = torch.zeros_like(keep_P)
        share_CC = torch.eye(keep_P.shape[-1] - 1, dtype=keep_P.dtype, device=keep_P.device)
        share_PC = _start(share_CC.expand(*log_keep_C.shape[:-1], -1, -1))
        decay_P = F.pad(none[..., 1:], (1, 0), value=1.0)
        return Coefficients(keep_P, none, decay_P, _start(spread_CC), share_PC)
    decay_P, share_CC = _products(log_eta_C)
    carry_C = (spread_CC @ decay_P[..., 1:, None]).squeeze(-1)
    return Coefficients(keep_P, F.pad(carry_C, (1, 0)), decay_P, _start(spread_CC @ share_CC), _start(share_CC))


def _products(log_C: Tensor) -> tuple[Tensor, Tensor]:
    """prod_{k<=t} [..., P] and prod_{j<k<=t} [..., C, C] (zero above the diagonal)."""
    total_C = log_C.cumsum(-1)
    ahead = torch.ones(log_C.shape[-1], log_C.shape[-1], dtype=torch.bool, device=log_C.device).triu(1)
    between = (total_C[..., :, None] - total_C[..., None, :]).masked_fill(ahead, float("-inf"))
    return F.pad(total_C, (1, 0)).exp(), between.exp()


def _start(matrix_CC: Tensor) -> Tensor:
    """Put the chunk's start, a row of zeros, before the rows of its tokens."""
    return F.pad(matrix_CC, (0, 0, 1, 0))
