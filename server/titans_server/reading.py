"""A document on its way into a session: text to tokens to strides that end where windows do."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from titans.tokenizer import StreamEncoder, Tokenizer

SEPARATOR = "\n\n"  # stands between two documents of a session
_STRIDE = 4  # windows that a document hands to the engine at once


class Document:
    """A document on its way into a session: text in, strides of tokens out, in bounded memory."""

    def __init__(self, tokenizer: Tokenizer, pieces: AsyncIterator[str], *, after: int, window: int) -> None:
        self._tokenizer = tokenizer
        self._pieces = pieces
        self._position = after
        self._window = window
        self.num_bytes = 0
        self.num_tokens = 0
        self.num_learnt = 0

    @property
    def bytes_learnt(self) -> int:
        """The share of the bytes so far that the learnt tokens stand for."""
        return self.num_bytes * self.num_learnt // max(1, self.num_tokens)

    async def strides(self) -> AsyncGenerator[list[int], None]:
        """Tokens to ingest: all but the last end on a window's boundary, however the text arrived."""
        encoder, tokens = StreamEncoder(self._tokenizer), list[int]()
        async for piece in self._pieces:
            if not self.num_bytes and self._position and piece:
                tokens += self._count(self._tokenizer.encode(SEPARATOR))
            self.num_bytes += len(piece.encode())
            tokens += self._count(await asyncio.to_thread(encoder.feed, piece))
            while len(tokens) >= (size := self._stride()):
                self._position += size
                yield tokens[:size]
                tokens = tokens[size:]
        tokens += self._count(await asyncio.to_thread(encoder.finish))
        while tokens and self.num_bytes:
            size = min(len(tokens), self._stride())
            self._position += size
            yield tokens[:size]
            tokens = tokens[size:]

    def _stride(self) -> int:
        return _STRIDE * self._window - self._position % self._window

    def _count(self, tokens: list[int]) -> list[int]:
        self.num_tokens += len(tokens)
        return tokens
