"""A linear memory's reads and writes, each as one call: `titans.memory.neural` is the reference.

Shapes: B sessions · T tokens · D hidden · H heads · N floats of weights a head · R inputs that a state keeps.
"""

import ctypes

import torch
from torch import Tensor, nn

from titans.config import MOMENTUM_REACH
from titans.memory.margin import WHOLE_FROM
from titans.memory.neural import MemoryState, NeuralMemory
from titans.memory.protection import ANOTHER, FIRMNESS, LEAST_STEP, MOST_WEIGHT, SAME, SLACK
from titans.native.matrix import Held, MatrixStruct, NativeMatrix, Team

_LANES = 16  # floats that the kernels take at once
_SHAPE = "size num_heads key_dim value_dim reach gate_reach products".split()
_RULE = "chunk forgets momentum_reach protected_keys".split()
_THRESHOLDS = "write_threshold read_threshold margin_threshold whole_margin".split()
_NUMBERS = ["eps", "most_momentum", *_THRESHOLDS, *"firmness another same slack most_weight least_step".split()]
_VECTORS = "norm center query_taps key_taps value_taps gate_taps gates gates_bias out_gate_bias".split()
_MATRICES = "query key value out_gate out".split()


class _Memory(ctypes.Structure):
    """kernels/memory.h's Memory."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*_SHAPE, *_RULE)),
        *((name, ctypes.c_double) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _VECTORS),
        *((name, MatrixStruct) for name in _MATRICES),
    )


class NativeMemory:
    """`read` and `write` of a memory in bfloat16, without gradients; `titans.memory.neural.Kernels`."""

    def __init__(self, memory: NeuralMemory, team: Team) -> None:
        config, size, self._team, self._held = memory.config, memory.center.shape[0], team, Held()
        self._shape = config.num_heads, config.num_weights
        self._momentum_shape = config.num_heads, config.num_momentum
        gate_taps = memory.gate_conv if config.gate_width > 1 else torch.ones(size, 1)
        vectors = {
            "norm": memory.norm.weight,
            "center": memory.center.bfloat16(),
            "query_taps": memory.query_conv.T,
            "key_taps": memory.key_conv.T,
            "value_taps": memory.value_conv.T,
            "gate_taps": gate_taps.T,
            "gates": memory.gates.weight,
            "gates_bias": memory.gates.bias,
            "out_gate_bias": memory.out_gate.bias,
        }
        self._memory = _Memory(
            size=size,
            num_heads=config.num_heads,
            key_dim=config.key_dim,
            value_dim=config.value_dim,
            reach=config.conv_width - 1,
            gate_reach=config.gate_width - 1,
            products=config.products,
            chunk=config.chunk_size,
            forgets=config.forgetting,
            momentum_reach=MOMENTUM_REACH if config.momentum else 0,
            eps=memory.norm.eps,
            most_momentum=memory.most_momentum,
            write_threshold=config.write_threshold,
            read_threshold=config.read_threshold,
            margin_threshold=config.margin_threshold,
            whole_margin=WHOLE_FROM * config.margin_threshold,
            protected_keys=config.protected_keys,
            firmness=FIRMNESS,
            another=ANOTHER,
            same=SAME,
            slack=SLACK,
            most_weight=MOST_WEIGHT,
            least_step=LEAST_STEP,
            **{name: self._held.vector(x.float()) for name, x in vectors.items()},
            **{name: self._matrix(memory.get_submodule(name)) for name in _MATRICES},
        )

    @staticmethod
    def knows(memory: NeuralMemory) -> bool:
        """Whether the kernels know such a memory."""
        config, size = memory.config, memory.center.shape[0]
        inputs = size, config.num_heads * config.value_dim
        fits = not any(x % _LANES for x in (config.key_dim, config.value_dim)) and not any(x % 32 for x in inputs)
        return fits and not memory.rule.bound_to_chunks and not config.output_norm

    def read(
        self,
        h_BTD: Tensor,
        weights: Tensor,
        recent: Tensor,
        lengths_B: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `NeuralMemory.read`."""
        h_BTD, recent, lengths_B = _inputs(h_BTD, recent, lengths_B)
        asked: list[Tensor | int | None] = [*_rows(weights), recent]
        asked += (None, 0) if kept is None or not self._memory.margin_threshold else _rows(kept)
        y_BTD, moved = torch.empty_like(h_BTD), torch.empty_like(recent)
        self._call("titans_read", h_BTD, lengths_B, *asked, y_BTD, moved)
        return y_BTD, moved

    def write(self, h_BTD: Tensor, state: MemoryState, lengths_B: Tensor | None = None) -> MemoryState:
        """See `NeuralMemory.write`."""
        h_BTD, recent, lengths_B = _inputs(h_BTD, state.recent, lengths_B)
        rows: list[Tensor | int | None] = [*_rows(state.weights)]
        new_weights, moved = torch.empty(h_BTD.shape[0], *self._shape), torch.empty_like(recent)
        new_momentum = state.momentum
        if self._memory.momentum_reach:
            rows += _rows(state.momentum)
            new_momentum = torch.empty(h_BTD.shape[0], *self._momentum_shape)
        else:
            rows += [None, 0]
        kept, newly_kept = state.kept.contiguous(), torch.empty_like(state.kept)
        asked = kept if self._memory.protected_keys else None
        after = new_weights, new_momentum, moved, newly_kept
        self._call("titans_write", h_BTD, lengths_B, *rows, recent, asked, *after)
        return MemoryState(state.position + lengths_B, *after)

    def _call(self, name: str, h_BTD: Tensor, lengths_B: Tensor, *others: Tensor | int | None) -> None:
        given = map(_argument, (*h_BTD.shape[:2], lengths_B, h_BTD, *others))
        getattr(self._team.kernels, name)(self._team.handle, ctypes.byref(self._memory), *given)

    def _matrix(self, linear: nn.Module) -> MatrixStruct:
        assert isinstance(linear, nn.Linear)
        return self._held.matrix(NativeMatrix.in_bfloat16(linear.weight.detach(), self._team))


def _argument(x: Tensor | int | None) -> ctypes.c_void_p | ctypes.c_int64:
    """Tensors are given by their addresses."""
    return ctypes.c_int64(x) if isinstance(x, int) else ctypes.c_void_p(None if x is None else x.data_ptr())


def _inputs(h_BTD: Tensor, recent: Tensor, lengths_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernels read them."""
    if lengths_B is None:
        lengths_B = torch.full(h_BTD.shape[:1], h_BTD.shape[1])
    return h_BTD.contiguous(), recent.contiguous(), lengths_B.contiguous()


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """[B, ...] whose rows are whole, and numbers from one to the next: they may be the same, or stand apart."""
    x = x if x[0].is_contiguous() else x.contiguous()
    return x, x.stride(0)
