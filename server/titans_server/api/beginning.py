"""The beginning of an answer that is streamed: until then it can fail with a status of its own."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from titans_server.errors import TitansError

T = TypeVar("T")


class Beginning:
    """Whether an answer has begun, or has failed before. Lives on the event loop."""

    def __init__(self) -> None:
        self._outcome: asyncio.Future[TitansError | None] = asyncio.get_running_loop().create_future()

    async def of(self, pieces: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """An answer's pieces, watched."""
        async with aclosing(pieces) as source:
            try:
                async for piece in source:
                    self._tell(None)
                    yield piece
            except TitansError as error:
                self._tell(error)
                raise
            except Exception:
                self._tell(TitansError("internal error"))
                raise

    async def wait(self, seconds: float) -> None:
        """Return when it has begun, or after so long. Raises what it has failed with."""
        await asyncio.wait([self._outcome], timeout=seconds)
        if self._outcome.done() and (error := self._outcome.result()) is not None:
            raise error

    def _tell(self, outcome: TitansError | None) -> None:
        if not self._outcome.done():
            self._outcome.set_result(outcome)
