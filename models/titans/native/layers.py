"""A body's layers as one call, for tokens that come alone: one of each session, any number of sessions.

What torch computes one small operation after the other the kernels compute in one go: `titans.attention` and
`titans.layers` are the reference. Rings are written in place. The residual stays float32 from layer to layer.

Shapes: R rows · D hidden.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from titans.architecture import AttentionLayer
from titans.config import TitansConfig
from titans.native.matrix import MatrixStruct, NativeMatrix, Team
from titans.state import Parts


class _Layer(ctypes.Structure):
    """kernels.cpp's Layer."""

    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        *((name, MatrixStruct) for name in ("qkv", "out", "gate_up", "down")),
        ("persistent_keys", ctypes.c_void_p),
        ("persistent_values", ctypes.c_void_p),
    )


class _Body(ctypes.Structure):
    """kernels.cpp's Body."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_layers", "size", "num_heads", "num_kv_heads", "head_dim", "inner")),
        *((name, ctypes.c_int64) for name in ("window", "num_persistent")),
        *((name, ctypes.c_double) for name in ("theta", "eps")),
    )


class NativeLayers:
    """Attention layers that follow one another."""

    def __init__(self, config: TitansConfig, layers: Sequence[AttentionLayer], team: Team) -> None:
        """Their linear layers are packed already, each with a matrix of its own."""
        body = config.backbone
        self._team, self._kept = team, list[object]()
        self._layers = (_Layer * len(layers))(*map(self._describe, layers))
        sizes = body.hidden_size, body.num_heads, body.num_kv_heads, body.head_dim, body.intermediate_size
        self._body = _Body(len(layers), *sizes, config.window, config.num_persistent, body.rope_theta, body.norm_eps)

    def __call__(self, h_R1D: Tensor, position_R: Tensor, parts: Sequence[Parts]) -> Tensor:
        """bfloat16 [R, 1, D] to the same; row r's token has `position_R[r]` before it."""
        h_R1D, position_R = h_R1D.clone(memory_format=torch.contiguous_format), position_R.contiguous()
        keys, values = ([each[name].data_ptr() for each in parts] for name in ("keys", "values"))
        pointers = ctypes.c_void_p * len(parts)
        self._team.kernels.titans_layers(
            self._team.handle,
            ctypes.byref(self._body),
            self._layers,
            ctypes.c_int64(h_R1D.shape[0]),
            ctypes.c_void_p(position_R.data_ptr()),
            ctypes.c_void_p(h_R1D.data_ptr()),
            pointers(*keys),
            pointers(*values),
        )
        return h_R1D

    def _describe(self, layer: AttentionLayer) -> _Layer:
        attention, mlp = layer.attention, layer.mlp
        norms = [self._keep(norm.weight.float()) for norm in (layer.attention_norm, layer.mlp_norm)]
        linears = attention.qkv, attention.out, mlp.gate_up, mlp.down
        lasting = [self._keep(x.bfloat16()) for x in (attention.persistent_keys, attention.persistent_values)]
        return _Layer(*norms, *map(self._matrix, linears), *lasting)

    def _matrix(self, linear: nn.Module) -> MatrixStruct:
        native = linear.native
        assert isinstance(native, NativeMatrix)
        self._kept.append(native)
        return native.struct

    def _keep(self, x: Tensor) -> int:
        """Hold on to a tensor whose address the kernels are given."""
        self._kept.append(x := x.detach().contiguous())
        return x.data_ptr()
