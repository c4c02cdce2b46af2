"""Tokens out of scores in one call: `titans.sampling` is the reference.

Shapes: B sequences · N vocabulary.
"""

import ctypes
from collections.abc import Sequence

from torch import Tensor

from titans.native.matrix import Team
from titans.sampling import COLDEST, Choice


class _Choice(ctypes.Structure):
    """kernels/sampling.h's Choice."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("temperature", "top_p", "min_p", "chance")),
        *((name, ctypes.c_int64) for name in ("top_k", "num_changes")),
        *((name, ctypes.c_void_p) for name in ("changed", "changes")),
    )


class NativePick:
    """`titans.sampling.Pick`: to each sequence as if it were alone."""

    def __init__(self, team: Team) -> None:
        self._team = team

    def __call__(self, scores_BN: Tensor, choices: Sequence[Choice]) -> list[int]:
        """The next token of each. They are float32."""
        batch, size = scores_BN.shape
        scores_BN, tokens = scores_BN.contiguous(), (ctypes.c_int64 * batch)()
        changes = [_changes(choice, size) for choice in choices]
        given = (_Choice * batch)(*(_describe(x, y, size) for x, y in zip(choices, changes, strict=True)))
        scores = ctypes.c_void_p(scores_BN.data_ptr())
        sizes = map(ctypes.c_int64, (batch, size))
        self._team.kernels.titans_draw(self._team.handle, *sizes, scores, given, tokens)
        return list(tokens)


_Changes = tuple[ctypes.Array[ctypes.c_int64], ctypes.Array[ctypes.c_float]]


def _changes(choice: Choice, size: int) -> _Changes:
    count = len(choice.changes)
    tokens, values = zip(*choice.changes, strict=True) if count else ((), ())
    assert all(0 <= token < size for token in tokens), "the kernel writes where it is told to"
    return (ctypes.c_int64 * count)(*tokens), (ctypes.c_float * count)(*values)


def _describe(choice: Choice, changes: _Changes, size: int) -> _Choice:
    params, top_k = choice.params, min(choice.params.top_k, size)
    temperature = params.temperature and max(params.temperature, COLDEST)
    tokens, values = (ctypes.addressof(x) for x in changes)
    return _Choice(temperature, params.top_p, params.min_p, choice.chance, top_k, len(choice.changes), tokens, values)
