"""What the first servers wrote is read: a database and its state, kept in this folder, and the same in Redis."""

import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.proxy import CUT, FaultProxy
from support.records import logged, snapshot_of
from support.redis_server import RedisServer
from titans.config import tiny
from titans.model import TitansModel
from titans_server.errors import StoreUnavailable
from titans_server.sessions.codec import decode, sha256
from titans_server.sessions.redis import RedisStore
from titans_server.sessions.sqlite import SqliteStore
from titans_server.sessions.store import SessionStore

KEPT = Path(__file__).parent / "format1"


async def assert_is_as_it_was(store: SessionStore) -> None:
    unread, record = await store.get("ses_unread"), await store.get("ses_old")
    assert (unread.version, unread.tokens_seen, unread.head.snapshot) == (0, 0, None)
    assert (record.version, record.tokens_seen, record.metadata) == (2, 321, {"naïve": "日本語"})
    assert (record.model, record.created_at, record.updated_at) == ("tiny", 1760000000.5, 1760000009.5)
    blob = await snapshot_of(store, record)
    assert blob is not None
    assert record.head.snapshot is not None
    assert sha256(blob) == record.head.snapshot.sha256
    state = decode(blob, fingerprint="of-then", like=TitansModel(tiny()).new_state())
    assert int(state.position) == record.head.snapshot.tokens == 321
    parts = state.parts()
    for i, name in enumerate(parts):
        if name != "position":
            expected = torch.arange(parts[name].numel()).reshape(parts[name].shape) / 64 + i
            assert torch.equal(parts[name], expected.to(parts[name].dtype)), name
    assert {x.id for x in await store.list("", 10)} == {"ses_old", "ses_unread"}
    for taken_over in (unread, record):
        await store.commit(logged(taken_over, b"tokens"))
    assert (await store.get("ses_old")).version == 3


async def test_a_database_of_format_1_is_taken_over(tmp_path: Path) -> None:
    shutil.copytree(KEPT, tmp_path, dirs_exist_ok=True)
    store = SqliteStore(tmp_path / "titans.db")
    await store.open()
    await assert_is_as_it_was(store)
    await store.close()
    await store.open()
    assert (await store.get("ses_old")).version == 3
    await store.delete("ses_old")
    await store.close()
    assert list((tmp_path / "titans.db.states").iterdir()) == []


@pytest.fixture
def server(start_redis: Callable[[], RedisServer]) -> RedisServer:
    """A Redis with what the first servers kept in it."""
    server = start_redis()
    with sqlite3.connect(KEPT / "titans.db") as kept:
        rows = kept.execute("SELECT id, version, write_id, record, blob FROM sessions").fetchall()
    kept.close()
    for name, version, write_id, record, blob in rows:
        fields = ("version", version, "write_id", write_id, "record", record)
        server.command("HSET", f"titans:{{{name}}}:record", *fields)
        if blob:
            server.command("SET", f"titans:{{{name}}}:state", (KEPT / "titans.db.states" / blob).read_bytes())
    return server


async def test_a_redis_of_format_1_is_taken_over(server: RedisServer) -> None:
    store = RedisStore(server.url)
    await store.open()
    await assert_is_as_it_was(store)
    await store.close()
    again = RedisStore(server.url)
    await again.open()
    assert (await again.get("ses_old")).version == 3
    for name in ("ses_old", "ses_unread"):
        await again.delete(name)
    await again.close()
    assert server.command("KEYS", "*") == [b"titans:format"]


async def test_a_takeover_that_broke_off_is_done_again(server: RedisServer) -> None:
    with FaultProxy(server.port) as proxy:
        cut_off = RedisStore(f"redis://127.0.0.1:{proxy.port}/0")
        with proxy.fault(replace(CUT, when=b"SET\r\n$13\r\ntitans:format")), pytest.raises(StoreUnavailable):
            await cut_off.open()
        await cut_off.close()
    assert not server.command("KEYS", "titans:{*}:record")
    store = RedisStore(server.url)
    await store.open()
    await assert_is_as_it_was(store)
    await store.close()


async def test_two_servers_may_take_over_at_once(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = RedisStore(server.url), RedisStore(server.url)
    scan = first._client.scan_iter

    async def and_then(**match: str) -> AsyncIterator[bytes]:
        keys = [key async for key in scan(**match)]
        await second.open()
        for key in keys:
            yield key

    monkeypatch.setattr(first._client, "scan_iter", and_then)
    await first.open()
    await assert_is_as_it_was(first)
    for store in (first, second):
        await store.close()
