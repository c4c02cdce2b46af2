"""The SQLite store across reopening, damage, crashes and full disks."""

import asyncio
import errno
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support.records import logged, made, made_with_snapshot, moved, snapshot_of, with_snapshot
from titans_server.errors import StateCorrupted, StoreUnavailable
from titans_server.sessions.record import Draft, SessionRecord
from titans_server.sessions.sqlite import SqliteStore


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
    """A session at version 1, with the snapshot b"first"."""
    return await made_with_snapshot(store)


def blobs(path: Path) -> list[Path]:
    return sorted(path.with_name("sessions.db.states").iterdir())


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def contents(path: Path) -> dict[str, bytes]:
    return {blob.name: blob.read_bytes() for blob in blobs(path)}


async def test_folders_that_are_made_for_a_database_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = set[str](), os.fsync

    def seen(descriptor: int) -> None:
        synced.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    store = SqliteStore(tmp_path / "deep" / "er" / "sessions.db")
    await store.open()
    await store.close()
    assert synced >= {str(tmp_path), str(tmp_path / "deep"), str(tmp_path / "deep" / "er")}


async def test_a_new_store_object_sees_everything(store: SqliteStore, path: Path, record: SessionRecord) -> None:
    await store.close()
    again = SqliteStore(path)
    await again.open()
    assert await again.get(record.id) == record
    assert await snapshot_of(again, record) == b"first"
    await again.close()


async def test_it_is_as_durable_as_sqlite_can_be(store: SqliteStore, path: Path) -> None:
    with sqlite3.connect(path) as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()
    database = store._database
    assert await store._run(lambda: database._db.execute("PRAGMA synchronous").fetchone()) == (2,)


async def test_only_what_is_pointed_at_is_kept(store: SqliteStore, path: Path, record: SessionRecord) -> None:
    await store.commit(await with_snapshot(store, record, b"second"))
    assert list(contents(path).values()) == [b"second"]
    await store.delete(record.id)
    assert not blobs(path)


@pytest.mark.parametrize("text", ["{}", "", b"\xff{torn"])
async def test_a_record_that_cannot_be_read_is_refused_and_its_accepted_document_due(
    store: SqliteStore, path: Path, record: SessionRecord, text: str | bytes
) -> None:
    draft = Draft("ing_1", "gone", lease_until=0.0, created_at=0.0, accepted=True)
    await store.commit(moved(record, drafts=(draft,)))
    with sqlite3.connect(path) as other:
        other.execute("UPDATE sessions SET record = CAST(? AS TEXT)", (text,))
    other.close()
    with pytest.raises(StateCorrupted):
        await store.get(record.id)
    assert await store.due() == [record.id]
    assert list(await store.list("", 10)) == []
    await store.delete(record.id)
    assert await store.due() == []
    assert not blobs(path)


CRASH = """
import asyncio, os, pickle, sys
from pathlib import Path
from titans_server.sessions.database import Database
from titans_server.sessions.sqlite import SqliteStore

async def main():
    store = SqliteStore(Path(sys.argv[1]))
    await store.open()
    Database._write = lambda *_: os.kill(os.getpid(), 9)
    await store.commit(pickle.loads(sys.stdin.buffer.read()))

asyncio.run(main())
"""


async def test_a_crash_inside_a_commit_leaves_the_old_version(
    store: SqliteStore, path: Path, record: SessionRecord
) -> None:
    commit = await with_snapshot(store, record, b"second")
    command, given = [sys.executable, "-c", CRASH, str(path)], pickle.dumps(commit)
    crashed = await asyncio.to_thread(subprocess.run, command, input=given, capture_output=True, timeout=60)
    assert crashed.returncode == -signal.SIGKILL, crashed.stderr.decode()
    assert sorted(contents(path).values()) == [b"first", b"second"]
    assert await store.get(record.id) == record
    assert await snapshot_of(store, record) == b"first"
    await store.commit(commit)  # the client tries again
    assert await snapshot_of(store, commit.record) == b"second"
    assert list(contents(path).values()) == [b"second"]


async def test_what_a_crash_left_is_swept_once_it_is_old(store: SqliteStore, path: Path, record: SessionRecord) -> None:
    folder, (current,) = path.with_name("sessions.db.states"), blobs(path)
    two_hours_ago = time.time() - 7200
    for name in ("old-1-a.state", "old-1-b.state.partial", "notes.txt", "young-1-a.state", "young-1-b.state.partial"):
        (folder / name).write_bytes(b"?")
    for name in (current.name, "old-1-a.state", "old-1-b.state.partial", "notes.txt"):
        os.utime(folder / name, (two_hours_ago, two_hours_ago))
    await store.sweep()
    assert contents(path).keys() == {current.name, "notes.txt", "young-1-a.state", "young-1-b.state.partial"}
    assert await snapshot_of(store, record) == b"first"


async def test_a_full_disk_is_unavailable_and_tears_nothing(
    store: SqliteStore, path: Path, record: SessionRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreUnavailable, match="No space left"):
            await store.write_blob(record.id, b"second")
    assert list(contents(path).values()) == [b"first"]
    assert await snapshot_of(store, record) == b"first"
    commit = await with_snapshot(store, record, b"second")
    await store.commit(commit)
    assert await snapshot_of(store, commit.record) == b"second"


async def test_a_full_database_is_unavailable_and_tears_nothing(
    store: SqliteStore, path: Path, record: SessionRecord
) -> None:
    database = store._database

    def limit(pages: int) -> None:
        database._db.execute(f"PRAGMA max_page_count = {pages}")

    commit = logged(record, b"x" * 100_000)
    await store._run(limit, 1)
    with pytest.raises(StoreUnavailable, match="full"):
        await store.commit(commit)
    assert await store.get(record.id) == record
    assert await snapshot_of(store, record) == b"first"
    await store._run(limit, 1 << 20)
    await store.commit(commit)
    assert await store.get(record.id) == commit.record


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_database_that_is_taken_away_acknowledges_nothing_more(
    store: SqliteStore, path: Path, record: SessionRecord, replaced: bool
) -> None:
    path.parent.joinpath("aside").mkdir()
    for part in list(path.parent.glob("sessions.db*")):
        part.rename(path.parent / "aside" / part.name)
    if replaced:
        other = SqliteStore(path)
        await other.open()
        await other.close()
    for work in (lambda: store.commit(logged(record, b"lost")), lambda: made(store, id="ses_lost"), store.ping):
        with pytest.raises(StoreUnavailable, match="removed or replaced"):
            await work()


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
    session = await made(store, id=session_id)
    commit = await with_snapshot(store, session, b"state")
    await store.commit(commit)
    assert await snapshot_of(store, commit.record) == b"state"
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
