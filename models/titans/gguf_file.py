"""GGUF, a model in one file: metadata by key, where each tensor lies, then the tensors.

Versions 2 and 3, little-endian: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file is not trusted:
a length is believed only as far as there are bytes.
"""

import math
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from numpy import frombuffer, uint8
from torch import Tensor

_VERSIONS = 2, 3
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _STRING, _ARRAY, _UINT64 = 4, 8, 9, 10
_MAX_DIMENSIONS = 4
_ALIGNMENT = 32  # of tensors, where the file names no other
_PIECE = 2_048  # blocks that are dequantized at once: few enough for the processor's cache

T = TypeVar("T")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in the file."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # as torch counts: what lies side by side is last
    data: memoryview  # as many bytes as kind and shape make

    def dequantize(self) -> Tensor:
        """Its weights, float32. Raises NotImplementedError for kinds that the package gguf cannot read."""
        size, num_bytes = (_PIECE * each for each in GGML_QUANT_SIZES[self.kind])
        weights, data = torch.empty(self.shape), frombuffer(self.data, uint8)
        flat = weights.view(-1).numpy()
        for i in range(math.ceil(len(data) / num_bytes)):
            flat[i * size : (i + 1) * size] = dequantize(data[i * num_bytes : (i + 1) * num_bytes], self.kind)
        return weights


@dataclass(frozen=True)
class GGUFFile:
    """What a file says. It stays mapped as long as one of its tensors is held."""

    metadata: dict[str, Any]  # numbers, booleans, strings, and lists of them
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> "GGUFFile":
        """Raises OSError, and ValueError for what is not a whole GGUF."""
        with path.open("rb") as file:
            cursor = _Cursor(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        if bytes(cursor.take(4)) != b"GGUF":
            raise ValueError("it does not begin as a GGUF does")
        if (version := cursor.number(_UINT32)) not in _VERSIONS:
            raise ValueError(f"GGUF of version {version}, expected 2 or 3, little-endian")
        num_tensors, num_keys = cursor.numbers(_UINT64, 2)
        metadata = _by_name((cursor.string(), cursor.value()) for _ in range(num_keys))
        places = _by_name((cursor.string(), cursor.place()) for _ in range(num_tensors))
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment!r} is not a power of two")
        cursor.take(-cursor.at % alignment)
        return cls(metadata, {name: _stored(cursor.rest(), *place) for name, place in places.items()})


def _by_name(pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    found: dict[str, T] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"there are two of {name!r}")
        found[name] = value
    return found


def _stored(data: memoryview, shape: tuple[int, ...], kind: GGMLQuantizationType, start: int) -> StoredTensor:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ValueError(f"rows of {shape[-1]} weights are not whole blocks of {kind.name}")
    size = math.prod(shape) // block * block_bytes
    if start + size > len(data):
        raise ValueError(f"a tensor ends at byte {start + size} of {len(data)}")
    return StoredTensor(kind, shape, data[start : start + size])


class _Cursor:
    """A place in bytes, which moves on with what is read; a ValueError where it would move past their end."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def rest(self) -> memoryview:
        return self.data[self.at :]

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise ValueError(f"{len(self.data)} bytes are fewer than it says it has")
        self.at += size
        return self.data[self.at - size : self.at]

    def numbers(self, kind: int, count: int) -> tuple[Any, ...]:
        if (code := _NUMBERS.get(kind)) is None:
            raise ValueError(f"metadata of an unknown kind, {kind}")
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code)))

    def number(self, kind: int) -> Any:
        return self.numbers(kind, 1)[0]

    def string(self) -> str:
        return str(self.take(self.number(_UINT64)), "utf-8")

    def value(self) -> Any:
        if (kind := self.number(_UINT32)) == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(kind)
        kind, count = self.number(_UINT32), self.number(_UINT64)
        return [self.string() for _ in range(count)] if kind == _STRING else list(self.numbers(kind, count))

    def place(self) -> tuple[tuple[int, ...], GGMLQuantizationType, int]:
        """Of a tensor: its shape, its kind, and where it begins after all that stands in front of tensors."""
        if not 1 <= (num_dimensions := self.number(_UINT32)) <= _MAX_DIMENSIONS:
            raise ValueError(f"a tensor of {num_dimensions} dimensions")
        shape = self.numbers(_UINT64, num_dimensions)[::-1]
        return shape, GGMLQuantizationType(self.number(_UINT32)), self.number(_UINT64)
