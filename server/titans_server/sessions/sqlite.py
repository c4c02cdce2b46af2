"""Sessions in a SQLite database, their snapshots as files beside it. The default; several processes may share it.

A snapshot is durable before the transaction that points at it: a crash between the two leaves a file that nothing
points at, which is swept away later. All of it runs on one thread that the store owns.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from titans_server.errors import StoreUnavailable
from titans_server.sessions.database import Database
from titans_server.sessions.record import SessionRecord
from titans_server.sessions.store import Commit, Usage
from titans_server.sessions.uncancelled import Uncancelled

_TOGETHER = 20  # expired sessions that are deleted in one transaction
_PAUSE = 0.15  # seconds between two of these: whoever waits for SQLite's lock looks every tenth of a second

P = ParamSpec("P")
T = TypeVar("T")


class SqliteStore:
    """Durable when a method returns, power failures included (WAL, synchronous=FULL, files fsynced)."""

    name = "sqlite"

    def __init__(self, path: Path) -> None:
        self._database = Database(path.absolute())
        self._worker: ThreadPoolExecutor | None = None  # from open to close; the only thread in _database
        self._uncancelled = Uncancelled()

    async def open(self) -> None:
        """Make the file, its folders and its tables if need be; read what an older server wrote."""
        assert self._worker is None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="titans-sqlite")
        try:
            await self._run(self._database.open)
        except BaseException:
            await self.close()
            raise

    async def create(self, commit: Commit) -> None:
        """Keep a new session."""
        await self._run(self._database.create, commit)

    async def get(self, session_id: str) -> SessionRecord:
        """The record as of the last commit."""
        return await self._run(self._database.get, session_id)

    async def commit(self, commit: Commit) -> None:
        """Move a session on by one revision."""
        await self._run(self._database.commit, commit)

    async def read_log(self, session_id: str, numbers: Sequence[int]) -> Sequence[bytes | None]:
        """Log entries by number."""
        return await self._run(self._database.read_log, session_id, numbers)

    async def write_blob(self, session_id: str, data: bytes) -> str:
        """Keep a blob as a file."""
        return await self._run(self._database.blobs.write, session_id, data)

    async def read_blob(self, name: str) -> bytes | None:
        """A blob."""
        return await self._run(self._database.blobs.read, name)

    async def delete(self, session_id: str, write_id: str | None = None) -> None:
        """Forget a session and all that is its alone."""
        await self._run(self._database.delete, session_id, write_id)

    async def is_listed(self, session_id: str, owner: str) -> bool:
        """Whether a session is the owner's, by the row that holds its record."""
        return await self._run(self._database.is_listed, session_id, owner)

    async def list(self, owner: str, limit: int, after: str | None = None) -> Sequence[SessionRecord]:
        """An owner's sessions, newest first."""
        return await self._run(self._database.list, owner, limit, after)

    async def usage(self, owner: str) -> Usage:
        """What the owner's sessions take."""
        return await self._run(self._database.usage, owner)

    async def due(self) -> Sequence[str]:
        """Sessions with an accepted document that nobody works on."""
        return await self._run(self._database.due)

    async def sweep(self) -> None:
        """Delete what has expired and what crashes left behind.

        A few sessions at a time: nobody else writes meanwhile, and what this process asks for waits.
        """
        expired = await self._run(self._database.expired)
        for start in range(0, len(expired), _TOGETHER):
            await self._run(self._database.delete_expired, expired[start : start + _TOGETHER])
            await asyncio.sleep(_PAUSE)
        await self._run(self._database.delete_orphans)

    async def ping(self) -> None:
        """Read from the database."""
        await self._run(self._database.ping)

    async def close(self) -> None:
        """Finish what has begun, then close the database and end the thread. May be called again."""
        await self._uncancelled.drain()
        if self._worker is not None:
            await self._run(self._database.close)
            self._worker.shutdown(wait=False)
            self._worker = None

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._uncancelled(self._on_worker(work, *args, **kwargs))

    async def _on_worker(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._worker is None:
            raise StoreUnavailable("the SQLite store is closed")
        try:
            return await asyncio.wrap_future(self._worker.submit(work, *args, **kwargs))
        except sqlite3.Error as error:
            raise StoreUnavailable(f"the SQLite store failed: {error}") from error
        except OSError as error:
            raise StoreUnavailable(f"the SQLite store cannot use its files: {error.strerror}") from error
