"""The blocking half of the SQLite store: one connection, used by one thread."""

import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

from titans_server.errors import StateCorrupted, StoreUnavailable, VersionConflict
from titans_server.sessions.blobs import BlobFolder
from titans_server.sessions.record import SessionRecord, from_format_1, moved_on, not_found, swept, taken
from titans_server.sessions.store import Commit, Usage

_log = logging.getLogger(__name__)

_SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY,
    revision INTEGER NOT NULL,
    write_id TEXT NOT NULL,
    owner TEXT NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL,
    due_at REAL,
    stored_bytes INTEGER NOT NULL,
    record TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS sessions_of ON sessions (owner, created_at, id);
CREATE INDEX IF NOT EXISTS sessions_due ON sessions (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS sessions_expire ON sessions (expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS log (
    session TEXT NOT NULL,
    number INTEGER NOT NULL,
    tokens BLOB NOT NULL,
    PRIMARY KEY (session, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pointers (
    blob TEXT NOT NULL,
    session TEXT NOT NULL,
    PRIMARY KEY (blob, session)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS pointers_of ON pointers (session);
"""
_BUSY_SECONDS = 10.0  # another process's transactions take milliseconds: longer means that something is stuck
_ORPHAN_SECONDS = 3600.0  # a younger file may be another process's, about to be pointed at
_INSERT = (
    "INSERT OR IGNORE INTO sessions "
    "(id, owner, created_at, revision, write_id, expires_at, due_at, stored_bytes, record) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_RECORD = "CAST(record AS BLOB)"  # what is not UTF-8 is a record that cannot be read, not a database that fails
_FIELDS = "revision = ?, write_id = ?, expires_at = ?, due_at = ?, stored_bytes = ?, record = ?"


class Database:
    """What `SqliteStore` does, on its thread. Raises sqlite3.Error and OSError as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._opened: os.stat_result | None = None  # the file that the connection writes to
        self.blobs = BlobFolder(path.with_name(path.name + ".states"))

    def open(self) -> None:
        """See SessionStore."""
        self.blobs.open()  # makes the database's folder, too
        self._connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)
        if self._switch_to_wal() != "wal":
            raise StoreUnavailable(f"the SQLite store needs a write-ahead log, which {self._path} cannot have")
        self._db.execute("PRAGMA synchronous=FULL")
        self._opened = self._path.stat()
        with self._transaction():
            self._migrate()

    def create(self, commit: Commit) -> None:
        """See SessionStore."""
        record = commit.record
        with self._transaction():
            if not self._insert(record):
                if self.get(record.id) != record:
                    raise taken(record.id)
                return
            for name in record.snapshots():
                if not self._db.execute("SELECT 1 FROM pointers WHERE blob = ?", (name,)).fetchone():
                    raise VersionConflict(f"a snapshot for session {record.id} is there no more")
            self._write(commit)

    def get(self, session_id: str) -> SessionRecord:
        """See SessionStore."""
        query = f"SELECT {_RECORD} FROM sessions WHERE id = ? AND ifnull(expires_at > ?, 1)"
        row = self._db.execute(query, (session_id, time.time())).fetchone()
        if row is None:
            raise not_found(session_id)
        return SessionRecord.from_json(row[0], session_id)

    def commit(self, commit: Commit) -> None:
        """See SessionStore."""
        record = commit.record
        with self._transaction():
            query = "SELECT revision, write_id FROM sessions WHERE id = ? AND ifnull(expires_at > ?, 1)"
            row = self._db.execute(query, (record.id, time.time())).fetchone()
            if row is None:
                raise not_found(record.id)
            revision, write_id = row
            if not record.is_replaced_at(revision, write_id, commit.replaces):
                return
            if not all(map(self.blobs.has, commit.point)):
                raise swept(record.id)
            self._db.execute(f"UPDATE sessions SET {_FIELDS} WHERE id = ?", (*_fields(record), record.id))
            self._write(commit)
            unused = self._unpoint(record.id, commit.release)
        self._remove(unused)

    def read_log(self, session_id: str, numbers: Sequence[int]) -> Sequence[bytes | None]:
        """See SessionStore."""
        query = "SELECT tokens FROM log WHERE session = ? AND number = ?"
        rows = (self._db.execute(query, (session_id, number)).fetchone() for number in numbers)
        return [row and row[0] for row in rows]

    def delete(self, session_id: str, write_id: str | None) -> None:
        """See SessionStore."""
        with self._transaction():
            query = "SELECT write_id FROM sessions WHERE id = ? AND ifnull(expires_at > ?, 1)"
            row = self._db.execute(query, (session_id, time.time())).fetchone()
            if row is None:
                raise not_found(session_id)
            if write_id not in {None, row[0]}:
                raise moved_on(session_id)
            unused = self._delete(session_id)
        self._remove(unused)

    def is_listed(self, session_id: str, owner: str) -> bool:
        """See SessionStore."""
        query = "SELECT 1 FROM sessions WHERE id = ? AND owner = ? AND ifnull(expires_at > ?, 1)"
        return self._db.execute(query, (session_id, owner, time.time())).fetchone() is not None

    def list(self, owner: str, limit: int, after: str | None) -> Sequence[SessionRecord]:
        """See SessionStore."""
        query = f"SELECT id, {_RECORD} FROM sessions WHERE owner = ? AND ifnull(expires_at > ?, 1)"
        values: list[str | float] = [owner, time.time()]
        if after is not None:
            place = "SELECT created_at, id FROM sessions WHERE id = ? AND owner = ?"
            row = self._db.execute(place, (after, owner)).fetchone()
            if row is None:
                raise not_found(after)
            query += " AND (created_at, id) < (?, ?)"
            values += row
        with closing(self._db.execute(query + " ORDER BY created_at DESC, id DESC", values)) as rows:
            return list(islice(_readable(rows), limit))

    def usage(self, owner: str) -> Usage:
        """See SessionStore."""
        query = (
            "SELECT count(*), ifnull(sum(stored_bytes), 0) FROM sessions WHERE owner = ? AND ifnull(expires_at > ?, 1)"
        )
        return Usage(*self._db.execute(query, (owner, time.time())).fetchone())

    def due(self) -> Sequence[str]:
        """See SessionStore."""
        return [name for (name,) in self._db.execute("SELECT id FROM sessions WHERE due_at < ?", (time.time(),))]

    def expired(self) -> Sequence[str]:
        """The sessions that are gone, and not yet deleted."""
        return [name for (name,) in self._db.execute("SELECT id FROM sessions WHERE expires_at <= ?", (time.time(),))]

    def delete_expired(self, session_ids: Iterable[str]) -> None:
        """Delete those that are gone still: a commit may have come between, as its process's clock allowed."""
        query, unused = "SELECT 1 FROM sessions WHERE expires_at <= ? AND id = ?", set[str]()
        with self._transaction():
            for session_id in session_ids:
                if self._db.execute(query, (time.time(), session_id)).fetchone():
                    unused |= self._delete(session_id)
        self._remove(unused)

    def delete_orphans(self) -> None:
        """Delete the files that nothing points at."""
        old = self.blobs.older_than(_ORPHAN_SECONDS)
        with self._transaction():  # no commit may point at one meanwhile
            self._remove(old.difference(name for (name,) in self._db.execute("SELECT blob FROM pointers")))

    def ping(self) -> None:
        """See SessionStore."""
        self._check_place()
        self._db.execute("SELECT 1 FROM sessions LIMIT 1").fetchone()

    def close(self) -> None:
        """See SessionStore."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreUnavailable("the SQLite store is closed")
        return self._connection

    def _check_place(self) -> None:
        """SQLite goes on with a file that was removed: commits would succeed, and nobody would find them again."""
        assert self._opened is not None
        if not self._path.exists() or not os.path.samestat(self._path.stat(), self._opened):
            raise StoreUnavailable("the SQLite store was removed or replaced while the server runs: start it again")

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
        if found == 1:
            self._db.execute("ALTER TABLE sessions RENAME TO sessions_1")
        for statement in filter(str.strip, _SCHEMA.split(";")):
            self._db.execute(statement)
        if found == 1:
            for text, blob in self._db.execute("SELECT record, blob FROM sessions_1").fetchall():
                record = from_format_1(text, blob)
                self._insert(record)
                self._write(Commit(record))
            self._db.execute("DROP TABLE sessions_1")
        self._db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    def _insert(self, record: SessionRecord) -> bool:
        values = (record.id, record.owner, record.created_at, *_fields(record))
        return bool(self._db.execute(_INSERT, values).rowcount)

    def _write(self, commit: Commit) -> None:
        """What a record's commit brings: log entries and pointers to blobs; and the entries it leaves behind."""
        record = commit.record
        add = "INSERT INTO log (session, number, tokens) VALUES (?, ?, ?)"
        self._db.executemany(add, [(record.id, number, tokens) for number, tokens in commit.append.items()])
        drop = "DELETE FROM log WHERE session = ? AND number = ?"
        self._db.executemany(drop, [(record.id, number) for number in commit.drop])
        point = "INSERT OR IGNORE INTO pointers (blob, session) VALUES (?, ?)"
        self._db.executemany(point, [(name, record.id) for name in record.snapshots()])

    def _unpoint(self, session_id: str, names: Iterable[str]) -> set[str]:
        """Take pointers away. Returns the blobs that nothing points at now: remove them once this is committed."""
        unused = set()
        for name in names:
            self._db.execute("DELETE FROM pointers WHERE blob = ? AND session = ?", (name, session_id))
            if not self._db.execute("SELECT 1 FROM pointers WHERE blob = ?", (name,)).fetchone():
                unused.add(name)
        return unused

    def _delete(self, session_id: str) -> set[str]:
        names = self._db.execute("SELECT blob FROM pointers WHERE session = ?", (session_id,)).fetchall()
        for table, column in (("sessions", "id"), ("log", "session")):
            self._db.execute(f"DELETE FROM {table} WHERE {column} = ?", (session_id,))
        return self._unpoint(session_id, [name for (name,) in names])

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            self.blobs.remove(name)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._check_place()
            yield
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")


def _readable(rows: Iterable[tuple[str, bytes]]) -> Iterator[SessionRecord]:
    """The records of rows of id and record, one by one, but for those that cannot be read."""
    for session_id, text in rows:
        try:
            yield SessionRecord.from_json(text, session_id)
        except StateCorrupted as error:
            _log.warning("session %s is left out of a list: %s", session_id, error.message)


def _fields(record: SessionRecord) -> tuple[int, str, float | None, float | None, int, str]:
    """The values of `_FIELDS`."""
    fields = (record.revision, record.write_id, record.expires_at, record.due_at)
    return (*fields, record.stored_bytes, record.to_json())
