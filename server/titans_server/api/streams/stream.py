"""One stream: the task that makes its events, and the reader that takes them."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from titans_server.api.streams.ring import Frame, Ring
from titans_server.errors import TitansError


class Stream:
    """Events made by a task of its own, which waits while a reader is there and is a whole ring behind.

    It does not wait for passing events to be taken: a client that sends all of its document before it reads how far
    that is learnt would wait for the task, and the task for it. The task ends with the events, with `stop`, or when the
    reader leaves a stream that is not to be resumed. A stream that is goes on without a reader, and then keeps the
    newest events. Lives on the event loop.
    """

    def __init__(
        self,
        frames: AsyncGenerator[Frame, None],
        farewell: Callable[[], Sequence[Frame]],
        *,
        owner: str,
        max_bytes: int,
        is_resumable: bool,
    ) -> None:
        """`farewell`: what a reader is told last where the stream is stopped."""
        self.id = f"str_{secrets.token_urlsafe(16)}"
        self.owner = owner  # the caller who may resume and stop it
        self.is_resumable = is_resumable
        self.ring = Ring(max_bytes)
        self.reader: Reader | None = Reader(self, 0)
        self.num_taken = 0  # the number of the last event that a reader has for sure
        self.news = asyncio.Event()  # set when a reader has something to look at
        self.room = asyncio.Event()  # set when the task has
        self._frames = frames
        self._farewell = farewell
        self._is_stopped = False
        self.task = asyncio.create_task(self._produce())
        self.task.add_done_callback(lambda _: self.news.set())

    @property
    def has_ended(self) -> bool:
        """Whether no more events come."""
        return self.task.done()

    def read(self, after: int) -> "Reader":
        """A reader that goes on after an event, in the place of the one before. Raises EventsLost, InvalidRequest."""
        self.ring.check(after)
        self.reader = Reader(self, after)
        self.num_taken = after
        self.news.set()  # the reader that was there has to leave
        self.room.set()
        return self.reader

    async def stop(self) -> None:
        """End it; return when its work has ended, too."""
        if self.has_ended:
            return
        self._is_stopped = True
        self.task.cancel()
        await asyncio.wait([self.task])

    def leave(self, reader: "Reader") -> None:
        """A reader has gone: if it was the stream's, a stream that cannot be resumed ends."""
        if self.reader is not reader:
            return
        self.reader = None
        self.room.set()
        if not self.is_resumable:
            self.task.cancel()

    async def _produce(self) -> None:
        try:
            async with aclosing(self._frames) as frames:
                async for frame in frames:
                    if self.ring.supersede(frame, self.num_taken + 1):  # the next one is maybe being sent
                        continue
                    await self._wait_for_reader()
                    self._append(frame)
        except asyncio.CancelledError:
            for frame in self._farewell() if self._is_stopped else ():
                self._append(frame, pushing=False)  # there may be a reader who is a ring behind; nobody waits any more
            raise

    async def _wait_for_reader(self) -> None:
        """Until the next event pushes none out that a reader has yet to take."""
        while self.reader is not None and self.reader.number < self.ring.last_to_go:
            self.room.clear()
            await self.room.wait()

    def _append(self, frame: Frame, *, pushing: bool = True) -> None:
        self.ring.append(frame, pushing=pushing)
        self.news.set()


class Reader:
    """Takes a stream's events from some point on. A stream has one: the newest."""

    def __init__(self, stream: Stream, after: int) -> None:
        self.stream = stream
        self.number = after  # of the last event that was taken
        self.told: TitansError | None = None  # the error that the stream ended with, once it was taken

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events, to the stream's end or until another reader takes over."""
        stream = self.stream
        while stream.reader is self:
            event = stream.ring.after(self.number)
            if event is not None:
                self.told = event.error or self.told
                yield event.wire
                self._took(event.id)
            elif stream.has_ended:
                return
            else:
                stream.news.clear()
                await stream.news.wait()

    def leave(self) -> None:
        """Take no more. Twice is as good as once."""
        self.stream.leave(self)

    def _took(self, number: int) -> None:
        self.number = number
        if self.stream.reader is self:
            self.stream.num_taken = number
            if not self.stream.is_resumable:
                self.stream.ring.forget(number)
            self.stream.room.set()
