"""A body's layers as one call: any number of sessions' next tokens, any number each.

What torch computes one small operation after the other the kernels compute in one go: `titans.attention` and
`titans.layers` are the reference. Rings are written in place. The residual stays float32 from layer to layer.

Shapes: B sessions · T tokens · D hidden.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from titans.architecture import AttentionLayer, Run
from titans.config import TitansConfig
from titans.native.matrix import Held, MatrixStruct, NativeMatrix, Team
from titans.state import Parts


class _Layer(ctypes.Structure):
    """kernels/layers.h's Layer."""

    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        *((name, MatrixStruct) for name in ("qkv", "out", "gate_up", "down")),
        ("persistent_keys", ctypes.c_void_p),
        ("persistent_values", ctypes.c_void_p),
    )


class _Body(ctypes.Structure):
    """kernels/layers.h's Body."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("size", "num_heads", "num_kv_heads", "head_dim", "inner")),
        *((name, ctypes.c_int64) for name in ("window", "num_persistent")),
        *((name, ctypes.c_double) for name in ("theta", "eps")),
    )


class NativeLayers:
    """Attention layers that follow one another."""

    def __init__(self, config: TitansConfig, layers: Sequence[AttentionLayer], team: Team) -> None:
        """Their linear layers are packed already, each with a matrix of its own."""
        body = config.backbone
        self._team, self._held = team, Held()
        self._layers = (_Layer * len(layers))(*map(self._describe, layers))
        sizes = body.hidden_size, body.num_heads, body.num_kv_heads, body.head_dim, body.intermediate_size
        self._body = _Body(*sizes, config.window, config.num_persistent, body.rope_theta, body.norm_eps)

    def __call__(self, h_BTD: Tensor, run: Run, parts: Sequence[Parts]) -> Tensor:
        """bfloat16 [B, T, D] to the same. What the run does not count, and what is before position 0, means nothing."""
        h_BTD = h_BTD.clone(memory_format=torch.contiguous_format)
        positions_B = run.position_B.contiguous()
        lengths_B = (
            torch.full_like(positions_B, h_BTD.shape[1]) if run.lengths_B is None else run.lengths_B.contiguous()
        )
        keys, values = ([each[name].data_ptr() for each in parts] for name in ("keys", "values"))
        pointers = ctypes.c_void_p * len(parts)
        self._team.kernels.titans_layers(
            self._team.handle,
            ctypes.byref(self._body),
            self._layers,
            *map(ctypes.c_int64, (len(parts), *h_BTD.shape[:2])),
            *(ctypes.c_void_p(x.data_ptr()) for x in (positions_B, lengths_B, h_BTD)),
            pointers(*keys),
            pointers(*values),
        )
        return h_BTD

    def _describe(self, layer: AttentionLayer) -> _Layer:
        attention, mlp = layer.attention, layer.mlp
        norms = [self._held.vector(norm.weight.float()) for norm in (layer.attention_norm, layer.mlp_norm)]
        linears = attention.qkv, attention.out, mlp.gate_up, mlp.down
        lasting = [self._held.vector(x.bfloat16()) for x in (attention.persistent_keys, attention.persistent_values)]
        return _Layer(*norms, *map(self._matrix, linears), *lasting)

    def _matrix(self, linear: nn.Module) -> MatrixStruct:
        native = linear.native
        assert isinstance(native, NativeMatrix)
        return self._held.matrix(native)
