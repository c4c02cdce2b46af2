"""Large matrices as the kernels read them, and products with them.

Weights that are on a grid (`titans.grid`) are kept as the codes that they are, others in bfloat16. `kernels/products.h`
says how they lie.

Shapes: R rows · N outputs · K inputs · G = K / 32 groups.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from titans.grid import GROUP, Grid, eight_bits, four_bits
from titans.native.build import library

_BLOCK = 16  # outputs that are computed together
_ROWS = 4_096  # that are put on a grid at once; whole blocks
_ROUNDING = 2.0**-9  # of a number in bfloat16, at most
_FOUR, _EIGHT, _SIXTEEN = 4, 8, 16


class Team:
    """Threads that compute together; they sleep between calls. Only where there are kernels."""

    def __init__(self, size: int) -> None:
        """`size`: threads, the caller's among them."""
        kernels = library()
        assert kernels is not None
        self.kernels = kernels
        kernels.titans_team.restype = ctypes.c_void_p
        self.handle = ctypes.c_void_p(kernels.titans_team(size))

    def __del__(self) -> None:
        self.kernels.titans_end(self.handle)


class MatrixStruct(ctypes.Structure):
    """kernels/products.h's Matrix."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("num_outputs", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("data", ctypes.c_void_p),
    )


class NativeMatrix:
    """A matrix [N, K] as the kernels read it."""

    def __init__(self, kind: int, shape: torch.Size, data: Tensor, team: Team) -> None:
        self.kind, self.team, self._data = kind, team, data
        self.num_outputs, self.num_inputs = shape
        self.struct = MatrixStruct(kind, *shape, data.data_ptr())

    @classmethod
    def pack(cls, weight_NK: Tensor, team: Team) -> "NativeMatrix | None":
        """A float32 matrix; None where the kernels cannot take its shape."""
        if weight_NK.shape[0] % _BLOCK or weight_NK.shape[1] % GROUP:
            return None
        if (data := _codes(weight_NK, four_bits, _four)) is not None:
            return cls(_FOUR, weight_NK.shape, data, team)
        if (data := _codes(weight_NK, eight_bits, _eight)) is not None:
            return cls(_EIGHT, weight_NK.shape, data, team)
        return cls.in_bfloat16(weight_NK, team)

    @classmethod
    def in_bfloat16(cls, weight_NK: Tensor, team: Team) -> "NativeMatrix":
        """A matrix whose sides are whole blocks and groups, on a grid or not."""
        return cls(_SIXTEEN, weight_NK.shape, _sixteen(weight_NK), team)

    @property
    def has_codes(self) -> bool:
        """Whether its weights were on a grid."""
        return self.kind != _SIXTEEN

    def __call__(self, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """bfloat16 [..., K] to [..., N], bfloat16 or float32."""
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.num_outputs, dtype=dtype)
        rows = ctypes.c_int64(x.numel() // self.num_inputs)
        kernels, pointer = self.team.kernels, ctypes.c_void_p
        multiply = kernels.titans_multiply if dtype == torch.bfloat16 else kernels.titans_score
        multiply(self.team.handle, ctypes.byref(self.struct), rows, pointer(x.data_ptr()), pointer(y.data_ptr()))
        return y


class Held:
    """What kernels are given the addresses of: it lives as long as this does."""

    def __init__(self) -> None:
        self._held: list[object] = []

    def vector(self, x: Tensor) -> int:
        """Where a tensor's numbers stand, one after the other; or those of a copy, where they do not."""
        self._held.append(x := x.detach().contiguous())
        return x.data_ptr()

    def matrix(self, matrix: NativeMatrix) -> MatrixStruct:
        """As the kernels are told of it."""
        self._held.append(matrix)
        return matrix.struct


def _codes(weight_NK: Tensor, find: Callable[[Tensor], Grid | None], lay: Callable[[Grid], Tensor]) -> Tensor | None:
    """None where weights are off the grid, or on one that codes cannot tell.

    Not all rows at once: a head's would be seen to be off it too late.
    """
    parts: list[Tensor] = []
    for rows in weight_NK.split(_ROWS):
        if (grid := find(rows)) is None or not _fits_half(grid):
            return None
        parts.append(lay(grid))
    return torch.cat(parts)


def _fits_half(grid: Grid) -> bool:
    """Whether half precision, in which codes have their steps and levels, does no more harm than bfloat16 would."""
    farthest = grid.codes.abs().amax(-1, keepdim=True)
    moved = farthest * (grid.step.half().float() - grid.step).abs() + (grid.lowest.half().float() - grid.lowest).abs()
    largest = torch.maximum(grid.lowest.abs(), (farthest * grid.step + grid.lowest).abs())
    return bool((moved <= _ROUNDING * largest).all())


def _four(grid: Grid) -> Tensor:
    """[N / 16, G, 320] bytes: codes, steps, lowest levels."""
    codes = grid.codes.to(torch.uint8).unflatten(0, (-1, _BLOCK)).unflatten(-1, (4, 2, 4))
    low, high = codes.unbind(-2)  # halves of a byte, four of which are a word: [N / 16, 16, G, 4, byte]
    words = (low | high << 4).permute(0, 2, 3, 1, 4).flatten(2)
    levels = _by_block(grid.step), _by_block(grid.lowest)
    return torch.cat([words, *(_bytes(x.to(torch.float16)) for x in levels)], dim=-1)


def _eight(grid: Grid) -> Tensor:
    """[N / 16, G, 576] bytes: codes, steps."""
    codes = (grid.codes + 128).to(torch.uint8).unflatten(0, (-1, _BLOCK)).unflatten(-1, (8, 4))
    words = codes.permute(0, 2, 3, 1, 4).flatten(2)  # four bytes are a word
    return torch.cat((words, _bytes(_by_block(grid.step))), dim=-1)


def _sixteen(weight_NK: Tensor) -> Tensor:
    """[N / 16, K / 2, 16, 2] bfloat16."""
    blocks: Tensor = weight_NK.bfloat16().unflatten(0, (-1, _BLOCK)).unflatten(-1, (-1, 2))
    return blocks.transpose(1, 2).contiguous()


def _by_block(x_NG1: Tensor) -> Tensor:
    """[N / 16, G, 16]."""
    blocks: Tensor = x_NG1.squeeze(-1).unflatten(0, (-1, _BLOCK))
    return blocks.transpose(1, 2)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
