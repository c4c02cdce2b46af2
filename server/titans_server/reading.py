"""A document on its way into a session: text to tokens, in portions that can be taken up again after a crash."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from titans.tokenizer import StreamEncoder, Tokenizer

from titans_server.errors import KeyReused
from titans_server.sessions.history import Portion

T = TypeVar("T")

SEPARATOR = "\n\n"  # stands between two documents of a session
_TAKEN_IN = 64  # pieces of a document that waits for its turn: a megabyte at most


class Document:
    """Text in, portions of tokens out, in bounded memory.

    A portion ends where the encoder could begin anew: the tokens of the whole are the same, wherever it was taken up.
    """

    def __init__(self, tokenizer: Tokenizer, pieces: AsyncIterator[str]) -> None:
        self._encoder = StreamEncoder(tokenizer)
        self._pieces = pieces
        self._digest = hashlib.sha256()
        self._held = ""  # read, and not yet given to the encoder
        self.num_bytes = 0  # of the text that the portions so far stand for

    @property
    def sha256(self) -> str:
        """Of the text that the portions so far stand for."""
        return self._digest.hexdigest()

    async def skip(self, num_bytes: int, sha256: str) -> None:
        """Read over a beginning that was learnt before. Raises KeyReused where it is another one."""
        while self.num_bytes < num_bytes:
            text = await anext(self._pieces, None)
            if text is None:
                break
            piece = text.encode()  # maybe of nothing: bytes that are no text yet
            ours, rest = piece[: num_bytes - self.num_bytes], piece[num_bytes - self.num_bytes :]
            self._count(ours)
            self._held = rest.decode(errors="surrogateescape")  # cut within a character: another document
        if (self.num_bytes, self.sha256) != (num_bytes, sha256):
            raise KeyReused("the Idempotency-Key was used for a document that begins otherwise")

    async def rest(self) -> None:
        """Read to the end, for `num_bytes` and `sha256` alone."""
        async for piece in self._pieces:
            self._count(piece.encode())

    async def portions(self, size: int) -> AsyncGenerator[Portion, None]:
        """The document from here on: at least `size` tokens each, but for the last one, which may have none."""
        tokens: list[int] = []
        if self._held:
            tokens += await self._encode(self._held)
        async for piece in self._pieces:
            tokens += await self._encode(piece)
            if len(tokens) >= size:
                yield Portion(tokens, self.num_bytes, self.sha256)
                tokens = []
        self._count(self._encoder.held.encode())
        tokens += await asyncio.to_thread(self._encoder.finish)
        yield Portion(tokens, self.num_bytes, self.sha256, is_last=True)

    async def _encode(self, piece: str) -> list[int]:
        text = self._encoder.held + piece
        tokens = await asyncio.to_thread(self._encoder.feed, piece)
        self._count(text[: len(text) - len(self._encoder.held)].encode())
        return tokens

    def _count(self, data: bytes) -> None:
        self._digest.update(data)
        self.num_bytes += len(data)


class Arriving:
    """A document's pieces, some taken in before anybody asks: so it is known whether a client that waits has left."""

    def __init__(self, pieces: AsyncIterator[str]) -> None:
        self._pieces = pieces
        self._held: asyncio.Queue[str | None] = asyncio.Queue(_TAKEN_IN)
        self._taking = asyncio.create_task(self._take_in())

    async def pieces(self) -> AsyncGenerator[str, None]:
        """All of them, once."""
        while (piece := await self._held.get()) is not None:
            yield piece
        await self._taking  # raises what broke it off

    @asynccontextmanager
    async def waiting(self) -> AsyncGenerator[None, None]:
        """Wait inside for the document's turn: what breaks the document off meanwhile ends that, and is raised."""
        is_waiting = True

        def give_up(taking: asyncio.Task[None]) -> None:
            if is_waiting and not taking.cancelled() and taking.exception() is not None:
                wait.reschedule(asyncio.get_running_loop().time())

        try:
            async with asyncio.timeout(None) as wait:
                self._taking.add_done_callback(give_up)
                try:
                    yield
                finally:
                    is_waiting = False
        except TimeoutError:
            if wait.expired():
                await self._taking
            raise

    async def close(self) -> None:
        """Take no more in."""
        self._taking.cancel()
        await asyncio.gather(self._taking, return_exceptions=True)

    async def _take_in(self) -> None:
        try:
            async for piece in self._pieces:
                await self._held.put(piece)
        except Exception:
            await self._held.put(None)
            raise
        await self._held.put(None)


@asynccontextmanager
async def arriving(pieces: AsyncIterator[str]) -> AsyncGenerator[Arriving, None]:
    """`Arriving`, closed in the end."""
    arrived = Arriving(pieces)
    try:
        yield arrived
    finally:
        await arrived.close()


async def ahead(source: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """The same items; while one is dealt with, the next is on its way. What is raised instead of one waits its turn."""

    async def get() -> T | None:
        return await anext(source, None)

    coming = asyncio.create_task(get())
    try:
        while (item := await coming) is not None:
            coming = asyncio.create_task(get())
            yield item
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
