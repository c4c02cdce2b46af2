"""Weights that are on a grid: a few levels in every group of 32, as files of four and eight bits a weight have them.

That is found out from the weights, and others are never put on a grid.

Shapes: N outputs · K inputs · G = K / 32 groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 32  # weights that share a step, and of four bits a lowest level
_OFF_GRID = 1e-3  # of a step: how far float32 may have moved a level (seen in all: 2e-5; at random: 0.5)


class Grid(NamedTuple):
    """W = code * step + lowest, group by group."""

    codes: Tensor  # [N, G, 32] float32, whole numbers: 0 to 15, or -127 to 127
    step: Tensor  # [N, G, 1] float32
    lowest: Tensor  # [N, G, 1] float32


def four_bits(weight_NK: Tensor) -> Grid | None:
    """float32 weights on 16 levels a group, both ends of which are used (Q4_1); None for all others."""
    if weight_NK.shape[1] % GROUP:
        return None
    groups = weight_NK.unflatten(-1, (-1, GROUP))
    lowest = groups.amin(-1, keepdim=True)
    return _fit(groups, (groups.amax(-1, keepdim=True) - lowest) / 15, lowest)


def eight_bits(weight_NK: Tensor) -> Grid | None:
    """float32 weights on 255 levels around zero, one of the outer ones used (Q8_0); None for all others."""
    if weight_NK.shape[1] % GROUP:
        return None
    groups = weight_NK.unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    return _fit(groups, largest / 127, torch.zeros_like(largest))


def _fit(groups: Tensor, step: Tensor, lowest: Tensor) -> Grid | None:
    step = step.clamp(min=torch.finfo(torch.float32).tiny)
    codes = (groups - lowest).div_(step).round_()
    moved = (codes * step).add_(lowest).sub_(groups).abs_()
    return Grid(codes, step, lowest) if (moved <= _OFF_GRID * step).all() else None
