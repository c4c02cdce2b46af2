"""The Redis store against a real server that is killed, starved and set up badly."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
from support.redis_server import RedisServer
from titans_server.errors import StateCorrupted, StoreUnavailable
from titans_server.sessions.redis import RedisStore
from titans_server.sessions.store import SessionRecord, sha256

SESSION = SessionRecord(id="ses_1", model="tiny", fingerprint="f", created_at=1.5, updated_at=1.5)
STATE = os.urandom(1 << 20)


def after(record: SessionRecord, state: bytes) -> SessionRecord:
    version = record.version + 1
    return replace(record, version=version, state_sha256=sha256(state), write_id=f"w{version}")


@pytest.fixture
def server(start_redis: Callable[[], RedisServer]) -> RedisServer:
    return start_redis()


@pytest.fixture
async def store(server: RedisServer) -> AsyncIterator[RedisStore]:
    store = RedisStore(server.url)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def record(store: RedisStore) -> SessionRecord:
    """A session at version 1, with the state STATE."""
    await store.create(SESSION)
    record = after(SESSION, STATE)
    await store.commit(record, STATE)
    return record


async def test_a_commit_survives_sigkill(server: RedisServer, store: RedisStore, record: SessionRecord) -> None:
    server.kill()
    server.start()
    assert await store.get(record.id) == record
    assert await store.load(record) == STATE
    await store.commit(record, STATE)  # repeated by a client that lost the answer


async def test_a_store_that_is_down_is_unavailable_until_it_is_back(
    server: RedisServer, store: RedisStore, record: SessionRecord
) -> None:
    server.kill()
    second = after(record, b"second")
    for attempt in (
        store.ping(),
        store.get(record.id),
        store.load(record),
        store.commit(second, b"second"),
        store.create(replace(SESSION, id="ses_2")),
        store.delete(record.id),
    ):
        with pytest.raises(StoreUnavailable, match="cannot be reached"):
            async with asyncio.timeout(20):
                await attempt
    server.start()
    assert await store.get(record.id) == record
    await store.commit(second, b"second")
    assert await store.load(second) == b"second"


async def test_a_store_that_is_down_cannot_be_opened(server: RedisServer) -> None:
    server.kill()
    store = RedisStore(server.url)
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        await store.open()
    await store.close()


async def test_a_full_memory_is_unavailable_and_leaves_the_old_version(
    server: RedisServer, store: RedisStore, record: SessionRecord
) -> None:
    server.command("CONFIG", "SET", "maxmemory", "1mb")
    second = after(record, b"second" * 100_000)
    with pytest.raises(StoreUnavailable, match="out of memory"):
        await store.commit(second, b"second" * 100_000)
    with pytest.raises(StoreUnavailable, match="out of memory"):
        await store.create(replace(SESSION, id="ses_2"))
    assert await store.get(record.id) == record
    assert await store.load(record) == STATE
    server.command("CONFIG", "SET", "maxmemory", "0")
    await store.commit(second, b"second" * 100_000)
    assert await store.get(record.id) == second


async def test_a_replica_is_unavailable_to_writers(server: RedisServer, store: RedisStore) -> None:
    server.command("CONFIG", "SET", "replica-serve-stale-data", "yes")
    server.command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(StoreUnavailable, match="replica"):
        await store.create(SESSION)


async def test_a_wrong_password_is_unavailable_and_not_repeated(server: RedisServer, store: RedisStore) -> None:
    server.command("ACL", "SETUSER", "ada", "on", ">right", "~*", "+@all")
    intruder = RedisStore(server.url.replace("redis://", "redis://ada:secret@"))
    with pytest.raises(StoreUnavailable, match="credentials") as error:
        await intruder.open()
    assert "secret" not in str(error.value)
    await intruder.close()


async def test_a_server_that_stops_answering_is_unavailable(
    server: RedisServer, store: RedisStore, record: SessionRecord
) -> None:
    slow = RedisStore(server.url + "?socket_timeout=0.1")
    server.command("CLIENT", "PAUSE", 3000, "ALL")
    with pytest.raises(StoreUnavailable, match="in time"):
        await slow.get(record.id)
    await asyncio.sleep(3)
    assert await slow.get(record.id) == record
    await slow.close()


@pytest.mark.parametrize("damage", [["SET", "titans:{ses_1}:state", "other"], ["DEL", "titans:{ses_1}:state"]])
async def test_an_altered_state_is_refused_and_left(
    server: RedisServer, store: RedisStore, record: SessionRecord, damage: list[str]
) -> None:
    server.command(*damage)
    left = server.command("GET", "titans:{ses_1}:state")
    with pytest.raises(StateCorrupted):
        await store.load(record)
    assert server.command("GET", "titans:{ses_1}:state") == left
    assert await store.get(record.id) == record


async def test_an_altered_record_is_refused(server: RedisServer, store: RedisStore, record: SessionRecord) -> None:
    server.command("HSET", "titans:{ses_1}:record", "record", "{}")
    with pytest.raises(StateCorrupted):
        await store.get(record.id)


async def test_both_keys_have_the_sessions_hash_tag_and_are_deleted(
    server: RedisServer, store: RedisStore, record: SessionRecord
) -> None:
    assert set(server.command("KEYS", "*")) == {b"titans:{ses_1}:record", b"titans:{ses_1}:state"}
    await store.delete(record.id)
    assert server.command("KEYS", "*") == []


async def test_a_good_server_is_opened_in_silence(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    store = RedisStore(server.url)
    await store.open()
    await store.close()
    assert not caplog.records


async def test_a_forgetful_server_is_warned_of(
    server: RedisServer, store: RedisStore, caplog: pytest.LogCaptureFixture
) -> None:
    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    server.command("CONFIG", "SET", "appendonly", "no")
    await store.check()
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "allkeys-lru" in caplog.text
    assert "aof_enabled 0" in caplog.text


async def test_a_server_that_cannot_be_checked_is_warned_of(
    server: RedisServer, store: RedisStore, caplog: pytest.LogCaptureFixture
) -> None:
    server.command("ACL", "SETUSER", "ada", "on", ">right", "~*", "+@all", "-info")
    guarded = RedisStore(server.url.replace("redis://", "redis://ada:right@"))
    await guarded.open()
    await guarded.close()
    assert "cannot check" in caplog.text
    assert "maxmemory_policy" in caplog.text
    assert "aof_enabled" in caplog.text


async def test_cancelled_callers_never_see_each_others_answers(store: RedisStore, record: SessionRecord) -> None:
    for turns in range(40):
        task = asyncio.create_task(store.load(record))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await store.get(record.id) == record
    assert await store.load(record) == STATE
