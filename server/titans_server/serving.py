"""uvicorn, but for its end and for slow clients.

It drains while it still listens, so that whoever asks is told so; and a connection has to make a request.
"""

import asyncio
import signal
import socket
import sys
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from titans_server.lifecycle import Lifecycle

_CLOSE_SECONDS = 5  # for connections of clients that do not read
HEAD_SECONDS = 30.0


class PunctualProtocol(H11Protocol):
    """Closes a connection where no head of a request has come HEAD_SECONDS after its first byte, or from the start.

    How long a body may take is for the app to say; how long a connection is kept between requests, for uvicorn.
    """

    _timer: asyncio.TimerHandle | None = None  # runs while a head is waited for

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
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
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class DrainingServer(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, or until the model cannot be loaded; a second SIGINT ends it at once."""

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle[Any], drain_seconds: float) -> None:
        config.timeout_graceful_shutdown = _CLOSE_SECONDS
        super().__init__(config)
        self._lifecycle = lifecycle
        self._drain_seconds = drain_seconds

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve. Returns, or raises SystemExit(0) after SIGTERM: being asked to end is no failure."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again at its end
        super().run(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        return await super().on_tick(counter) or self._lifecycle.has_failed

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close."""
        await self._lifecycle.drain(self._drain_seconds, lambda: self.force_exit)
        await super().shutdown(sockets)
