"""The closed form of a chunk: what b steps of momentum and forgetting do, without taking the steps.

Unrolling S_t = eta_t S_{t-1} - theta_t u_t (Titans, eq. 10) and M_t = (1 - alpha_t) M_{t-1} + S_t (eq. 13)
from M_0, S_0 gives, with u_j the gradient at token j,

    M_t = keep_t M_0 + carry_t S_0 - sum_{j<=t} weight_tj theta_j u_j
    S_t = decay_t S_0               - sum_{j<=t} share_tj  theta_j u_j

Row t of each coefficient stands for "after t tokens", t = 0..b: row 0 is the chunk's start (1, 0, 1, 0, 0).
Everything is taken in log space and float32 (or float64), differences masked before exp.

Shapes: C tokens of the chunk · P = C + 1 rows; any dimensions (batch, heads, layers) go before.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Coefficients(NamedTuple):
    """How the start and every token of a chunk weigh in the memory after t tokens."""

    keep_P: Tensor  # beta_t = prod (1 - alpha)
    carry_P: Tensor  # f_t: what the starting momentum has added by now
    decay_P: Tensor  # m_t = prod eta
    weight_PC: Tensor  # W = D E
    share_PC: Tensor  # E


def coefficients(log_keep_C: Tensor, log_eta_C: Tensor | None) -> Coefficients:
    """From log(1 - alpha_t) and log(eta_t) (None: no momentum) to the chunk's coefficients."""
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
