"""uvicorn, but for its end: it drains while it still listens, so that whoever asks is told so."""

import signal
import socket
import sys
from typing import Any

import uvicorn

from titans_server.lifecycle import Lifecycle

_CLOSE_SECONDS = 5  # for connections of clients that do not read


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
