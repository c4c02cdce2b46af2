"""What a linear memory answers, as one call: `titans.memory.neural` is the reference.

Shapes: B sessions · T tokens · D hidden · H heads · N floats of weights a head · C inputs that a state keeps.
"""

import ctypes

import torch
from torch import Tensor, nn

from titans.memory.neural import NeuralMemory
from titans.native.matrix import MatrixStruct, NativeMatrix, Team

_LANES = 16  # floats that the kernels take at once


class _Memory(ctypes.Structure):
    """kernels.cpp's Memory."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("size", "num_heads", "key_dim", "value_dim", "reach", "products")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("norm", "center", "taps", "gate_bias")),
        *((name, MatrixStruct) for name in ("query", "gate", "out")),
    )


class NativeReader:
    """A memory's `read` for bfloat16, without gradients."""

    def __init__(self, memory: NeuralMemory, team: Team) -> None:
        config, self._team, self._kept = memory.config, team, list[object]()
        sizes = memory.center.shape[0], config.num_heads, config.key_dim, config.value_dim, config.conv_width - 1
        taps, center = memory.query_conv.T.float(), memory.center.bfloat16().float()
        vectors = memory.norm.weight.float(), center, taps, memory.out_gate.bias.float()
        linears = memory.query, memory.out_gate, memory.out
        self._memory = _Memory(
            *sizes, config.products, memory.norm.eps, *map(self._keep, vectors), *map(self._matrix, linears)
        )

    @staticmethod
    def knows(memory: NeuralMemory) -> bool:
        """Whether the kernels know such a memory."""
        config, size = memory.config, memory.center.shape[0]
        widths = config.key_dim, config.value_dim
        inputs = size, config.num_heads * config.value_dim
        fits = not any(width % _LANES for width in widths) and not any(width % (2 * _LANES) for width in inputs)
        return fits and not memory.rule.bound_to_chunks and not config.output_norm

    def __call__(
        self, h_BTD: Tensor, weights: Tensor, recent: Tensor, lengths_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `NeuralMemory.read`."""
        batch, num_tokens, _ = h_BTD.shape
        if lengths_B is None:
            lengths_B = torch.full((batch,), num_tokens)
        h_BTD, lengths_B, recent = h_BTD.contiguous(), lengths_B.contiguous(), recent.contiguous()
        if weights[0].is_contiguous():  # rows may be the same one, or stand apart
            stride = weights.stride(0)
        else:
            weights, stride = weights.contiguous(), weights[0].numel()
        y_BTD, moved = torch.empty_like(h_BTD), torch.empty_like(recent)
        self._team.kernels.titans_answers(
            self._team.handle,
            ctypes.byref(self._memory),
            *map(ctypes.c_int64, (batch, num_tokens)),
            *(ctypes.c_void_p(x.data_ptr()) for x in (lengths_B, h_BTD, weights)),
            ctypes.c_int64(stride),
            *(ctypes.c_void_p(x.data_ptr()) for x in (recent, y_BTD, moved)),
        )
        return y_BTD, moved

    def _matrix(self, linear: nn.Linear) -> MatrixStruct:
        matrix = NativeMatrix.in_bfloat16(linear.weight.detach(), self._team)
        self._kept.append(matrix)
        return matrix.struct

    def _keep(self, x: Tensor) -> int:
        """Hold on to a tensor whose address the kernels are given."""
        self._kept.append(x := x.detach().contiguous())
        return x.data_ptr()
