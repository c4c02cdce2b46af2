"""Several processes share one SQLite file: each store object has its own connection and thread."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from support.records import logged, made, made_with_snapshot, moved, snapshot_of, with_snapshot
from titans_server.errors import StoreUnavailable, VersionConflict
from titans_server.sessions import sqlite
from titans_server.sessions.database import Database
from titans_server.sessions.record import SessionRecord
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


async def test_two_stores_share_one_file(store: SqliteStore, path: Path, record: SessionRecord) -> None:
    other = SqliteStore(path)
    await other.open()
    assert await snapshot_of(other, record) == b"first"
    commits = [await with_snapshot((store, other)[i % 2], record, f"{i}".encode()) for i in range(20)]
    results = await asyncio.gather(
        *((store, other)[i % 2].commit(commits[i]) for i in range(20)), return_exceptions=True
    )
    (winner,) = (i for i, result in enumerate(results) if result is None)
    assert [type(result) for result in results].count(VersionConflict) == 19
    for each in (store, other):
        assert await each.get(record.id) == commits[winner].record
        assert await snapshot_of(each, commits[winner].record) == f"{winner}".encode()
        assert await snapshot_of(each, record) is None
    await other.close()


async def test_a_new_file_may_be_opened_while_another_process_makes_it(path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store = SqliteStore(path)
    opening = asyncio.create_task(store.open())
    await asyncio.sleep(0.2)
    other.execute("ROLLBACK")
    other.close()
    await opening
    await made(store)
    await store.close()


async def test_many_stores_may_make_one_file_at_once(path: Path) -> None:
    stores = [SqliteStore(path) for _ in range(8)]
    await asyncio.gather(*(store.open() for store in stores))
    for store in stores:
        await store.ping()
        await store.close()


async def test_a_session_that_another_process_writes_to_amid_a_sweep_stays(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, database = time.time(), store._database
    expired = await made(store, updated_at=now - 50, ttl_seconds=49)
    commit, transaction = moved(expired, updated_at=now), database._transaction

    def after_another() -> AbstractContextManager[None]:
        other = Database(path)
        other.open()
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(time, "time", lambda: now - 10)  # its clock is behind
            other.commit(commit)
        other.close()
        return transaction()

    with monkeypatch.context() as during:
        during.setattr(database, "_transaction", after_another)
        await store.sweep()
    assert await store.get(expired.id) == commit.record


async def test_many_sessions_that_have_expired_keep_nobody_waiting(
    store: SqliteStore, path: Path, record: SessionRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_PAUSE", 3.0)  # so that what is asked for meanwhile is asked for in the first
    past = time.time() - 50
    expired = [await made(store, updated_at=past, ttl_seconds=49) for _ in range(60)]
    other = SqliteStore(path)
    await other.open()
    sweeping = asyncio.create_task(store.sweep())
    while len(await store._run(store._database.expired)) == len(expired):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    monkeypatch.setattr(sqlite, "_PAUSE", 0.0)
    assert await store.get(record.id) == record
    await made(other)
    assert not sweeping.done(), "some are left"
    await sweeping
    assert not await store._run(store._database.expired)
    await other.close()


async def test_a_database_that_another_process_holds_is_unavailable(
    store: SqliteStore, path: Path, record: SessionRecord
) -> None:
    database, second = store._database, logged(record, b"second")
    await store._run(lambda: database._db.execute("PRAGMA busy_timeout = 50"))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        await store.commit(second)
    assert await snapshot_of(store, record) == b"first"
    assert len(blobs(path)) == 1
    other.execute("ROLLBACK")
    other.close()
    await store.commit(second)
