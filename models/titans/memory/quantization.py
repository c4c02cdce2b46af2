"""Rows of floats in eight bits, as a state keeps keys: room for twice as many as in half precision.

A row of K floats is K + 1 int8: the floats over the row's scale, rounded, and last the scale as a power of the eighth
root of two. It is the least that leaves none of them beyond 127, so the largest is 116 or more, and what is rounded off
is 1/232 of that at most. All bytes are a row: its floats are finite, whoever wrote them.
"""

import torch
from torch import Tensor

_MOST = 127.0
_STEPS = 8.0  # of a scale, to twice as much
_LEAST = 2.0**-16  # the least scale: a row of smaller floats is nothing


def quantize(rows: Tensor) -> Tensor:
    """[..., K] floats to [..., K + 1] int8; zeros to zeros. Without gradient."""
    largest = rows.detach().abs().amax(dim=-1, keepdim=True)
    steps = (_STEPS * (largest.clamp(min=_LEAST) / _MOST).log2()).ceil().clamp(-128, 127)
    steps = steps.where(largest >= _LEAST, 0)
    floats = (rows.detach() / (steps / _STEPS).exp2()).round().clamp(-_MOST, _MOST)
    return torch.cat((floats, steps), dim=-1).to(torch.int8)


def dequantize(rows: Tensor) -> Tensor:
    """[..., K + 1] int8 to [..., K] float32."""
    return rows[..., :-1].float() * (rows[..., -1:].float() / _STEPS).exp2()


def as_floats(rows: Tensor) -> Tensor:
    """Rows that are kept, in eight bits or as they are."""
    return dequantize(rows) if rows.dtype == torch.int8 else rows


def like(rows: Tensor, kept: Tensor) -> Tensor:
    """Rows of floats, as `kept` keeps them."""
    return quantize(rows) if kept.dtype == torch.int8 else rows.to(kept.dtype)
