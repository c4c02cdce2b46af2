"""The closed form of a chunk: what b steps of momentum and forgetting do, without taking the steps.

Unrolling S_t = eta_t S_{t-1} - theta_t u_t (Titans, eq. 10) and M_t = (1 - alpha_t) M_{t-1} + S_t (eq. 13)
from M_0, S_0 gives, with u_j the gradient at token j,

    M_t = keep_t M_0 + carry_t S_0 - sum_{j<=t} weight_tj theta_j u_j
    S_t = decay_t S_0               - sum_{j<=t} share_tj  theta_j u_j

Row t of each coefficient stands for "after t tokens", t = 0..b: row 0 is the chunk's start (1, 0, 1, 0, 0).
Everything is taken in log space and float32 (or float64), differences masked before exp.

Shapes: B batch · H heads · C tokens of the chunk · P = C + 1 rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Coefficients(NamedTuple):
    """How the start and every token of a chunk weigh in the memory after t tokens."""

    keep_BHP: Tensor  # beta_t = prod (1 - alpha)
    carry_BHP: Tensor  # f_t: what the starting momentum has added by now
    decay_BHP: Tensor  # m_t = prod eta
    weight_BHPC: Tensor  # W = D E
    share_BHPC: Tensor  # E


def coefficients(log_keep_BHC: Tensor, log_eta_BHC: Tensor | None) -> Coefficients:
    """From log(1 - alpha_t) and log(eta_t) (None: no momentum) to the chunk's coefficients."""
    keep_BHP, spread_BHCC = _products(log_keep_BHC)
    if log_eta_BHC is None:
        none = torch.zeros_like(keep_BHP)
        share_BHCC = torch.eye(keep_BHP.shape[-1] - 1, dtype=keep_BHP.dtype, device=keep_BHP.device)
        share_BHPC = _start(share_BHCC.expand(*log_keep_BHC.shape[:2], -1, -1))
        decay_BHP = F.pad(none[..., 1:], (1, 0), value=1.0)
        return Coefficients(keep_BHP, none, decay_BHP, _start(spread_BHCC), share_BHPC)
    decay_BHP, share_BHCC = _products(log_eta_BHC)
    carry_BHC = (spread_BHCC @ decay_BHP[..., 1:, None]).squeeze(-1)
    return Coefficients(
        keep_BHP, F.pad(carry_BHC, (1, 0)), decay_BHP, _start(spread_BHCC @ share_BHCC), _start(share_BHCC)
    )


def _products(log_BHC: Tensor) -> tuple[Tensor, Tensor]:
    """prod_{k<=t} [B, H, P] and prod_{j<k<=t} [B, H, C, C] (zero above the diagonal)."""
    total_BHC = log_BHC.cumsum(-1)
    ahead = torch.ones(log_BHC.shape[-1], log_BHC.shape[-1], dtype=torch.bool, device=log_BHC.device).triu(1)
    between = (total_BHC[..., :, None] - total_BHC[..., None, :]).masked_fill(ahead, float("-inf"))
    return F.pad(total_BHC, (1, 0)).exp(), between.exp()


def _start(matrix_BHCC: Tensor) -> Tensor:
    """Put the chunk's start, a row of zeros, before the rows of its tokens."""
    return F.pad(matrix_BHCC, (0, 0, 1, 0))
