"""Sessions in a SQLite database, their states as files beside it. The default store; several processes may share it.

A state is durable before the transaction that points at it: a crash between the two leaves a file that nothing
points at, which a later start sweeps away. All of it runs on one thread that the store owns.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from titans_server.errors import StoreUnavailable
from titans_server.sessions.blobs import BlobFolder
from titans_server.sessions.store import SessionRecord, not_found, taken
from titans_server.sessions.uncancelled import Uncancelled

P = ParamSpec("P")
T = TypeVar("T")

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY,
    version INTEGER NOT NULL,
    write_id TEXT NOT NULL,
    record TEXT NOT NULL,
    blob TEXT
)
"""
_BUSY_SECONDS = 10.0  # another process's transactions take milliseconds: longer means that something is stuck
_ORPHAN_SECONDS = 3600.0  # a younger file may be another process's, about to be pointed at


class SqliteStore:
    """Durable when a method returns, power failures included (WAL, synchronous=FULL, files fsynced)."""

    name = "sqlite"

    def __init__(self, path: Path) -> None:
        self._database = _Database(path.absolute())
        self._worker: ThreadPoolExecutor | None = None  # from open to close; the only thread in _database
        self._uncancelled = Uncancelled()

    async def open(self) -> None:
        """Make the file, its folders and its table if need be; sweep what crashes left behind."""
        assert self._worker is None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="titans-sqlite")
        try:
            await self._run(self._database.open)
        except BaseException:
            await self.close()
            raise

    async def create(self, record: SessionRecord) -> None:
        """Keep a new session at version 0."""
        await self._run(self._database.create, record)

    async def get(self, session_id: str) -> SessionRecord:
        """The record as of the last commit."""
        return await self._run(self._database.get, session_id)

    async def load(self, record: SessionRecord) -> bytes:
        """The state that belongs to `record`."""
        return await self._run(self._database.load, record)

    async def commit(self, record: SessionRecord, state: bytes) -> None:
        """Move the session on by one version."""
        await self._run(self._database.commit, record, state)

    async def delete(self, session_id: str) -> None:
        """Forget a session and its state."""
        await self._run(self._database.delete, session_id)

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


class _Database:
    """The blocking half: one connection, used by one thread. Raises sqlite3.Error and OSError as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._blobs = BlobFolder(path.with_name(path.name + ".states"))
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        self._blobs.open()  # makes the database's folder, too
        self._connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)
        if self._switch_to_wal() != "wal":
            raise StoreUnavailable(f"the SQLite store needs a write-ahead log, which {self._path} cannot have")
        self._db.execute("PRAGMA synchronous=FULL")
        with self._transaction():
            self._migrate()
        self._sweep()

    def create(self, record: SessionRecord) -> None:
        assert record.version == 0
        insert = "INSERT OR IGNORE INTO sessions (id, version, write_id, record) VALUES (?, 0, ?, ?)"
        with self._transaction():
            self._db.execute(insert, (record.id, record.write_id, record.to_json()))
            if self.get(record.id) != record:
                raise taken(record.id)

    def get(self, session_id: str) -> SessionRecord:
        row = self._db.execute("SELECT record FROM sessions WHERE id = ?", (session_id,)).fetchone()
        if row is None:
            raise not_found(session_id)
        return SessionRecord.from_json(row[0])

    def load(self, record: SessionRecord) -> bytes:
        state = self._blobs.read(self._current_blob(record))
        if state is None:
            self._current_blob(record)  # raises where another process's commit took the file away meanwhile
        return record.check_state(state)

    def commit(self, record: SessionRecord, state: bytes) -> None:
        version, write_id, _ = self._find(record.id)
        if not record.needs_commit(version, write_id):
            return
        name = self._blobs.write(record.id, record.version, state)
        pointed = False
        try:
            with self._transaction():
                unused = self._point(record, name)
                pointed = True
        except BaseException:
            # Where COMMIT itself fails the file stays: after a crash the log may still turn out to hold it.
            if not pointed:
                self._blobs.remove(name)
            raise
        if unused:
            self._blobs.remove(unused)

    def delete(self, session_id: str) -> None:
        with self._transaction():
            _, _, blob = self._find(session_id)
            self._db.execute("DELETE FROM sessions WHERE id = ?", (session_id,))
        if blob:
            self._blobs.remove(blob)

    def ping(self) -> None:
        self._db.execute("SELECT 1 FROM sessions LIMIT 1").fetchone()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreUnavailable("the SQLite store is closed")
        return self._connection

    def _switch_to_wal(self) -> str:
        """The journal mode. A new file that other processes open too is busy at once, whatever the timeout says."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                return str(self._db.execute("PRAGMA journal_mode=WAL").fetchone()[0])
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def _migrate(self) -> None:
        (found,) = self._db.execute("PRAGMA user_version").fetchone()
        if found > _SCHEMA_VERSION:
            raise StoreUnavailable(f"the SQLite store has schema {found}; this server reads {_SCHEMA_VERSION}")
        self._db.execute(_SCHEMA)
        self._db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    def _sweep(self) -> None:
        old = self._blobs.older_than(_ORPHAN_SECONDS)
        rows = self._db.execute("SELECT blob FROM sessions WHERE blob IS NOT NULL")
        for name in old.difference(blob for (blob,) in rows):
            self._blobs.remove(name)

    def _find(self, session_id: str) -> tuple[int, str, str | None]:
        """Version, write id and the name of the state's file."""
        query = "SELECT version, write_id, blob FROM sessions WHERE id = ?"
        row: tuple[int, str, str | None] | None = self._db.execute(query, (session_id,)).fetchone()
        if row is None:
            raise not_found(session_id)
        return row

    def _current_blob(self, record: SessionRecord) -> str:
        version, write_id, blob = self._find(record.id)
        record.check_current(version, write_id)
        assert blob is not None
        return blob

    def _point(self, record: SessionRecord, name: str) -> str | None:
        """Move the session to `record` and the file `name`. Returns the name of the file that is not used now."""
        version, write_id, blob = self._find(record.id)
        if not record.needs_commit(version, write_id):
            return name
        update = "UPDATE sessions SET version = ?, write_id = ?, record = ?, blob = ? WHERE id = ?"
        self._db.execute(update, (record.version, record.write_id, record.to_json(), name, record.id))
        return blob

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
