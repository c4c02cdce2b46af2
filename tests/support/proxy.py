"""A proxy on loopback that lets connections go wrong: late, cut, silent, truncated, without their answers.

It stands between a client and a server that speak by turns, as HTTP and Redis do, and knows neither.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

_PIECE = 1 << 20  # bytes read at once


@dataclass(frozen=True)
class Fault:
    """What befalls connections, from a certain piece of data on. Without arguments nothing does.

    Limits are bytes that still go on, that piece included; None is all of them. What follows a limit that is
    reached is the end of the connection, both ways, or silence, both ways.
    """

    when: bytes = b""  # begins with a piece, request or reply, that has this in it; with any request where empty
    skip: int = 0  # such pieces let pass first, over all connections
    times: int | None = None  # connections that it befalls; None: all
    delay: float = 0.0  # seconds by which each piece is late, either way
    request_bytes: int | None = None
    reply_bytes: int | None = None
    then: Literal["cut", "silence"] = "cut"
    at_request: Callable[[], object] | None = None  # called before the request goes on; in the proxy's thread
    at_reply: Callable[[], object] | None = None  # called before the reply goes back


CUT = Fault(request_bytes=0)  # before the request arrives
HALF_OPEN = Fault(request_bytes=0, then="silence")  # the connection is there, and nothing comes of it
SWALLOWED = Fault(reply_bytes=0)  # the request is carried out; its answer never comes
SWALLOWED_SILENTLY = Fault(reply_bytes=0, then="silence")


class FaultProxy:
    """Listens on `port` while the context is entered, and passes on to `target`, a port of this machine.

    Its event loop has a thread of its own, which ends with the context.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.requests: list[bytes] = []  # how each piece of a request began
        self._fault = Fault()
        self._num_matched = 0
        self._num_befallen = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._connections: dict[asyncio.Task[None], _Connection] = {}  # by who serves them
        self._server: asyncio.Server | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(30)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    @contextmanager
    def fault(self, fault: Fault) -> Iterator[None]:
        """Within the context this goes wrong; a connection that it has limited stays so to its end."""
        self._set(fault)
        try:
            yield
        finally:
            self._set(Fault())

    def cut_all(self) -> None:
        """Break every connection there is."""

        async def abort() -> None:
            for connection in self._connections.values():
                connection.abort()

        asyncio.run_coroutine_threadsafe(abort(), self._loop).result(30)

    @property
    def num_befallen(self) -> int:
        """The connections that the last fault has befallen."""
        return self._num_befallen

    def is_over(self, fault: Fault) -> bool:
        """Whether a fault that befell a connection has ended since."""
        return fault is not self._fault

    def begins_with(self, piece: bytes, *, is_reply: bool) -> Fault | None:
        """The fault, where it begins with this piece of a connection that was well so far."""
        fault = self._fault
        if fault == Fault() or fault.when not in piece or (is_reply and not fault.when):
            return None
        self._num_matched += 1
        if self._num_matched <= fault.skip or self._num_befallen == fault.times:
            return None
        self._num_befallen += 1
        return fault

    def _set(self, fault: Fault) -> None:
        async def change() -> None:
            self._fault, self._num_matched, self._num_befallen = fault, 0, 0

        asyncio.run_coroutine_threadsafe(change(), self._loop).result(30)

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        for connection in self._connections.values():
            connection.abort()
        await asyncio.gather(*self._connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        serving = asyncio.current_task()
        assert serving is not None
        connection = self._connections[serving] = _Connection(self, (reader, writer), upstream)
        try:
            await connection.run()
        finally:
            del self._connections[serving]


_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Connection:
    """One client's connection and the one that was made for it, until either ends."""

    def __init__(self, proxy: FaultProxy, client: _Stream, server: _Stream) -> None:
        self._proxy = proxy
        self._client, self._server = client, server
        self._fault: Fault | None = None
        self._request_left: int | None = None
        self._reply_left: int | None = None
        self._is_silent = False

    async def run(self) -> None:
        pumps = [asyncio.ensure_future(self._pump_requests()), asyncio.ensure_future(self._pump_replies())]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self.abort()

    def abort(self) -> None:
        for _, writer in (self._client, self._server):
            writer.transport.abort()

    async def _pump_requests(self) -> None:
        while piece := await _read(self._client[0]):
            self._proxy.requests.append(piece[:200])
            self._befall(piece, is_reply=False)
            if self._fault is not None:
                await _suffer(self._fault.delay, self._fault.at_request)
            piece, self._request_left = _within(piece, self._request_left)
            if not await self._pass_on(piece, self._server[1], self._request_left):
                return

    async def _pump_replies(self) -> None:
        while piece := await _read(self._server[0]):
            self._befall(piece, is_reply=True)
            if self._fault is not None:
                await _suffer(self._fault.delay, self._fault.at_reply)
            piece, self._reply_left = _within(piece, self._reply_left)
            if not await self._pass_on(piece, self._client[1], self._reply_left):
                return

    def _befall(self, piece: bytes, *, is_reply: bool) -> None:
        is_limited = (self._request_left, self._reply_left) != (None, None)
        if self._fault is not None and self._proxy.is_over(self._fault) and not is_limited:
            self._fault = None
        if self._fault is None and (fault := self._proxy.begins_with(piece, is_reply=is_reply)):
            self._fault, self._request_left, self._reply_left = fault, fault.request_bytes, fault.reply_bytes

    async def _pass_on(self, piece: bytes, writer: asyncio.StreamWriter, left: int | None) -> bool:
        """Whether the connection goes on."""
        if self._is_silent:
            return True
        with contextlib.suppress(ConnectionError):
            writer.write(piece)
            await writer.drain()
        if left == 0:
            assert self._fault is not None
            self._is_silent = self._fault.then == "silence"
            return self._is_silent
        return True


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(_PIECE)
    except ConnectionError:
        return b""


async def _suffer(delay: float, call: Callable[[], object] | None) -> None:
    if call is not None:
        call()
    await asyncio.sleep(delay)


def _within(piece: bytes, left: int | None) -> tuple[bytes, int | None]:
    """What of a piece is within a limit, and what is left of the limit."""
    return (piece, None) if left is None else (piece[:left], left - len(piece[:left]))
