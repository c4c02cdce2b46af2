"""Writing without disturbing: the direction in which a token is learnt, so that what was written last stays.

The gradient of the inner loss moves M along the token's key k, and so changes what all keys answer that are like k.
Every d with k^T d = 1 changes the answer to k as much. The one that changes the answers to the last N keys that were
written well least, each weighed by w, while it stays short itself, is

    d = P k / (k^T P k),   P = (I + FIRMNESS sum_i f_i w_i k_i k_i^T)^-1 + SLACK I

w = theta / (1 - theta), as far as theta is above LEAST_STEP: none there, all from twice that on. A key that has none is
not kept. Nor does so faint a step do much harm: from LEAST_STEP on d is as above, at half of that it is k.

f is how far k_i is another key: all of it where the cosine of k_i and k is up to ANOTHER, none from SAME on. What was
told under the same key is what is told anew, and nothing to leave as it is; to leave it would need a d that goes along
the little in which the two differ, and what asks for either would find both values.

P is what recursive least squares keeps, where it is of all keys and K x K (Plackett 1950; of memories that learn while
they read: MesaNet, von Oswald et al. 2025). Of the last keys alone it need not be kept: these are, as rows sqrt(w) k,
and no more of them than the state has room for. The step is theta as it was, so a key's newest value wins; without
slack, keys that many others make up together would let M grow without need.

Shapes: B batch · H memory heads · C tokens of a call · K floats that a key is made of · F floats of a key as the memory
sees it · N rows kept · W tokens that are written well enough to have rows · S = N + W.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from titans.memory.quantization import as_floats, like

LEAST_STEP = 0.3  # theta of a key that is kept: what is written faintly is little to lose, and a text has much of it
FIRMNESS = 4.0  # more: more of what was written stays, and M grows more
ANOTHER, SAME = 0.6, 0.75  # cosines of two keys
SLACK = 0.03  # more: M grows less by keys that others make up together
MOST_WEIGHT = 16.0  # of a token that is written whole
_STEPS = 40  # of the conjugate gradients, which are products alone, as any device has: 1e-4 from the end at worst
_PRECISE = 1e-15  # of the residual's square: as far as float32 goes
_TINY = 1e-30


class Protection(NamedTuple):
    """The keys of a run of tokens with those kept before them."""

    directions: Tensor  # [B, H, C, F]: along which each of them is learnt; its key where theta is small
    rows: Tensor  # [B, H, S, K], as they are kept: those that were, and those of W of these tokens
    expanded: Tensor  # [B, H, S, F]: the same as the memory sees them
    lasting: Tensor  # [B, H, W]: which of the W are kept
    at: Tensor  # [W]: where they are among the tokens

    def in_sight(self) -> Tensor:
        """Which rows [B, H, C, S] are the last N as of each token, its own among them."""
        each = torch.zeros(self.directions.shape[:3], dtype=torch.int32, device=self.lasting.device)
        by_now = each.index_copy(2, self.at, self.lasting.int()).cumsum(dim=-1)
        return _in_sight(self.lasting, self.rows.shape[2] - self.lasting.shape[2], by_now)

    def kept(self, ends_B: Tensor | None = None) -> Tensor:
        """The last N rows [B, H, N, K], of those kept and of the first `ends_B[b]` tokens (all by default)."""
        lasting, num_kept = self.lasting, self.rows.shape[2] - self.lasting.shape[2]
        if ends_B is not None:
            lasting = lasting & (self.at < ends_B[:, None, None])
        counts = F.pad(lasting.int(), (num_kept, 0), value=1)
        return self.rows.take_along_dim(counts.argsort(dim=-1, stable=True)[..., -num_kept:, None], dim=2)


def protect(
    keys: Tensor, factors: Tensor, theta: Tensor, kept: Tensor, *, expand: Callable[[Tensor], Tensor], degree: int
) -> Protection:
    """What to do for each of these tokens, each of which comes after those before it.

    `keys` [B, H, C, F] have unit length; but for that `expand` makes them of `factors` [B, H, C, K], and c^degree times
    as large of c times these. `theta` [B, H, C]. `kept` [B, H, N, K], floats or in eight bits
    (`titans.memory.quantization`), the last one at the end; zeros where there is none.
    """
    whole, share = keys, turned(theta)
    if theta.is_cpu:  # what is written well, which of a text is little (elsewhere it would have to be waited for)
        at = share.flatten(0, 1).any(dim=0).nonzero().squeeze(-1)
    else:
        at = torch.arange(theta.shape[2], device=theta.device)
    keys, factors, theta, share = (x.index_select(2, at) for x in (keys, factors, theta, share))
    weight = weights(theta.detach())
    lasting = weight > 0
    own = (weight.where(lasting, 1).sqrt() / expand(factors).norm(dim=-1).clamp(min=_TINY)) ** (1 / degree)
    new = (lasting * own)[..., None] * factors  # (0 to the power of a half would have no gradient)
    rows = torch.cat((kept, like(new, kept)), dim=2)
    expanded = expand(as_floats(rows).to(keys.dtype))
    longest = math.sqrt(MOST_WEIGHT)
    known = expanded / (expanded.norm(dim=-1, keepdim=True) / longest).clamp(min=1)  # a state may be anyone's
    before = lasting.int().cumsum(dim=-1) - lasting.int()
    directions = keys.lerp(_directions(keys, known, _in_sight(lasting, kept.shape[2], before)), share[..., None])
    return Protection(whole.index_copy(2, at, directions), rows, expanded, lasting, at)


def weights(theta: Tensor) -> Tensor:
    """w of tokens that are written with these steps."""
    return theta / (1 - theta).clamp(min=1 / MOST_WEIGHT) * (theta / LEAST_STEP - 1).clamp(0, 1)


def turned(theta: Tensor) -> Tensor:
    """How far, from 0 to 1, tokens are learnt along d and not along k."""
    return (2 * theta / LEAST_STEP - 1).clamp(0, 1)


def _other(cosine: Tensor) -> Tensor:
    """f of two keys: how far they are not the same, from 0 to 1."""
    return ((SAME - cosine) / (SAME - ANOTHER)).clamp(0, 1)


def _in_sight(lasting: Tensor, num_kept: int, by_now: Tensor) -> Tensor:
    """Which rows [B, H, T, S] are the last N when `by_now` [B, H, T] of the new ones have lasted."""
    since = by_now[..., None] - (lasting.int().cumsum(dim=-1) - lasting.int())[..., None, :]  # 1 for the last one
    kept = torch.arange(num_kept, device=lasting.device) >= by_now[..., None]
    return torch.cat((kept, lasting[..., None, :] & (since > 0) & (since <= num_kept)), dim=-1)


def _directions(keys: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
    """d of each key, by conjugate gradients (Hestenes & Stiefel 1952).

    P k = k - R^T (I + R R^T)^-1 R k, R the rows in sight, each times the root of FIRMNESS and of how far it is another.
    """
    if not keys.shape[2]:
        return keys
    alike, gram = keys @ rows.mT, rows @ rows.mT
    cosine = alike.detach() / rows.detach().norm(dim=-1)[:, :, None].clamp(min=_TINY)
    firm = seen * (FIRMNESS * _other(cosine)).sqrt()
    residual = firm * alike
    direction, solved = residual, torch.zeros_like(residual)
    left = residual.square().sum(-1, keepdim=True)
    small = _PRECISE * left
    for _ in range(_STEPS):
        if left.is_cpu and (left <= small).all():  # (to know it another device would have to be waited for)
            break
        image = direction + firm * ((firm * direction) @ gram)
        step = left / (direction * image).sum(-1, keepdim=True).clamp(min=_TINY)
        solved, residual = solved + step * direction, residual - step * image
        remains = residual.square().sum(-1, keepdim=True)
        direction, left = residual + remains / left.clamp(min=_TINY) * direction, remains
    free = keys - (firm * solved) @ rows
    own = (keys * free).sum(-1, keepdim=True)
    return (free + SLACK * keys) / (own + SLACK)
