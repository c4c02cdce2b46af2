"""Where a server is in its life, and what that means for work: loading → ready → draining → stopping.

A drain lets work under way finish and takes no new. What is left when its time is up is ended with ShuttingDown, which
a stream still tells its client, instead of having its connection cut. Lives on the event loop.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Generic, Protocol, TypeVar

from titans_server.errors import Loading, ModelFailed, ShuttingDown

T = TypeVar("T")

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_FAREWELL_SECONDS = 5.0  # for what was ended to tell its clients


class CannotStart(Exception):
    """What ends a server before it serves, and is for its operator to mend: the message says what, in one line."""


class Worker(Protocol):
    """What does the work: the engine."""

    @property
    def num_requests(self) -> int:
        """Everything admitted and not yet ended, some of it for no request that is in flight."""

    def is_alive(self) -> bool:
        """Whether work is still being done."""

    async def close(self) -> None:
        """End what is left with ShuttingDown."""


class Lifecycle(Generic[T]):
    """One server's life. `T` is what it serves once it has been loaded."""

    def __init__(self) -> None:
        self._served: T | None = None
        self._worker: Worker | None = None
        self._readers: set[asyncio.Task[Any]] = set()  # that wait for a client's bytes
        self._num_in_flight = 0
        self._num_streams: Callable[[], int] = lambda: 0
        self._retire: Callable[[], None] = lambda: None
        self.is_draining = False
        self.is_stopping = False
        self.has_failed = False

    @property
    def served(self) -> T:
        """What is served. Raises Loading, ModelFailed."""
        if self.has_failed:
            raise ModelFailed("the model cannot be loaded; the server's log says why")
        if self._served is None or self._worker is None:
            raise Loading("the model is being loaded")
        if not self._worker.is_alive() and not self.is_stopping:
            raise ModelFailed("the thread that runs the model has ended; the server's log says why")
        return self._served

    def ready(
        self,
        served: T,
        worker: Worker,
        *,
        num_streams: Callable[[], int] = lambda: 0,
        retire: Callable[[], None] = lambda: None,
    ) -> None:
        """Serve from now on.

        `num_streams`: those under way, some of them without a request or any at the worker's. `retire` is called when
        a drain begins: no work is started from then on that no client waits for.
        """
        self._served, self._worker, self._num_streams, self._retire = served, worker, num_streams, retire
        if self.is_draining:
            retire()

    @asynccontextmanager
    async def loading(self, load: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
        """Load beside what is inside, so that the server can say that it does. Failing ends the server."""

        async def run() -> None:
            try:
                await load()
            except Exception as error:
                self.has_failed = True
                log.error("the model cannot be loaded: %s", error, exc_info=not isinstance(error, CannotStart))

        task = asyncio.create_task(run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def check(self) -> T:
        """What is served, to new work. Raises ShuttingDown, Loading, ModelFailed."""
        if self.is_draining:
            raise ShuttingDown("the server is shutting down")
        return self.served

    @contextmanager
    def in_flight(self, *, to_old_work: bool = False) -> Iterator[None]:
        """A request that a drain waits for. Raises as `check`; `to_old_work`: it may come while that is waited for."""
        if not to_old_work or self.is_stopping:
            self.check()
        self._num_in_flight += 1
        try:
            yield
        finally:
            self._num_in_flight -= 1

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A wait for a client's bytes, which stopping ends with ShuttingDown."""
        task = asyncio.current_task()
        assert task is not None
        if self.is_stopping:
            raise ShuttingDown("the server is shutting down")
        self._readers.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self.is_stopping or task.uncancel():
                raise
            raise ShuttingDown("the server is shutting down") from None
        finally:
            self._readers.discard(task)

    async def drain(self, seconds: float, is_hurried: Callable[[], bool]) -> None:
        """Take no new work, wait for what is under way, and then end it. `is_hurried`: whether to wait for nothing."""
        self.is_draining = True
        self._retire()
        log.info("draining: %d requests are under way", self._num_in_flight)
        if not await self._idle_within(seconds, is_hurried) and self._worker is not None:
            log.warning("ending %d requests that are under way after %.0f s", self._num_in_flight, seconds)
            self.is_stopping = True
            for task in self._readers:
                task.cancel()
            await self._worker.close()
            await self._idle_within(_FAREWELL_SECONDS, is_hurried)

    async def _idle_within(self, seconds: float, is_hurried: Callable[[], bool]) -> bool:
        until = time.monotonic() + seconds
        while self._num_in_flight or self._num_streams() or (self._worker is not None and self._worker.num_requests):
            if time.monotonic() >= until or is_hurried():
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True
