"""All the streams of a server: how many, how large, and how long they are kept."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from titans_server.api.streams.ring import Frame
from titans_server.api.streams.stream import Reader, Stream
from titans_server.errors import Overloaded, StreamNotFound
from titans_server.tenants.limiter import hold_place

_READ_AHEAD = 65_536  # bytes that are made before a reader who cannot come back has taken them


@dataclass(frozen=True)
class StreamLimits:
    """Bounds that an operator sets."""

    max_streams: int  # that can be resumed: under way, or kept after their end
    max_bytes: int  # of events, each
    keep_seconds: float  # after the end, and after each time that it is asked for
    ping_seconds: float  # between two comments on a quiet stream
    stall_seconds: float  # that a reader may leave what is sent to it lying


class Streams:
    """Streams by their id. Lives on the event loop; `close` ends what is left."""

    def __init__(self, limits: StreamLimits) -> None:
        self.limits = limits
        self._streams: dict[str, Stream] = {}  # the oldest first
        self._timers: dict[str, asyncio.TimerHandle] = {}  # of those that have ended

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def num_under_way(self) -> int:
        """Those that have not ended."""
        return sum(not stream.has_ended for stream in self._streams.values())

    def open(
        self,
        frames: AsyncGenerator[Frame, None],
        farewell: Callable[[], Sequence[Frame]],
        *,
        owner: str,
        resumable: bool,
    ) -> Reader:
        """A new stream's reader. Raises Overloaded where no more can be kept.

        To its end it is one of its caller's requests at once, also where nobody reads it.
        """
        if resumable:
            self._make_room()
        max_bytes = self.limits.max_bytes if resumable else min(_READ_AHEAD, self.limits.max_bytes)
        stream = Stream(frames, farewell, owner=owner, max_bytes=max_bytes, is_resumable=resumable)
        self._streams[stream.id] = stream
        let_go = hold_place()
        stream.task.add_done_callback(lambda _: let_go())
        stream.task.add_done_callback(lambda _: self._has_ended(stream))
        assert stream.reader is not None
        return stream.reader

    def resume(self, stream_id: str, owner: str, after: int) -> Reader | None:
        """A reader of what follows an event; None where it has ended there.

        Raises StreamNotFound, also of a stream that nobody asked to resume; EventsLost, InvalidRequest.
        """
        stream = self._find(stream_id, owner)
        if not stream.is_resumable:
            raise StreamNotFound(f"the stream {stream_id!r} cannot be resumed: its request did not ask for that")
        if stream.has_ended:
            self._keep(stream)
            if after == stream.ring.last:
                return None
        return stream.read(after)

    async def stop(self, stream_id: str, owner: str) -> None:
        """End a stream, or forget one that has ended. Raises StreamNotFound."""
        stream = self._find(stream_id, owner)
        if stream.has_ended:
            self._forget(stream)
        else:
            await stream.stop()

    async def drop(self, stream: Stream) -> None:
        """End a stream that nobody has heard of, and forget it."""
        await stream.stop()
        self._forget(stream)

    async def close(self) -> None:
        """End all streams and forget them."""
        tasks = [stream.task for stream in self._streams.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in list(self._streams.values()):
            self._forget(stream)

    def _find(self, stream_id: str, owner: str) -> Stream:
        stream = self._streams.get(stream_id)
        if stream is None or stream.owner != owner:
            raise StreamNotFound(f"there is no stream {stream_id!r}")
        return stream

    def _make_room(self) -> None:
        kept = [stream for stream in self._streams.values() if stream.is_resumable]
        if len(kept) < self.limits.max_streams:
            return
        oldest = next((stream for stream in kept if stream.has_ended), None)
        if oldest is None:
            raise Overloaded(f"{len(kept)} streams that can be resumed are under way already")
        self._forget(oldest)

    def _has_ended(self, stream: Stream) -> None:
        if stream.is_resumable:
            self._keep(stream)
        else:
            self._forget(stream)

    def _keep(self, stream: Stream) -> None:
        """For a while, from now on."""
        if stream.id in self._timers:
            self._timers[stream.id].cancel()
        loop = asyncio.get_running_loop()
        self._timers[stream.id] = loop.call_later(self.limits.keep_seconds, self._forget, stream)

    def _forget(self, stream: Stream) -> None:
        self._streams.pop(stream.id, None)
        timer = self._timers.pop(stream.id, None)
        if timer is not None:
            timer.cancel()
