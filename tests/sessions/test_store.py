"""What every store promises, held against each of them. Nothing here knows which one it is given."""

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from titans_server.errors import SessionNotFound, StateCorrupted, VersionConflict
from titans_server.sessions.open import open_store
from titans_server.sessions.store import SessionRecord, SessionStore, sha256


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SessionStore]:
    url = {"memory": "memory://", "sqlite": f"sqlite:///{tmp_path}/deep/er/sessions.db"}.get(request.param)
    store = open_store(url or request.getfixturevalue("redis_url"))
    assert store.name == request.param
    await store.open()
    yield store
    await store.close()


def a_session(**fields: object) -> SessionRecord:
    record = SessionRecord(
        id=f"ses_{uuid.uuid4().hex}",
        model="tiny",
        fingerprint="f" * 64,
        created_at=1760000000.123456,
        updated_at=1760000000.123456,
    )
    return replace(record, **fields)  # type: ignore[arg-type]


def after(record: SessionRecord, state: bytes) -> SessionRecord:
    return replace(
        record,
        version=record.version + 1,
        tokens_seen=record.tokens_seen + 7,
        updated_at=record.updated_at + 1.5,
        state_bytes=len(state),
        state_sha256=sha256(state),
        write_id=uuid.uuid4().hex,
    )


async def committed(store: SessionStore, state: bytes = b"first") -> SessionRecord:
    record = a_session()
    await store.create(record)
    record = after(record, state)
    await store.commit(record, state)
    return record


async def test_a_new_session_is_found_as_it_was_made(store: SessionStore) -> None:
    record = a_session()
    await store.create(record)
    assert await store.get(record.id) == record


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"naïve": "日本語 🧠 \u202e", "line\nbreak": 'quote " and \\ slash', "": "", "nul\0": "\0"},
        {"lone surrogate": "\ud800"},
        {f"key {i}": "long " * 1000 for i in range(20)},
    ],
    ids=["none", "unicode", "surrogate", "much"],
)
async def test_metadata_comes_back_as_it_was_given(store: SessionStore, metadata: dict[str, str]) -> None:
    record = a_session(metadata=metadata)
    await store.create(record)
    assert (await store.get(record.id)).metadata == metadata
    record = after(record, b"state")
    await store.commit(record, b"state")
    assert (await store.get(record.id)) == record


async def test_the_same_session_may_be_created_again_but_no_other_takes_its_id(store: SessionStore) -> None:
    record = a_session()
    await store.create(record)
    await store.create(record)
    with pytest.raises(VersionConflict, match=record.id):
        await store.create(replace(record, model="another"))
    assert await store.get(record.id) == record


async def test_a_commit_moves_record_and_state(store: SessionStore) -> None:
    record = await committed(store, b"first")
    assert await store.get(record.id) == record
    assert await store.load(record) == b"first"
    second = after(record, b"second")
    await store.commit(second, b"second")
    assert await store.get(record.id) == second
    assert await store.load(second) == b"second"


async def test_a_stale_commit_conflicts_and_changes_nothing(store: SessionStore) -> None:
    first = await committed(store, b"first")
    second = after(first, b"second")
    await store.commit(second, b"second")
    for stale in (after(first, b"other"), replace(after(second, b"other"), version=4), replace(second, write_id="w")):
        with pytest.raises(VersionConflict):
            await store.commit(stale, b"other")
    assert await store.get(first.id) == second
    assert await store.load(second) == b"second"


async def test_a_repeated_commit_is_done_already(store: SessionStore) -> None:
    record = await committed(store, b"first")
    await store.commit(record, b"first")
    assert await store.get(record.id) == record
    assert await store.load(record) == b"first"


async def test_a_commit_repeated_at_the_same_time_is_done_once(store: SessionStore) -> None:
    session = a_session()
    await store.create(session)
    record = after(session, b"state")
    await asyncio.gather(*(store.commit(record, b"state") for _ in range(8)))
    assert await store.get(session.id) == record
    assert await store.load(record) == b"state"


async def test_a_replaced_state_is_not_loaded(store: SessionStore) -> None:
    first = await committed(store, b"same")
    await store.commit(after(first, b"same"), b"same")
    with pytest.raises(VersionConflict):
        await store.load(first)


async def test_a_state_that_is_not_the_records_is_refused(store: SessionStore) -> None:
    session = a_session()
    await store.create(session)
    record = after(session, b"state")
    await store.commit(record, b"stale")
    with pytest.raises(StateCorrupted):
        await store.load(record)


async def test_a_deleted_session_is_gone(store: SessionStore) -> None:
    record = await committed(store)
    await store.delete(record.id)
    for attempt in (
        store.get(record.id),
        store.load(record),
        store.commit(after(record, b"more"), b"more"),
        store.delete(record.id),
    ):
        with pytest.raises(SessionNotFound, match=record.id):
            await attempt


async def test_an_unknown_session_is_not_found(store: SessionStore) -> None:
    record = after(a_session(), b"state")
    for attempt in (store.get(record.id), store.load(record), store.commit(record, b"state"), store.delete(record.id)):
        with pytest.raises(SessionNotFound, match=record.id):
            await attempt


async def test_of_twenty_racing_commits_exactly_one_wins(store: SessionStore) -> None:
    session = a_session()
    await store.create(session)
    states = [f"state {i}".encode() * 1000 for i in range(20)]
    records = [after(session, state) for state in states]
    results = await asyncio.gather(
        *(store.commit(record, state) for record, state in zip(records, states, strict=True)), return_exceptions=True
    )
    winners = [record for record, result in zip(records, results, strict=True) if result is None]
    assert [type(result) for result in results].count(VersionConflict) == 19
    assert [await store.get(session.id)] == winners
    assert await store.load(winners[0]) == states[records.index(winners[0])]


async def test_sessions_do_not_meet(store: SessionStore) -> None:
    states = [os.urandom(1000) for _ in range(20)]
    records = await asyncio.gather(*(committed(store, state) for state in states))
    assert await asyncio.gather(*(store.load(record) for record in records)) == states


@pytest.mark.parametrize("size", [0, 1, 4 << 20])
async def test_a_state_of_any_size_survives(store: SessionStore, size: int) -> None:
    state = os.urandom(size)
    record = await committed(store, state)
    assert await store.load(record) == state


async def test_a_cancelled_caller_leaves_the_store_as_good_as_before(store: SessionStore) -> None:
    state = os.urandom(1 << 20)
    before = await asyncio.gather(*(committed(store, f"{i}".encode()) for i in range(10)))
    commits = [asyncio.create_task(store.commit(after(record, state), state)) for record in before]
    loads = [asyncio.create_task(store.load(record)) for record in before]
    for turns, task in enumerate([*commits, *loads]):
        for _ in range(turns % 4):
            await asyncio.sleep(0)
        task.cancel()
    await asyncio.gather(*commits, *loads, return_exceptions=True)
    for record in before:  # each answer is the one that was asked for, and each session at one version or the other
        async with asyncio.timeout(30):
            now = await store.get(record.id)
            assert (now.id, now.version in {1, 2}) == (record.id, True)
    fresh = await committed(store, b"fresh")
    assert await store.load(fresh) == b"fresh"


async def test_a_commit_that_has_begun_is_carried_through(store: SessionStore) -> None:
    session = a_session()
    await store.create(session)
    record = after(session, b"state")
    commit = asyncio.create_task(store.commit(record, b"state"))
    await asyncio.sleep(0)
    commit.cancel()
    await asyncio.gather(commit, return_exceptions=True)
    for _ in range(1000):
        if await store.get(session.id) == record:
            break
        await asyncio.sleep(0.01)
    assert await store.load(record) == b"state"


async def test_a_store_that_is_there_answers(store: SessionStore) -> None:
    await store.ping()
