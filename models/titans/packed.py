"""A model's large matrices laid out for the processor that multiplies with them: the same products in less time.

At batch 1 every token reads every weight once, so bytes are time. Two layouts, kept side by side:

    blocks      the weights as they are, in the order in which oneDNN's kernels read them, for many rows
    four bits   for a few rows, where the weights are four-bit already: a body from a Q4 GGUF, which is 16 levels a
                group of 32. That is found out from the weights, and others are never rounded to it

CPU and bfloat16 only: elsewhere nothing is changed.

Shapes: N outputs · K inputs · G = K / 32 groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from titans.model import TitansModel

_GROUP = 32  # weights that share a step and a lowest level
_ROUNDING = 2**-8  # of a weight: bfloat16's
_OFF_GRID = 0.1  # of a step: how far rounding may have moved a level (seen in all: 0.04; at random: 0.5)
_FEW = 5  # rows: with more, reading the weights is no longer what takes the time (measured)


class FourBits(NamedTuple):
    """W = (code - 8) * step + middle, as torch's int4 kernel for CPUs reads it."""

    codes: Tensor  # [N, K / 2] uint8, in the kernel's own order
    steps_and_middles: Tensor  # [G, N, 2] bfloat16


class PackedLinear(nn.Module):
    """A linear layer without bias, for inference alone: it has no parameters, and stays where it is."""

    def __init__(self, weight_NK: Tensor) -> None:
        super().__init__()
        self.num_outputs, self.num_inputs = weight_NK.shape
        self._blocks = torch.ops.mkldnn._reorder_linear_weight(weight_NK, None)
        self._four_bits = four_bits(weight_NK)

    @property
    def is_four_bit(self) -> bool:
        """Whether few rows read four bits a weight."""
        return self._four_bits is not None

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N], bfloat16."""
        if self._four_bits is not None and x.numel() <= _FEW * self.num_inputs:
            codes, steps_and_middles = self._four_bits
            rows = x.reshape(-1, self.num_inputs)
            few: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, _GROUP, steps_and_middles)
            return few.view(*x.shape[:-1], self.num_outputs)
        many: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._blocks, None, "none", [], "")
        return many


@torch.no_grad()
def pack(model: TitansModel) -> None:
    """Replace the body's linear layers, in place, where this machine gains by it. The last thing to do to a model.

    Its weights can no longer be trained, saved or moved.
    """
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    memories = {child for memory in model.memories for child in memory.modules()}  # they read their weights themselves
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child not in memories:
                setattr(parent, name, PackedLinear(child.weight.detach()))


def four_bits(weight_NK: Tensor) -> FourBits | None:
    """Weights that are on 16 levels a group, up to bfloat16's rounding, as codes and levels; None for all others."""
    num_outputs, num_inputs = weight_NK.shape
    if num_outputs % 16 or num_inputs % _GROUP:  # the kernel's own limits
        return None
    groups = weight_NK.float().unflatten(-1, (-1, _GROUP))
    lowest = groups.amin(-1, keepdim=True)
    step = ((groups.amax(-1, keepdim=True) - lowest) / 15).clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((groups - lowest) / step).round()
    moved = (lowest + codes * step - groups).abs()
    if (moved > _OFF_GRID * step + _ROUNDING * groups.abs()).any():
        return None
    levels = torch.cat((step, lowest + 8 * step), dim=-1).transpose(0, 1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).int(), 1)
    return FourBits(packed, levels.contiguous().to(torch.bfloat16))
