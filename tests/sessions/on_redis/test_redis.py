"""The Redis store against a real server that is killed, starved and set up badly."""

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.proxy import SWALLOWED, FaultProxy
from support.records import STATE, a_session, logged, made, snapshot_of, with_snapshot
from support.redis_server import RedisServer, redis_cluster
from titans_server.errors import SessionNotFound, StateCorrupted, StoreUnavailable
from titans_server.sessions.record import SessionRecord
from titans_server.sessions.redis import RedisStore
from titans_server.sessions.store import Commit, Usage


async def test_a_commit_survives_sigkill(server: RedisServer, store: RedisStore, record: SessionRecord) -> None:
    commit = logged(record, b"tokens")
    await store.commit(commit)
    server.kill()
    server.start()
    assert await store.get(record.id) == commit.record
    assert await snapshot_of(store, record) == STATE
    assert list(await store.read_log(record.id, [0])) == [b"tokens"]
    await store.commit(commit)  # repeated by a client that lost the answer


async def test_a_primary_that_becomes_a_replica_is_left_for_the_one_that_its_name_means_now(
    start_redis: Callable[[], RedisServer],
) -> None:
    old, new = start_redis(), start_redis()
    with FaultProxy(old.port) as name:
        store = RedisStore(f"redis://127.0.0.1:{name.port}/0")
        await store.open()
        await asyncio.gather(*(made(store) for _ in range(20)))
        name.target = new.port  # for whoever connects from now on
        old.command("REPLICAOF", "127.0.0.1", new.port)
        with pytest.raises(StoreUnavailable, match="read-only"):
            await made(store)
        record = await made(store)
        assert await store.get(record.id) == record
        await store.close()


async def test_sentinels_have_a_password_of_their_own(tmp_path: Path) -> None:
    for name in ("watched", "sentinel"):
        (tmp_path / name).mkdir()
    config, watched = tmp_path / "sentinel.conf", RedisServer(tmp_path / "watched", requirepass="secret")
    monitored = f"sentinel monitor titans 127.0.0.1 {watched.port} 1\nsentinel auth-pass titans secret\n"
    config.write_text(monitored)
    sentinel = RedisServer(tmp_path / "sentinel", str(config), "--sentinel", requirepass="another")
    url = f"redis+sentinel://:secret@127.0.0.1:{sentinel.port}/titans/0?sentinel_password=another"
    store = RedisStore(url)
    try:
        watched.start()
        sentinel.start()
        await store.open()
        record = await made(store)
        assert await store.get(record.id) == record
    finally:
        await store.close()
        sentinel.kill()
        watched.kill()


async def test_a_store_that_is_down_is_unavailable_until_it_is_back(
    server: RedisServer, store: RedisStore, record: SessionRecord
) -> None:
    server.kill()
    second = logged(record, b"second")
    for attempt in (
        store.ping(),
        store.get(record.id),
        snapshot_of(store, record),
        store.read_log(record.id, [0]),
        store.write_blob(record.id, b"blob"),
        store.commit(second),
        store.create(Commit(a_session())),
        store.delete(record.id),
        store.list("", 10),
        store.due(),
    ):
        with pytest.raises(StoreUnavailable, match="cannot be reached"):
            async with asyncio.timeout(20):
                await attempt
    server.start()
    assert await store.get(record.id) == record
    await store.commit(second)
    assert list(await store.read_log(record.id, [0])) == [b"second"]


async def test_a_cluster_that_is_down_is_unavailable(tmp_path: Path) -> None:
    with redis_cluster(tmp_path, num_nodes=1) as url:
        store, late = RedisStore(url), RedisStore(url)
        await store.open()
        record = await made(store)
        os.kill((await store._client.info())["process_id"], signal.SIGKILL)
        for attempt in (
            store.ping(),
            store.get(record.id),
            store.commit(logged(record, b"tokens")),
            store.usage(""),
            store.due(),
            late.open(),
        ):
            with pytest.raises(StoreUnavailable, match="cannot be reached"):
                await attempt
        await store._settle(record, ())  # of a commit that is done
        await store.close()
        await late.close()


async def test_a_store_that_is_down_cannot_be_opened(server: RedisServer) -> None:
    server.kill()
    store = RedisStore(server.url)
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        await store.open()
    await store.close()


async def test_a_full_memory_is_unavailable_and_leaves_the_old_version(
    server: RedisServer, store: RedisStore, record: SessionRecord
) -> None:
    commit = await with_snapshot(store, record, b"second")
    server.command("CONFIG", "SET", "maxmemory", "1mb")
    for attempt in (
        store.commit(commit),
        store.commit(logged(record, b"tokens")),
        store.write_blob(record.id, b"third"),
        store.create(Commit(a_session())),
    ):
        with pytest.raises(StoreUnavailable, match="out of memory"):
            await attempt
    assert await store.get(record.id) == record
    assert await snapshot_of(store, record) == STATE
    server.command("CONFIG", "SET", "maxmemory", "0")
    await store.commit(commit)
    assert await snapshot_of(store, commit.record) == b"second"


@pytest.mark.parametrize("fault", ["full", "gone"])
async def test_a_commit_that_redis_has_done_is_done_whatever_happens_to_it_next(
    server: RedisServer, store: RedisStore, record: SessionRecord, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = store._write

    async def and_then(*args: object) -> object:
        written = await write(*args)  # type: ignore[arg-type]
        if fault == "full":
            server.command("CONFIG", "SET", "maxmemory", "1mb")
        else:
            server.kill()
        return written

    commit = await with_snapshot(store, record, b"second")
    with monkeypatch.context() as during:
        during.setattr(store, "_write", and_then)
        await store.commit(commit)
    if fault == "full":
        assert await snapshot_of(store, record) is None, "what the version before needed makes room"
        server.command("CONFIG", "SET", "maxmemory", "0")
    else:
        server.start()
    assert await store.get(record.id) == commit.record
    following = logged(commit.record, b"tokens", tokens=10)
    await store.commit(following)
    assert await store.usage("") == Usage(1, 6 + 40)


@pytest.mark.parametrize("what", ["another commit", "a deletion"])
async def test_an_index_that_is_written_late_is_as_the_session_is_by_then(
    server: RedisServer, store: RedisStore, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server's commit, or a deletion, comes between a commit and its index, and is indexed first."""
    record = await made(store, ttl_seconds=10**9)
    first = logged(record, b"tokens", tokens=10)
    second = logged(first.record, b"more", tokens=20)
    other, index = RedisStore(server.url), store._index

    async def after_others(indexed: SessionRecord) -> None:
        if indexed == first.record:
            await (other.commit(second) if what == "another commit" else other.delete(record.id))
        await index(indexed)

    with monkeypatch.context() as during:
        during.setattr(store, "_index", after_others)
        await store.commit(first)
    await other.close()
    if what == "another commit":
        assert await store.usage("") == Usage(1, 4 * 30)
    else:
        assert await store.usage("") == Usage(0, 0)
        assert server.command("KEYS", "*") == [b"titans:format"]


async def test_a_replica_is_unavailable_to_writers(server: RedisServer, store: RedisStore) -> None:
    server.command("CONFIG", "SET", "replica-serve-stale-data", "yes")
    server.command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(StoreUnavailable, match="replica"):
        await made(store)


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


async def test_an_altered_record_is_refused(server: RedisServer, store: RedisStore, record: SessionRecord) -> None:
    server.command("HSET", f"titans:{{{record.id}}}:session", "record", "{}")
    with pytest.raises(StateCorrupted):
        await store.get(record.id)


async def test_a_session_that_cannot_be_read_takes_with_it_what_is_its_alone(
    server: RedisServer, store: RedisStore, record: SessionRecord
) -> None:
    other = await made(store, owner="other")
    child, lonely = [await made(store, owner="own", versions=record.versions) for _ in range(2)]
    commit = await with_snapshot(store, lonely, b"own")
    await store.commit(commit)
    for session in (child, lonely):
        server.command("HSET", f"titans:{{{session.id}}}:session", "record", b"\xff{torn")
        assert session.id not in [x.id for x in await store.list("own", 10)]
        await store.delete(session.id)
        with pytest.raises(SessionNotFound):
            await store.delete(session.id)
        assert not await store.is_listed(session.id, "own")
        assert not server.command("KEYS", f"titans:{{{session.id}}}:*")
    assert await store.usage("own") == Usage(0, 0)
    assert [await store.get(x.id) for x in (other, record)] == [other, record]
    assert await snapshot_of(store, record) == STATE

    (uses,) = server.command("KEYS", f"titans:{{{record.id}}}:uses:*")
    await store.delete(record.id)
    assert await snapshot_of(store, record) == STATE, "the child may have pointed at it"
    server.command("HSET", uses, child.id, "0")  # for longer than an hour
    await store.sweep()
    assert await snapshot_of(store, record) is None


@pytest.mark.parametrize("is_torn", [False, True])
async def test_a_deletion_whose_reply_is_lost_is_done_and_leaves_nothing(
    server: RedisServer, store: RedisStore, record: SessionRecord, is_torn: bool
) -> None:
    if is_torn:
        server.command("HSET", f"titans:{{{record.id}}}:session", "record", "{")
    with FaultProxy(server.port) as proxy:
        cut_off = RedisStore(f"redis://127.0.0.1:{proxy.port}/0")
        with proxy.fault(replace(SWALLOWED, when=f"{{{record.id}}}:log".encode(), times=1)):
            await cut_off.delete(record.id)
            assert proxy.num_befallen == 1
        await cut_off.close()
    assert server.command("KEYS", "*") == [b"titans:format"]
    with pytest.raises(SessionNotFound):
        await store.delete(record.id)


async def test_cancelled_callers_never_see_each_others_answers(store: RedisStore, record: SessionRecord) -> None:
    for turns in range(40):
        task = asyncio.create_task(store.write_blob(record.id, STATE))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await store.get(record.id) == record
    assert await snapshot_of(store, record) == STATE
