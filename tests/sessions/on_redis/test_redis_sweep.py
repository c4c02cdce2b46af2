"""What the Redis store finds to be done later, and what it sweeps, against a real server."""

import asyncio
import time
from dataclasses import replace

import pytest
from support.records import STATE, a_session, logged, made, moved, snapshot_of, with_snapshot
from support.redis_server import RedisServer
from titans_server.errors import SessionNotFound, VersionConflict
from titans_server.sessions.record import Draft, SessionRecord
from titans_server.sessions.redis import RedisStore
from titans_server.sessions.redis_layout import blob_keys
from titans_server.sessions.store import Commit, Usage


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
