"""uvicorn, but for its end, for slow clients, and for what it says of a start that fails.

It drains while it still listens, so that whoever asks is told so; a connection has to make a request, and to take what
is sent to it.
"""

import asyncio
import errno
import fcntl
import logging
import math
import signal
import socket
import sys
import termios
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from titans_server.lifecycle import CannotStart, Lifecycle

log = logging.getLogger(__name__)

_CLOSE_SECONDS = 5  # for connections of clients that do not read
_IDLE_SECONDS = 75  # longer than clients and proxies keep one: who closes it first may be sent a request that is lost
HEAD_SECONDS = 30.0
_USED_UP = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}  # after which asyncio waits a second


class SaysWhy:
    """An app of which uvicorn logs why it cannot start, where its operator can mend that, with no traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""

        async def tell(message: Message) -> None:
            reason = sys.exception()  # that starlette is handling, which has made its traceback the message
            if message["type"] == "lifespan.startup.failed" and isinstance(reason, CannotStart):
                message = {**message, "message": str(reason)}
            await send(message)

        await self._app(scope, receive, tell if scope["type"] == "lifespan" else send)


class PunctualProtocol(H11Protocol):
    """Closes a connection where no head of a request has come HEAD_SECONDS after its first byte, or from the start.

    And cuts one off whose request has been sent, and where nothing of what waits to be sent was taken in the app's
    `stall_seconds`: one that is closed would else wait for good. How long a body may take is for the app to say; how
    long a connection is kept between requests, for uvicorn.
    """

    _timer: asyncio.TimerHandle | None = None  # runs while a head is waited for
    _watch: asyncio.TimerHandle | None = None  # runs while something waits to be sent

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that any byte that waits pauses whoever writes
        self._timer = self.loop.call_later(HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._stop_timer()
        self._stop_watch()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        self._watch_the_rest()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        super().resume_writing()
        self._stop_watch()

    def _watch_the_rest(self) -> None:
        num_left = None if self._still_asks() else self._num_left()
        self._watch = self.loop.call_later(self.app_state["stall_seconds"], self._cut_off_unless_fewer, num_left)

    def _cut_off_unless_fewer(self, num_left: int | None) -> None:
        if num_left is None or self._still_asks() or self._num_left() < num_left:
            self._watch_the_rest()
        else:
            self.transport.abort()

    def _num_left(self) -> int:
        """Bytes that the client has yet to take: the kernel holds megabytes, and takes more only in large steps."""
        held = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return self.transport.get_write_buffer_size() + int.from_bytes(held, sys.byteorder)

    def _still_asks(self) -> bool:
        """Whether the client has yet to send the end of a body that is being read, and may read after that."""
        cycle = self.cycle
        is_answered = cycle is None or cycle.response_complete or self.transport.is_closing()
        return not is_answered and cycle.more_body and cycle.scope["method"] in {"POST", "PUT"}

    def _stop_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Unhandled:
    """What an event loop cannot hand to anybody goes to the log, as it would without this.

    But that no connection can be accepted is said once a second: asyncio says it, with a traceback, for each that might
    wait, which is two thousand times, and gets to nothing else meanwhile.
    """

    def __init__(self) -> None:
        self._told_at = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """See asyncio.loop.set_exception_handler."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in _USED_UP and "socket" in context):
            loop.default_exception_handler(context)
        elif loop.time() - self._told_at >= 1.0:
            self._told_at = loop.time()
            log.error("no connection can be accepted: %s", error)


class DrainingServer(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, or until the model cannot be loaded; a second SIGINT ends it at once."""

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle[Any], drain_seconds: float) -> None:
        config.timeout_graceful_shutdown = _CLOSE_SECONDS
        config.timeout_keep_alive = _IDLE_SECONDS
        super().__init__(config)
        self._lifecycle = lifecycle
        self._drain_seconds = drain_seconds

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve. Returns, or raises SystemExit(0) after SIGTERM: being asked to end is no failure."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again at its end
        try:
            super().run(sockets)
        except SystemExit as end:
            if end.code == 0:
                raise  # the others are uvicorn's, for a start that failed: `started` tells of these

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        asyncio.get_running_loop().set_exception_handler(Unhandled())
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        return await super().on_tick(counter) or self._lifecycle.has_failed

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close."""
        await self._lifecycle.drain(self._drain_seconds, lambda: self.force_exit)
        await super().shutdown(sockets)
