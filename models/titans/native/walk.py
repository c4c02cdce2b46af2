"""Tokens through all that stands below a model's last memory, and through what stands above it."""

import ctypes
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from titans.architecture import AttentionLayer, Layer, MemoryLayer, Run
from titans.model import TitansModel, Walks
from titans.native.layers import NativeLayers
from titans.native.matrix import Held, MatrixStruct, NativeMatrix, Team
from titans.state import Parts

_ALIGNED = 32  # what the kernels take at once of a head, and of all other widths
_KEYS = 16  # of a ring


def walks_of(model: TitansModel, team: Team) -> Walks | None:
    """The walks of a model whose linear layers are packed; None where the kernels do not know its layers."""
    body = model.config.backbone
    widths = body.head_dim, body.hidden_size, body.num_heads * body.head_dim, body.intermediate_size
    steps = *model.lower, *model.upper
    known = all(type(step) in {AttentionLayer, MemoryLayer} for step in steps) and type(model.lower[-1]) is MemoryLayer
    if not known or any(width % _ALIGNED for width in widths) or model.config.window % _KEYS:
        return None
    each_above = tuple(NativeWalk(model, [step], team) for step in model.upper)
    below, above = (NativeWalk(model, steps, team) for steps in (model.lower[:-1], model.upper))
    return Walks(below, above, each_above, NativeFinish(model, team))


class NativeWalk:
    """Some of a model's steps: layers that follow one another are one call, memories are themselves."""

    def __init__(self, model: TitansModel, steps: Sequence[Layer], team: Team) -> None:
        self._parts: list[tuple[NativeLayers | MemoryLayer, int]] = []  # and how many steps it is
        for is_memory, group in groupby(steps, key=lambda step: isinstance(step, MemoryLayer)):
            if is_memory:
                self._parts += [(step, 1) for step in group if isinstance(step, MemoryLayer)]
            else:
                layers = [step for step in group if isinstance(step, AttentionLayer)]
                self._parts.append((NativeLayers(model.config, layers, team), len(layers)))

    def __call__(self, h_BTD: Tensor, run: Run, parts: Sequence[Parts]) -> tuple[Tensor, tuple[Parts, ...]]:
        """Hidden states through the steps, and what these then carry."""
        after, start = list(parts), 0
        for step, count in self._parts:
            if isinstance(step, NativeLayers):
                h_BTD = step(h_BTD, run, parts[start : start + count])
            else:
                h_BTD, after[start] = step(h_BTD, run, parts[start])
            start += count
        return h_BTD, tuple(after)


class NativeFinish:
    """`TitansModel.finish`: the last norm, and what the readout makes of the last memory's answer."""

    def __init__(self, model: TitansModel, team: Team) -> None:
        self._team, self._held = team, Held()
        self._norm = (
            ctypes.c_int64(model.norm.weight.shape[0]),
            ctypes.c_double(model.norm.eps),
            ctypes.c_void_p(self._held.vector(model.norm.weight.float())),
        )
        self._readout = self._matrix(model.readout) if model.readout is not None else None

    def __call__(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        """bfloat16 [..., D], both of them, to the same."""
        h, to = h.contiguous(), torch.empty_like(h, memory_format=torch.contiguous_format)
        readout, answers = None, None
        if y is not None and self._readout is not None:
            y = y.contiguous()
            readout, answers = ctypes.byref(self._readout), _pointer(y)
        rows, given, result = ctypes.c_int64(h.numel() // h.shape[-1]), *map(_pointer, (h, to))
        self._team.kernels.titans_finish(self._team.handle, *self._norm, readout, rows, given, answers, result)
        return to

    def _matrix(self, linear: nn.Module) -> MatrixStruct:
        assert isinstance(linear.native, NativeMatrix)
        return self._held.matrix(linear.native)


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())
