"""The forms in which a document may be given, each turned into a body that httpx sends piece by piece."""

import asyncio
import errno
import io
import os
import select
import stat
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

PIECE = 64 * 1024  # bytes read at once


@runtime_checkable
class BinaryFile(Protocol):
    """Anything with a `read` that gives bytes, and none at its end."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes."""


DocumentSource = str | bytes | Path | BinaryFile | Iterable[bytes]
"""Text; its UTF-8 bytes; or where to read them: a path, an open binary file, an iterator."""

AsyncDocumentSource = DocumentSource | AsyncIterable[bytes]


@dataclass(frozen=True)
class Body:
    """What to send, once."""

    content: bytes | Iterator[bytes] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AsyncBody:
    """What to send, once, by an asynchronous client."""

    content: bytes | AsyncIterator[bytes] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def opened(document: AsyncDocumentSource | None) -> Iterator[Body]:
    """The document as a body. A path's file is closed at the end; a file that was given open stays open.

    Raises OSError for a path that cannot be read, TypeError for something that does not hold bytes.
    """
    if isinstance(document, Path):
        with document.open("rb") as file:
            yield _body_of_file(file)
    else:
        yield _body(document)


@asynccontextmanager
async def opened_async(document: AsyncDocumentSource | None) -> AsyncIterator[AsyncBody]:
    """The same, never blocking the event loop: files and plain iterators are read in a thread."""
    if isinstance(document, AsyncIterable):
        yield AsyncBody(_checked_async(document))
        return
    if isinstance(document, Path):
        file = _FileInThread(await asyncio.to_thread(document.open, "rb"))
        try:
            yield _in_thread(_body_of_file(file))
        finally:
            file.close()
    else:
        yield _in_thread(_body(document))


class _FileInThread:
    """A file that a thread reads and the event loop closes, which waits for no read: one of a pipe may never end.

    The file's own lock would have it wait.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._reading = threading.Lock()
        self._is_wanted = True

    def fileno(self) -> int:
        return self._file.fileno()

    def read(self, size: int = -1, /) -> bytes:
        try:
            with self._reading:
                return read_some(self._file, size)
        finally:
            if not self._is_wanted:
                self._file.close()

    def close(self) -> None:
        """Close the file, or leave that to the read that is under way."""
        self._is_wanted = False
        if self._reading.acquire(blocking=False):
            self._file.close()
            self._reading.release()


def _body(document: AsyncDocumentSource | None) -> Body:
    match document:
        case None | bytes():
            return Body(document)
        case str():
            return Body(document.encode())
        case io.TextIOBase():
            raise TypeError("the document's file must be open in binary mode")
        case BinaryFile():
            return Body(_checked(_pieces(document)))
        case Iterable():
            return Body(_checked(document))
        case _:
            raise TypeError(f"a document cannot be read from a {type(document).__name__}")


def _body_of_file(file: BinaryIO | _FileInThread) -> Body:
    """A regular file is sent as long as it is now, so that the server can refuse it by its size."""
    info = os.fstat(file.fileno())
    if not stat.S_ISREG(info.st_mode) or info.st_size == 0:  # a pipe; or one of those in /proc
        return Body(_pieces(file))
    return Body(_pieces(file, info.st_size), {"Content-Length": str(info.st_size)})


def read_some(file: BinaryFile, size: int) -> bytes:
    """At most `size` bytes of a file, none at its end.

    A pipe's are not waited for until they are so many: the server would take a client that keeps them for a silent one.
    Raises BlockingIOError where it has none yet and cannot be waited for.
    """
    read: Callable[[int], bytes | None] = file.read1 if isinstance(file, io.BufferedReader) else file.read
    piece = read(size)
    if not piece and isinstance(file, io.IOBase) and _never_waits(file):  # its end, or that there is nothing yet
        select.select([file], [], [])
        piece = read(size)
    if piece is None:
        raise BlockingIOError(errno.EAGAIN, "a file that has nothing to read yet")
    return piece


def _never_waits(file: io.IOBase) -> bool:
    try:
        return not os.get_blocking(file.fileno())
    except (AttributeError, OSError, ValueError):
        return False


def _pieces(file: BinaryFile, length: int | None = None) -> Iterator[bytes]:
    while piece := read_some(file, PIECE if length is None else min(PIECE, length)):
        yield piece
        length = None if length is None else length - len(piece)


def _checked(pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        yield _check(piece)


async def _checked_async(pieces: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    async for piece in pieces:
        yield _check(piece)


def _check(piece: bytes) -> bytes:
    if not isinstance(piece, bytes):
        raise TypeError(f"a document is made of bytes, not of {type(piece).__name__}")
    return piece


def _in_thread(body: Body) -> AsyncBody:
    content = body.content
    if content is None or isinstance(content, bytes):
        return AsyncBody(content, body.headers)
    return AsyncBody(_pull_in_thread(content), body.headers)


async def _pull_in_thread(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    """One thread at a time pulls one piece; an upload that is given up waits for none."""
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece
