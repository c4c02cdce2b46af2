"""Several processes share one SQLite file: each store object has its own connection and thread."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from titans_server.errors import StoreUnavailable, VersionConflict
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


async def test_two_stores_share_one_file(store: SqliteStore, path: Path, record: SessionRecord) -> None:
    other = SqliteStore(path)
    await other.open()
    assert await other.load(record) == b"first"
    records = [after(record, f"{i}".encode(), f"w{i}-") for i in range(20)]
    results = await asyncio.gather(
        *((store, other)[i % 2].commit(records[i], f"{i}".encode()) for i in range(20)), return_exceptions=True
    )
    (winner,) = (i for i, result in enumerate(results) if result is None)
    assert [type(result) for result in results].count(VersionConflict) == 19
    for each in (store, other):
        assert await each.get(record.id) == records[winner]
        assert await each.load(records[winner]) == f"{winner}".encode()
        with pytest.raises(VersionConflict):
            await each.load(record)
    assert len(blobs(path)) == 1
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
    await store.create(SESSION)
    await store.close()


async def test_many_stores_may_make_one_file_at_once(path: Path) -> None:
    stores = [SqliteStore(path) for _ in range(8)]
    await asyncio.gather(*(store.open() for store in stores))
    for store in stores:
        await store.ping()
        await store.close()


async def test_a_state_taken_away_by_another_process_is_a_conflict(
    store: SqliteStore, path: Path, record: SessionRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SqliteStore(path)
    await other.open()
    find, second = store._database._current_blob, after(record, b"second")

    def overtaken(wanted: SessionRecord) -> str:
        name = find(wanted)
        monkeypatch.setattr(store._database, "_current_blob", find)
        other._database._blobs.remove(name)
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE sessions SET version = 2, write_id = ?", (second.write_id,))
        connection.close()
        return name

    monkeypatch.setattr(store._database, "_current_blob", overtaken)
    with pytest.raises(VersionConflict):
        await store.load(record)
    await other.close()


async def test_a_database_that_another_process_holds_is_unavailable(
    store: SqliteStore, path: Path, record: SessionRecord
) -> None:
    database, second = store._database, after(record, b"second")
    await store._run(lambda: database._db.execute("PRAGMA busy_timeout = 50"))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        await store.commit(second, b"second")
    assert await store.load(record) == b"first"
    assert len(blobs(path)) == 1
    other.execute("ROLLBACK")
    other.close()
    await store.commit(second, b"second")
