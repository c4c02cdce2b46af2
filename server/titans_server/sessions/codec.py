"""A session's state as bytes: safetensors, with the fingerprint of the model that it belongs to. Pure.

What is read back is bit-equal to what was written, where the dtypes agree. Nothing that is doubtful is read:
a state that is torn, of another model or not finite is an error, never a fresh start.
"""

import hashlib
import json

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from titans.memory.quantization import dequantize, quantize
from titans.state import State
from torch import Tensor

from titans_server.errors import StateCorrupted, StateMismatch

_FORMAT = "titans-session"
_FORMAT_VERSION = "2"  # 1 had no checksum of its own
_READABLE = ("1", "2")

# How far from 0 a state's numbers may be. What is stored was acknowledged, and is read whatever it is, if it is finite.
# Of what is imported nothing that is computed may overflow in float32; texts make hundreds, and learning makes what is
# there larger: some hundred times (measured), by attention to a window that is full of it.
MOST_STORED = torch.finfo(torch.float32).max
MOST_IMPORTED = 1e6


def encode(state: State, fingerprint: str) -> bytes:
    """One session's state, in its own dtypes, from any device. The state may change once this has returned."""
    assert state.batch_size == 1
    parts = {name: _on_host(x) for name, x in state.parts().items()}
    header = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "fingerprint": fingerprint}
    return save(parts, metadata=header | {"sha256": _digest(parts)})


def decode(blob: bytes, *, fingerprint: str, like: State, most: float = MOST_STORED) -> State:
    """The state that `encode` wrote, with the dtypes and on the devices of `like`; shares no memory with `blob`.

    Raises StateMismatch where it was written under another fingerprint, and StateCorrupted where it cannot be
    read, has parts or shapes that `like` has not, or holds numbers that are not within `most` of 0.
    """
    header = _read_header(blob)
    _check_header(header, fingerprint)
    stored, expected = _read_parts(blob), like.parts()
    if header["format_version"] != "1" and header.get("sha256") != _digest(stored):
        raise StateCorrupted("the state's numbers are not those that were written")
    if stored.keys() != expected.keys():
        raise StateCorrupted(f"the state has the parts {sorted(stored)}, not {sorted(expected)}")
    return State.from_parts({name: _fit(name, stored[name], x, most) for name, x in expected.items()})


def sha256(blob: bytes) -> str:
    """What goes into `Snapshot.sha256`: lower-case hexadecimal."""
    return hashlib.sha256(blob).hexdigest()


def _on_host(x: Tensor) -> Tensor:
    # Always a copy: the format takes neither views that share a storage nor strides.
    return x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _digest(parts: dict[str, Tensor]) -> str:
    """sha256 over the parts in the order of their names: the name, and the numbers' bytes."""
    total = hashlib.sha256()
    for name in sorted(parts):
        total.update(name.encode())
        total.update(parts[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _read_header(blob: bytes) -> dict[str, str]:
    """The metadata. The library gives it for files only, so it is read here: length, then JSON."""
    try:
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        return dict(header["__metadata__"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StateCorrupted("the state is not a safetensors file with metadata") from error


def _check_header(header: dict[str, str], fingerprint: str) -> None:
    if header.get("format") != _FORMAT:
        raise StateCorrupted(f"the state has the format {header.get('format')!r}, not {_FORMAT!r}")
    if header.get("format_version") not in _READABLE:
        found = header.get("format_version")
        raise StateCorrupted(f"the state has format version {found!r}; this server reads {' and '.join(_READABLE)}")
    if header.get("fingerprint") != fingerprint:
        found = header.get("fingerprint")
        raise StateMismatch(f"the state was made by the model {found!r}; this server runs {fingerprint!r}")


def _read_parts(blob: bytes) -> dict[str, Tensor]:
    try:
        return load(blob)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise StateCorrupted(f"the state cannot be read: {error}") from error


def _fit(name: str, stored: Tensor, like: Tensor, most: float) -> Tensor:
    *above, width = like.shape
    if stored.dtype == torch.int8 and like.is_floating_point() and stored.shape == (*above, width + 1):
        stored = dequantize(stored)  # by a server of another dtype, and so below
    elif like.dtype == torch.int8 and stored.is_floating_point() and stored.shape == (*above, width - 1):
        stored = quantize(_within(most, name, stored))
    if stored.shape != like.shape:
        raise StateCorrupted(f"{name} has the shape {tuple(stored.shape)}, not {tuple(like.shape)}")
    if stored.dtype != like.dtype and not (stored.is_floating_point() and like.is_floating_point()):
        raise StateCorrupted(f"{name} is of {stored.dtype}, which is not read as {like.dtype}")
    return _within(most, name, stored.to(like.dtype, copy=True)).to(like.device)


def _within(most: float, name: str, part: Tensor) -> Tensor:
    if part.is_floating_point() and part.numel():
        least, greatest = (float(x) for x in part.aminmax())  # a NaN is both
        if not -most <= least <= greatest <= most:
            raise StateCorrupted(f"{name} holds {least:g} to {greatest:g}: its numbers are to be within {most:g} of 0")
    return part
