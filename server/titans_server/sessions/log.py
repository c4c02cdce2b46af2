"""A log entry as bytes: tokens as unsigned 32-bit little-endian numbers behind a checksum. Pure.

The checksum covers the entry's number, so that an entry in another's place is found out, as a torn one is.
"""

import struct
import zlib
from collections.abc import Sequence

from titans_server.errors import StateCorrupted


def pack(number: int, tokens: Sequence[int]) -> bytes:
    """The entry with this number."""
    body = struct.pack(f"<{len(tokens)}I", *tokens)
    return struct.pack("<I", _checksum(number, body)) + body


def unpack(number: int, entry: bytes) -> list[int]:
    """The tokens that `pack` was given. Raises StateCorrupted for bytes that it did not make for this number."""
    count, rest = divmod(len(entry) - 4, 4)
    if count < 0 or rest or struct.unpack_from("<I", entry)[0] != _checksum(number, entry[4:]):
        raise StateCorrupted(f"entry {number} of the log was altered or torn")
    return list(struct.unpack_from(f"<{count}I", entry, 4))


def _checksum(number: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(b"%d:" % number))
