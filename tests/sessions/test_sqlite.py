"""The SQLite store across reopening, damage, crashes and full disks."""

import asyncio
import errno
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from titans_server.errors import StateCorrupted, StoreUnavailable, VersionConflict
from titans_server.sessions.sqlite import SqliteStore
from titans_server.sessions.store import SessionRecord, sha256

SESSION = SessionRecord(id="ses_1", model="tiny", fingerprint="f", created_at=1.5, updated_at=1.5)


def after(record: SessionRecord, state: bytes, write_id: str = "w") -> SessionRecord:
    version = record.version + 1
    return replace(record, version=version, state_sha256=sha256(state), write_id=f"{write_id}{version}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(path)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def record(store: SqliteStore) -> SessionRecord:
    """A session at version 1, with the state b"first"."""
    await store.create(SESSION)
    record = after(SESSION, b"first")
    await store.commit(record, b"first")
    return record


def blobs(path: Path) -> list[Path]:
    return sorted(path.with_name("sessions.db.states").iterdir())


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def contents(path: Path) -> dict[str, bytes]:
    return {blob.name: blob.read_bytes() for blob in blobs(path)}


async def test_a_new_store_object_sees_everything(store: SqliteStore, path: Path, record: SessionRecord) -> None:
    await store.close()
    again = SqliteStore(path)
    await again.open()
    assert await again.get(record.id) == record
    assert await again.load(record) == b"first"
    await again.close()


async def test_it_is_as_durable_as_sqlite_can_be(store: SqliteStore, path: Path) -> None:
    with sqlite3.connect(path) as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()
    database = store._database
    assert await store._run(lambda: database._db.execute("PRAGMA synchronous").fetchone()) == (2,)


async def test_only_the_current_state_is_kept(store: SqliteStore, path: Path, record: SessionRecord) -> None:
    await store.commit(after(record, b"second"), b"second")
    assert list(contents(path).values()) == [b"second"]
    with pytest.raises(VersionConflict):
        await store.commit(after(record, b"stale", "other"), b"stale")
    assert list(contents(path).values()) == [b"second"]
    await store.delete(record.id)
    assert not blobs(path)


@pytest.mark.parametrize("damage", [b"", b"firs", b"First", b"first!"])
async def test_an_altered_file_is_refused_and_left(
    store: SqliteStore, path: Path, record: SessionRecord, damage: bytes
) -> None:
    (blob,) = blobs(path)
    blob.write_bytes(damage)
    with pytest.raises(StateCorrupted, match="altered or torn"):
        await store.load(record)
    assert contents(path) == {blob.name: damage}
    assert await store.get(record.id) == record


async def test_a_missing_file_is_refused(store: SqliteStore, path: Path, record: SessionRecord) -> None:
    blobs(path)[0].unlink()
    with pytest.raises(StateCorrupted, match="missing"):
        await store.load(record)
    assert await store.get(record.id) == record


CRASH = """
import asyncio, os, sys
from pathlib import Path
from titans_server.sessions import sqlite
from titans_server.sessions.store import SessionRecord

async def main():
    store = sqlite.SqliteStore(Path(sys.argv[1]))
    await store.open()
    record = SessionRecord.from_json(sys.argv[2])
    sqlite._Database._point = lambda *_: os.kill(os.getpid(), 9)
    await store.commit(record, b"second")

asyncio.run(main())
"""


async def test_a_crash_between_state_and_pointer_leaves_the_old_version(
    store: SqliteStore, path: Path, record: SessionRecord
) -> None:
    second = after(record, b"second")
    command = [sys.executable, "-c", CRASH, str(path), second.to_json()]
    crashed = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=60)
    assert crashed.returncode == -signal.SIGKILL, crashed.stderr.decode()
    assert sorted(contents(path).values()) == [b"first", b"second"]
    assert await store.get(record.id) == record
    assert await store.load(record) == b"first"
    await store.commit(second, b"second")  # the client tries again
    assert await store.load(second) == b"second"


async def test_what_a_crash_left_is_swept_once_it_is_old(store: SqliteStore, path: Path, record: SessionRecord) -> None:
    await store.close()
    folder, (current,) = path.with_name("sessions.db.states"), blobs(path)
    two_hours_ago = time.time() - 7200
    for name in ("old-1-a.state", "old-1-b.state.partial", "notes.txt", "young-1-a.state", "young-1-b.state.partial"):
        (folder / name).write_bytes(b"?")
    for name in (current.name, "old-1-a.state", "old-1-b.state.partial", "notes.txt"):
        os.utime(folder / name, (two_hours_ago, two_hours_ago))
    await store.open()
    assert contents(path).keys() == {current.name, "notes.txt", "young-1-a.state", "young-1-b.state.partial"}
    assert await store.load(record) == b"first"


async def test_a_full_disk_is_unavailable_and_tears_nothing(
    store: SqliteStore, path: Path, record: SessionRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    second = after(record, b"second")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreUnavailable, match="No space left"):
            await store.commit(second, b"second")
    assert list(contents(path).values()) == [b"first"]
    assert await store.load(record) == b"first"
    await store.commit(second, b"second")
    assert await store.load(second) == b"second"


async def test_a_full_database_is_unavailable_and_tears_nothing(
    store: SqliteStore, path: Path, record: SessionRecord
) -> None:
    database = store._database

    def limit(pages: int) -> None:
        database._db.execute(f"PRAGMA max_page_count = {pages}")

    second = replace(after(record, b"second"), metadata={"long": "x" * 100_000})
    await store._run(limit, 1)
    with pytest.raises(StoreUnavailable, match="full"):
        await store.commit(second, b"second")
    assert list(contents(path).values()) == [b"first"]
    assert await store.load(record) == b"first"
    await store._run(limit, 1 << 20)
    await store.commit(second, b"second")
    assert await store.get(record.id) == second


async def test_a_path_that_cannot_be_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = SqliteStore(tmp_path / "file" / "sessions.db")
    with pytest.raises(StoreUnavailable):
        await store.open()


@pytest.fixture
def not_a_database(path: Path) -> Iterator[Path]:
    contents = b"something else entirely" * 100
    path.write_bytes(contents)
    yield path
    assert path.read_bytes() == contents


async def test_a_file_that_is_no_database_is_unavailable_and_left(not_a_database: Path) -> None:
    with pytest.raises(StoreUnavailable, match="not a database"):
        await SqliteStore(not_a_database).open()


async def test_a_newer_schema_is_refused(store: SqliteStore, path: Path) -> None:
    await store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreUnavailable, match="schema 99"):
        await store.open()


@pytest.mark.parametrize("session_id", ["../../escaped", "/tmp/escaped", "..", ".", "", "a\0b", "x" * 5000])
async def test_no_id_leaves_the_folder(store: SqliteStore, path: Path, session_id: str) -> None:
    session = replace(SESSION, id=session_id)
    await store.create(session)
    record = after(session, b"state")
    await store.commit(record, b"state")
    assert await store.load(record) == b"state"
    assert [blob.read_bytes() for blob in blobs(path)] == [b"state"]
    assert names_in(path.parent) <= {"sessions.db", "sessions.db-wal", "sessions.db-shm", "sessions.db.states"}


async def test_a_closed_store_is_unavailable(path: Path) -> None:
    store = SqliteStore(path)
    with pytest.raises(StoreUnavailable):
        await store.ping()
    await store.open()
    await store.close()
    await store.close()
    with pytest.raises(StoreUnavailable):
        await store.ping()
