"""A model's large matrices laid out for the processor that multiplies with them: the same products in less time.

At batch 1 every token reads every weight once, so bytes are time. Weights on a grid (a GGUF's four or eight bits) are
kept as their codes, and the project's own kernels (`titans.native`) multiply with these, however many rows there are,
and with a head in bfloat16. Where there are no kernels, or no grid, there are two layouts side by side:

    many rows   bfloat16, in the order in which oneDNN's kernels read them
    few rows    bfloat16 as our kernels read them; where there are none, four bits as torch's do

Where there are kernels, whole runs of layers are one call for them, and no product is made by itself but the head's.

CPU and bfloat16 only: elsewhere nothing is changed.

Shapes: N outputs · K inputs · G = K / 32 groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from titans.grid import GROUP, four_bits
from titans.model import TitansModel
from titans.native.build import library
from titans.native.matrix import NativeMatrix, Team
from titans.native.memory import NativeMemory
from titans.native.sampling import NativePick
from titans.native.walk import walks_of

_FEW, _FEW_OF_TORCH = 2, 5  # rows: with more, oneDNN is faster (measured)


class PackedLinear(nn.Module):
    """A linear layer without bias, for inference alone: it has no parameters, and stays where it is."""

    def __init__(self, weight_NK: Tensor, team: Team | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        """`weight_NK`: float32. `dtype`: of the outputs where kernels compute them."""
        super().__init__()
        self.num_outputs, self.num_inputs = weight_NK.shape
        self.native = NativeMatrix.pack(weight_NK, team) if team else None
        self._dtype = dtype
        self._four_bits = None if self.native else FourBits.pack(weight_NK)
        self._few = _FEW if self.native else _FEW_OF_TORCH if self._four_bits else 0
        self._many: Tensor | None = None  # of codes the kernels take any number of rows; oneDNN would round scores
        if not (self.native and (self.native.has_codes or dtype == torch.float32)):
            self._many = torch.ops.mkldnn._reorder_linear_weight(weight_NK.bfloat16(), None)

    def forward(self, x: Tensor) -> Tensor:
        """bfloat16 [..., K] to [..., N]."""
        if self._many is not None and x.numel() > self._few * self.num_inputs:
            many: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._many, None, "none", [], "")
            return many
        return self.native(x, self._dtype) if self.native else self._by_torch(x)

    def _by_torch(self, x: Tensor) -> Tensor:
        assert self._four_bits is not None
        rows, (codes, levels) = x.reshape(-1, self.num_inputs), self._four_bits
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, GROUP, levels)
        return y.view(*x.shape[:-1], self.num_outputs)


def is_native(model: TitansModel) -> bool:
    """Whether kernels compute all that is large, however many rows: layers, memories and the head."""
    head = isinstance(model.head, PackedLinear) and model.head.native is not None
    return head and model.walks is not None and all(memory.kernels is not None for memory in model.memories)


class FourBits(NamedTuple):
    """W = (code - 8) * step + middle, as torch's int4 kernel for CPUs reads it."""

    codes: Tensor  # [N, K / 2] uint8, in the kernel's own order
    levels: Tensor  # [G, N, 2] bfloat16: steps and middles

    @classmethod
    def pack(cls, weight_NK: Tensor) -> "FourBits | None":
        """None for weights off the grid, and where the kernel cannot take the shape."""
        if weight_NK.shape[0] % 16 or (grid := four_bits(weight_NK)) is None:
            return None
        levels = torch.cat((grid.step, grid.lowest + 8 * grid.step), dim=-1).transpose(0, 1)
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(grid.codes.flatten(1).int(), 1)
        return cls(codes, levels.contiguous().to(torch.bfloat16))


@torch.no_grad()
def pack(model: TitansModel, exact: dict[str, Tensor]) -> None:
    """Replace the body's linear layers, in place, where this machine gains by it. The last thing to do to a model.

    `exact`: tensors in float32, by name, as they were before the model was moved to bfloat16; where one is missing the
    model's own is taken. Its weights can no longer be trained, saved or moved.
    """
    if not _is_packable(model):
        return
    team = Team(torch.get_num_threads()) if library() is not None else None
    memories = {child for memory in model.memories for child in memory.modules()}  # they read their weights themselves
    tied = {"head.weight": "embedding.weight"} if model.config.backbone.tie_embeddings else {}
    for name, child in list(model.named_modules()):
        if isinstance(child, nn.Linear) and child not in memories:
            own = f"{name}.weight"
            weight = exact.get(tied.get(own, own), child.weight.detach().float())
            parent, _, attribute = name.rpartition(".")
            dtype = torch.float32 if child is model.head else torch.bfloat16  # scores are not rounded on the way
            setattr(model.get_submodule(parent), attribute, PackedLinear(weight, team, dtype))
    if team is not None:
        model.walks, model.pick = walks_of(model, team), NativePick(team)
        _pack_memories(model, team)


@torch.no_grad()
def pack_memories(model: TitansModel) -> None:
    """Let kernels read and write its memories, where this machine has any: they are as they were, and learn no more."""
    if _is_packable(model) and library() is not None:
        _pack_memories(model, Team(torch.get_num_threads()))


def _is_packable(model: TitansModel) -> bool:
    is_half = model.device.type == "cpu" and model.dtype == torch.bfloat16
    return is_half and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _pack_memories(model: TitansModel, team: Team) -> None:
    for memory in model.memories:
        memory.kernels = NativeMemory(memory, team) if NativeMemory.knows(memory) else None
