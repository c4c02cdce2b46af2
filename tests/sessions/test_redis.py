"""The Redis store against a real server that is killed, starved and set up badly."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.proxy import SWALLOWED, FaultProxy
from support.records import a_session, logged, made, made_with_snapshot, moved, snapshot_of, with_snapshot
from support.redis_server import RedisServer, redis_cluster
from titans_server.errors import SessionNotFound, StateCorrupted, StoreUnavailable, VersionConflict
from titans_server.sessions import redis_client
from titans_server.sessions.record import Draft, SessionRecord
from titans_server.sessions.redis import RedisStore
from titans_server.sessions.redis_layout import blob_keys
from titans_server.sessions.store import Commit, Usage

STATE = os.urandom(1 << 20)


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
    """A session at version 1, with the snapshot STATE."""
    return await made_with_snapshot(store, STATE)


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


async def test_a_record_that_cannot_be_read_keeps_no_other_session_from_being_due_or_swept(
    server: RedisServer, store: RedisStore
) -> None:
    draft = Draft("ing_1", "gone", lease_until=0.0, created_at=0.0, accepted=True)
    broken, whole = [await made(store, ttl_seconds=10**9) for _ in range(2)]
    for record in (broken, whole):
        await store.commit(moved(record, drafts=(draft,)))
    key = f"titans:{{{broken.id}}}:session"
    text = server.command("HGET", key, "record")
    server.command("HSET", key, "record", "{")
    assert set(await store.due()) == {broken.id, whole.id}

    for record in (broken, whole):
        server.command("ZADD", "titans:expires", 1, record.id)
    expired, expired_and_broken = [await made(store, ttl_seconds=1) for _ in range(2)]
    server.command("HSET", f"titans:{{{expired_and_broken.id}}}:session", "record", "{")
    with pytest.raises(SessionNotFound):
        await store.get(expired_and_broken.id)
    await store.sweep()
    for session in (expired, expired_and_broken):
        assert server.command("KEYS", f"titans:{{{session.id}}}:*") == []
    assert await store.usage("") == Usage(2, 0)
    server.command("HSET", key, "record", text)
    assert (await store.get(broken.id)).drafts == (draft,)


@pytest.mark.parametrize("is_torn", [False, True])
async def test_a_session_that_is_written_to_amid_a_sweep_stays(
    server: RedisServer, store: RedisStore, is_torn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a server whose clock is behind the sweeping one's."""
    now, read = time.time(), store._read
    expired = await made(store, updated_at=now - 50, ttl_seconds=49)
    commit = moved(expired, updated_at=now)
    if is_torn:
        server.command("HSET", f"titans:{{{expired.id}}}:session", "record", "{")

    async def and_then(session_id: str) -> tuple[bytes | None, float, bytes | None]:
        found = await read(session_id)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(time, "time", lambda: now - 10)
            await store.commit(commit)
        return found

    with monkeypatch.context() as during:
        during.setattr(store, "_read", and_then)
        await store.sweep()
    assert await store.get(expired.id) == commit.record


async def test_work_that_is_accepted_while_a_look_finds_none_is_due_later(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = Draft("ing_1", "gone", lease_until=1.0, created_at=0.0, accepted=True)
    accepted = moved(await made(store), drafts=(draft,))
    await store.commit(accepted)
    learnt = moved(accepted.record, drafts=())
    await store.commit(learnt)
    find = store._find

    async def and_then(session_id: str) -> SessionRecord | None:
        found = await find(session_id)
        await store.commit(moved(learnt.record, drafts=(replace(draft, lease_until=time.time() + 0.3),)))
        return found

    with monkeypatch.context() as during:
        during.setattr(store, "_find", and_then)
        assert await store.due() == []
    await asyncio.sleep(0.4)
    assert await store.due() == [accepted.record.id]


async def test_all_of_a_sessions_keys_have_its_hash_tag_and_are_deleted(
    server: RedisServer, store: RedisStore, record: SessionRecord
) -> None:
    await store.commit(logged(record, b"tokens"))
    assert {key.split(b":")[2] for key in server.command("KEYS", f"titans:{{{record.id}}}:*")} == {
        b"session",
        b"log",
        b"blob",
        b"uses",
    }
    await store.delete(record.id)
    assert server.command("KEYS", "*") == [b"titans:format"]


async def test_a_crash_leaves_a_blob_that_is_swept_once_it_is_old(
    server: RedisServer, store: RedisStore, record: SessionRecord
) -> None:
    orphan = await store.write_blob(record.id, b"nobody points at this")
    child = await made(store, versions=record.versions)
    await store.sweep()
    assert await store.read_blob(orphan) == b"nobody points at this"
    for key in server.command("KEYS", "titans:*:uses:*"):
        for session in server.command("HKEYS", key):
            server.command("HSET", key, session, "1.5")
        server.command("HSET", key, "ses_never_created", "1.5")
    await store.sweep()
    assert await store.read_blob(orphan) is None
    await store.delete(record.id)
    assert await snapshot_of(store, child) == STATE
    await store.delete(child.id)
    assert server.command("KEYS", "titans:{ses_*") == []


@pytest.mark.parametrize("how", ["commit", "fork"])
async def test_a_snapshot_that_is_pointed_at_amid_a_sweep_stays(
    server: RedisServer, store: RedisStore, record: SessionRecord, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a server whose clock is hours behind the sweeping one's."""
    commit, child, find = (
        await with_snapshot(store, record, b"second"),
        a_session(versions=record.versions),
        store._find,
    )
    wanted = commit.record if how == "commit" else child
    (blob,) = wanted.snapshots()
    uses = blob_keys(blob)[1]
    server.command("HSET", uses, wanted.id, "1.5")  # a fork has come as far as this

    async def and_then(session_id: str) -> SessionRecord | None:
        found = await find(session_id)
        if session_id == wanted.id:
            await (store.commit(commit) if how == "commit" else store.create(Commit(child)))
        return found

    with monkeypatch.context() as during:
        during.setattr(store, "_find", and_then)
        await store._sweep_blob(uses, time.time())
    if how == "fork":
        await store.delete(record.id)
    assert await store.get(wanted.id) == wanted
    assert await snapshot_of(store, wanted) == (b"second" if how == "commit" else STATE)


async def test_a_fork_whose_use_of_a_snapshot_was_swept_is_refused(
    server: RedisServer, store: RedisStore, record: SessionRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, write, (blob,) = a_session(versions=record.versions), store._write, record.snapshots()

    async def and_then(*args: object) -> object:
        written = await write(*args)  # type: ignore[arg-type]
        server.command("HDEL", blob_keys(blob)[1], child.id)
        return written

    with monkeypatch.context() as during:
        during.setattr(store, "_write", and_then)
        with pytest.raises(VersionConflict, match="no more"):
            await store.create(Commit(child))
    with pytest.raises(SessionNotFound):
        await store.get(child.id)
    assert await snapshot_of(store, record) == STATE


async def test_what_an_index_has_too_much_is_swept_once_it_is_old(
    server: RedisServer, store: RedisStore, record: SessionRecord
) -> None:
    server.command("DEL", f"titans:{{{record.id}}}:session", f"titans:{{{record.id}}}:log")
    assert (await store.usage("")).sessions == 1
    await store.sweep()
    assert (await store.usage("")).sessions == 0


async def test_a_good_server_is_opened_in_silence(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    store = RedisStore(server.url)
    await store.open()
    await store.close()
    assert not caplog.records


async def test_a_server_that_may_forget_is_warned_of(
    server: RedisServer, store: RedisStore, caplog: pytest.LogCaptureFixture
) -> None:
    server.command("CONFIG", "SET", "appendfsync", "everysec")
    await store.check()
    server.command("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
    server.command("CONFIG", "SET", "appendonly", "no")
    await store.check()
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    for text in ("appendfsync is everysec", "volatile-lru", "append-only file is off"):
        assert text in caplog.text


@pytest.mark.parametrize("num_nodes", [1, 2])
async def test_every_primary_of_a_cluster_is_checked(
    tmp_path: Path, num_nodes: int, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_cluster(tmp_path, num_nodes) as url:
        store = RedisStore(url)
        await store.open()
        assert not caplog.records
        primaries = store._client.get_primaries()
        assert len(primaries) == num_nodes
        for node in primaries:
            await store._client.config_set("appendfsync", "everysec", target_nodes=node)
            await store.check()
            assert caplog.text.count("appendfsync is everysec") == 1
            caplog.clear()
            await store._client.config_set("appendfsync", "always", target_nodes=node)
        await store.close()


async def test_a_server_that_evicts_sessions_is_refused(server: RedisServer, store: RedisStore) -> None:
    server.command("CONFIG", "SET", "maxmemory", "100mb")
    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    evicting = RedisStore(server.url)
    with pytest.raises(StoreUnavailable, match=r"allkeys-lru.*noeviction"):
        await evicting.open()
    await evicting.close()


@pytest.mark.parametrize("text", ["6.0.16", "5.0"])
def test_an_old_server_is_refused(text: str) -> None:
    with pytest.raises(StoreUnavailable, match=f"{text}.*needs 6.2"):
        redis_client._check_version(text)
    for fine in ("6.2.0", "7.0.15", "10.1", "", "unstable"):
        redis_client._check_version(fine)


async def test_a_server_that_cannot_be_checked_is_warned_of(
    server: RedisServer, store: RedisStore, caplog: pytest.LogCaptureFixture
) -> None:
    server.command("ACL", "SETUSER", "ada", "on", ">right", "~*", "+@all", "-info")
    guarded = RedisStore(server.url.replace("redis://", "redis://ada:right@"))
    await guarded.open()
    await guarded.close()
    assert "does not let INFO be read" in caplog.text
    assert "maxmemory_policy cannot be checked" in caplog.text
    assert "append-only file cannot be checked" in caplog.text


async def test_a_newer_format_is_refused(server: RedisServer) -> None:
    server.command("SET", "titans:format", 99)
    store = RedisStore(server.url)
    with pytest.raises(StoreUnavailable, match="format 99"):
        await store.open()
    await store.close()


async def test_cancelled_callers_never_see_each_others_answers(store: RedisStore, record: SessionRecord) -> None:
    for turns in range(40):
        task = asyncio.create_task(store.write_blob(record.id, STATE))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await store.get(record.id) == record
    assert await snapshot_of(store, record) == STATE
