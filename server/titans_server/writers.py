"""One writer a session at a time, in this process. Several servers are kept apart by their commits, not by this."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from titans_server.errors import SessionBusy


@dataclass
class _Writer:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_users: int = 0
    num_clients: int = 0  # among them, who were let in under the bound


class Writers:
    """Locks by session, first come, first served. Lives on the event loop."""

    def __init__(self, max_waiting: int = 0) -> None:
        """`max_waiting`: turns that are waited for under the bound, of each session."""
        self._max_waiting = max_waiting
        self._writers: dict[str, _Writer] = {}

    def is_free(self, session_id: str) -> bool:
        """Whether nobody is the session's writer, or waits to be."""
        return session_id not in self._writers

    @asynccontextmanager
    async def turn(self, session_id: str, *, bounded: bool = True) -> AsyncIterator[None]:
        """Be the session's writer. Raises SessionBusy where too many wait already; never, unless `bounded`."""
        writer = self._writers.setdefault(session_id, _Writer())
        if bounded and writer.num_clients > self._max_waiting:
            raise SessionBusy(f"{writer.num_clients} writers hold or wait for session {session_id}")
        writer.num_users += 1
        writer.num_clients += bounded
        try:
            async with writer.lock:
                yield
        finally:
            writer.num_users -= 1
            writer.num_clients -= bounded
            if not writer.num_users:
                del self._writers[session_id]
