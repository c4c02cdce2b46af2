"""Answers that come in pieces: iterators that own a connection."""

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Stream(Iterator[T], Generic[T]):
    """The pieces of one answer. The request is sent when the first is asked for.

    The connection is held from then on until the last piece, an error, `close`, the end of a `with` block, or until
    nobody holds the stream any more. One that is cut is resumed; of one closed early the server is told to stop.
    """

    def __init__(self, items: Generator[T, None, None]) -> None:
        self._items = items

    def __next__(self) -> T:
        return next(self._items)

    def __enter__(self) -> "Stream[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up the rest and the connection. Twice is as good as once."""
        self._items.close()


class AsyncStream(AsyncIterator[T], Generic[T]):
    """As `Stream`, for `async for` and `async with`."""

    def __init__(self, items: AsyncGenerator[T, None]) -> None:
        self._items = items

    async def __anext__(self) -> T:
        return await anext(self._items)

    async def __aenter__(self) -> "AsyncStream[T]":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give up the rest and the connection. Twice is as good as once."""
        await self._items.aclose()
