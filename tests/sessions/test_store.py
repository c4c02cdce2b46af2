"""What every store promises, held against each of them. Nothing here knows which one it is given."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.records import a_session, logged, made, made_with_snapshot, moved, snapshot_of, with_snapshot
from titans_server.errors import SessionNotFound, StoreUnavailable, VersionConflict
from titans_server.sessions.open import open_store
from titans_server.sessions.record import Draft, Outcome, Parent
from titans_server.sessions.store import Commit, SessionStore, Usage


@pytest.fixture(params=["memory", "sqlite", "redis", "redis_cluster", "redis_sentinel"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SessionStore]:
    url = {"memory": "memory://", "sqlite": f"sqlite:///{tmp_path}/deep/er/sessions.db"}.get(request.param)
    store = open_store(url or request.getfixturevalue(f"{request.param}_url"))
    assert store.name == request.param.partition("_")[0]
    await store.open()
    yield store
    await store.close()


async def test_a_new_session_is_found_as_it_was_made(store: SessionStore) -> None:
    record = await made(store)
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
    record = await made(store, metadata=metadata)
    assert (await store.get(record.id)).metadata == metadata
    commit = logged(record, b"tokens")
    await store.commit(commit)
    assert await store.get(record.id) == commit.record


async def test_all_that_a_record_can_hold_comes_back(store: SessionStore) -> None:
    record = await made_with_snapshot(store)
    draft = Draft("ing_1", "a", 1.5, 2.5, "key", True, 3, ((4, 5), (6, 7)), 12, 99, "ab", True, record.head.snapshot, 1)
    outcome = Outcome("ing_0", "failed", 3.5, code="invalid_utf8", message="near byte 7")
    commit = moved(
        record, drafts=(draft,), outcomes=(outcome,), parent=Parent("ses_p", 4), ttl_seconds=10**9, state_bytes=5
    )
    await store.commit(commit)
    assert await store.get(record.id) == commit.record


async def test_the_same_session_may_be_created_again_but_no_other_takes_its_id(store: SessionStore) -> None:
    record = await made(store)
    await store.create(Commit(record))
    with pytest.raises(VersionConflict, match=record.id):
        await store.create(Commit(replace(record, model="another")))
    assert await store.get(record.id) == record


async def test_a_commit_moves_record_and_log(store: SessionStore) -> None:
    record = await made(store)
    for i in range(3):
        commit = logged(record, b"entry %d" % i)
        await store.commit(commit)
        record = commit.record
        assert await store.get(record.id) == record
    assert list(await store.read_log(record.id, [2, 0, 1, 7])) == [b"entry 2", b"entry 0", b"entry 1", None]
    assert list(await store.read_log(record.id, [])) == []


async def test_entries_that_nothing_points_at_are_dropped(store: SessionStore) -> None:
    record = await made(store)
    for i in range(2):
        commit = logged(record, b"entry %d" % i)
        await store.commit(commit)
        record = commit.record
    await store.commit(await with_snapshot(store, record, b"state"))
    assert list(await store.read_log(record.id, [0, 1])) == [None, None]


async def test_a_stale_commit_conflicts_and_changes_nothing(store: SessionStore) -> None:
    first = await made(store)
    second = logged(first, b"second")
    await store.commit(second)
    ahead = moved(replace(second.record, revision=5))
    for stale in (logged(first, b"other"), ahead, replace(second, record=replace(second.record, write_id="w"))):
        with pytest.raises(VersionConflict):
            await store.commit(stale)
    assert await store.get(first.id) == second.record
    assert list(await store.read_log(first.id, [0, 1])) == [b"second", None]


async def test_what_follows_a_commit_that_the_store_has_lost_is_refused(store: SessionStore) -> None:
    first = await made(store)
    kept, lost = logged(first, b"kept"), logged(first, b"lost")  # lost in a failover, but known to its writer
    await store.commit(kept)
    with pytest.raises(VersionConflict, match="moved on"):
        await store.commit(logged(lost.record, b"more"))
    with pytest.raises(VersionConflict, match="moved on"):
        await store.delete(first.id, lost.record.write_id)
    assert await store.get(first.id) == kept.record
    assert list(await store.read_log(first.id, [0, 1])) == [b"kept", None]


async def test_a_repeated_commit_is_done_already(store: SessionStore) -> None:
    commit = logged(await made(store), b"first")
    for _ in range(3):
        await store.commit(commit)
    assert await store.get(commit.record.id) == commit.record


async def test_a_commit_repeated_at_the_same_time_is_done_once(store: SessionStore) -> None:
    commit = logged(await made(store), b"tokens")
    await asyncio.gather(*(store.commit(commit) for _ in range(8)))
    assert await store.get(commit.record.id) == commit.record


async def test_of_twenty_racing_commits_exactly_one_wins(store: SessionStore) -> None:
    record = await made(store)
    commits = [logged(record, b"%d" % i) for i in range(20)]
    results = await asyncio.gather(*(store.commit(commit) for commit in commits), return_exceptions=True)
    (winner,) = (commit for commit, result in zip(commits, results, strict=True) if result is None)
    assert [type(result) for result in results].count(VersionConflict) == 19
    assert await store.get(record.id) == winner.record
    assert list(await store.read_log(record.id, [0])) == [winner.append[0]]


@pytest.mark.parametrize("size", [0, 1, 4 << 20])
async def test_a_snapshot_of_any_size_survives(store: SessionStore, size: int) -> None:
    blob = os.urandom(size)
    record = await made_with_snapshot(store, blob)
    assert await snapshot_of(store, record) == blob


async def test_a_snapshot_that_is_replaced_goes_and_one_that_is_kept_stays(store: SessionStore) -> None:
    first = await made_with_snapshot(store, b"first")
    kept = await with_snapshot(store, first, b"second", alone=False)
    await store.commit(kept)
    assert await snapshot_of(store, first) == b"first"
    await store.commit(await with_snapshot(store, kept.record, b"third"))
    assert await snapshot_of(store, first) is None
    assert await snapshot_of(store, kept.record) is None


async def test_a_commit_to_a_snapshot_that_was_swept_is_refused_and_changes_nothing(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = logged(await made(store), b"tokens")
    await store.commit(first)
    late = await with_snapshot(store, first.record, b"state")
    real = time.time
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(time, "time", lambda: real() + 7200)  # another server's clock, or this one stood still
        await store.sweep()
    with pytest.raises(StoreUnavailable, match="swept"):
        await store.commit(late)
    assert await store.get(first.record.id) == first.record
    assert list(await store.read_log(first.record.id, [0])) == [b"tokens"]
    again = await with_snapshot(store, first.record, b"state")
    await store.commit(again)
    await store.commit(again)
    assert await snapshot_of(store, again.record) == b"state"


async def test_a_fork_shares_its_parents_snapshot_for_as_long_as_either_needs_it(store: SessionStore) -> None:
    parent = await made_with_snapshot(store, b"shared")
    children = [await made(store, versions=parent.versions) for _ in range(2)]
    grandchild = await made(store, versions=parent.versions)
    await store.delete(parent.id)
    await store.commit(await with_snapshot(store, children[0], b"own"))
    await store.delete(children[1].id)
    assert await snapshot_of(store, grandchild) == b"shared"
    await store.delete(grandchild.id)
    assert await snapshot_of(store, grandchild) is None


async def test_a_fork_of_a_snapshot_that_is_gone_is_refused(store: SessionStore) -> None:
    parent = await made_with_snapshot(store)
    await store.delete(parent.id)
    child = a_session(versions=parent.versions)
    with pytest.raises(VersionConflict, match="no more"):
        await store.create(Commit(child))
    with pytest.raises(SessionNotFound):
        await store.get(child.id)


async def test_a_fork_begins_with_a_log(store: SessionStore) -> None:
    record = a_session()
    await store.create(Commit(record, {0: b"the end of its parent's"}))
    assert list(await store.read_log(record.id, [0])) == [b"the end of its parent's"]


async def test_a_deleted_session_is_gone(store: SessionStore) -> None:
    record = await made_with_snapshot(store)
    commit = logged(record, b"tokens")
    await store.commit(commit)
    await store.delete(record.id)
    for attempt in (
        store.get(record.id),
        store.commit(logged(commit.record, b"more")),
        store.delete(record.id),
        store.list("", 10, record.id),
    ):
        with pytest.raises(SessionNotFound, match=record.id):
            await attempt
    assert await snapshot_of(store, record) is None
    assert list(await store.read_log(record.id, [0])) == [None]


async def test_a_session_is_deleted_at_the_commit_that_is_named_and_at_no_other(store: SessionStore) -> None:
    first = await made_with_snapshot(store)
    commit = logged(first, b"tokens")
    await store.commit(commit)
    with pytest.raises(VersionConflict, match="moved on"):
        await store.delete(first.id, first.write_id)
    assert await store.get(first.id) == commit.record
    assert await snapshot_of(store, commit.record) == b"first"
    await store.delete(first.id, commit.record.write_id)
    with pytest.raises(SessionNotFound):
        await store.delete(first.id, commit.record.write_id)


async def test_an_unknown_session_is_not_found(store: SessionStore) -> None:
    record = a_session()
    for attempt in (store.get(record.id), store.commit(logged(record, b"")), store.delete(record.id)):
        with pytest.raises(SessionNotFound, match=record.id):
            await attempt
    assert await store.read_blob(f"{record.id}/none") is None


async def test_sessions_do_not_meet(store: SessionStore) -> None:
    blobs = [os.urandom(1000) for _ in range(20)]
    records = await asyncio.gather(*(made_with_snapshot(store, blob) for blob in blobs))
    assert await asyncio.gather(*(snapshot_of(store, record) for record in records)) == blobs


async def test_an_expired_session_is_not_found_and_swept(store: SessionStore) -> None:
    owner = f"owner {os.urandom(4).hex()}"
    stays = await made(store, owner=owner, updated_at=time.time(), ttl_seconds=1000)
    old = await made_with_snapshot(store)
    gone = await made(store, owner=owner, versions=old.versions, updated_at=time.time() - 50, ttl_seconds=49)
    await store.delete(old.id)
    for attempt in (store.get(gone.id), store.commit(logged(gone, b""))):
        with pytest.raises(SessionNotFound):
            await attempt
    assert [record.id for record in await store.list(owner, 10)] == [stays.id]
    assert await store.usage(owner) == Usage(1, 0), "what is not found takes no room"
    await store.sweep()
    assert await snapshot_of(store, gone) is None
    assert await store.usage(owner) == Usage(1, 0)
    assert await store.get(stays.id) == stays


async def test_owners_see_their_own_newest_first_page_by_page(store: SessionStore) -> None:
    owner, other = (f"owner {os.urandom(4).hex()}" for _ in range(2))
    records = [await made(store, owner=owner, created_at=1e9 + i) for i in range(5)]
    stranger = await made(store, owner=other)
    names = [record.id for record in reversed(records)]
    assert [record.id for record in await store.list(owner, 10)] == names
    assert [record.id for record in await store.list(owner, 2)] == names[:2]
    assert [record.id for record in await store.list(owner, 2, names[1])] == names[2:4]
    assert list(await store.list(owner, 2, names[4])) == []
    assert list(await store.list("nobody at all", 10)) == []
    with pytest.raises(SessionNotFound):
        await store.list(owner, 10, stranger.id)


async def test_an_owner_of_many_sessions_lists_them_while_others_read(store: SessionStore) -> None:
    owner, other = f"owner {os.urandom(4).hex()}", await made(store)
    names = {record.id for record in await asyncio.gather(*(made(store, owner=owner) for _ in range(110)))}
    lists, gets = (store.list(owner, 101) for _ in range(8)), (store.get(other.id) for _ in range(40))
    pages, records = await asyncio.gather(asyncio.gather(*lists), asyncio.gather(*gets))
    for page in pages:
        assert len(page) == 101
        assert {record.id for record in page} < names
    assert records == [other] * 40


async def test_a_session_is_listed_as_its_owners_alone(store: SessionStore) -> None:
    record = await made(store, owner=f"owner {os.urandom(4).hex()}")
    assert await store.is_listed(record.id, record.owner)
    assert not await store.is_listed(record.id, "")
    assert not await store.is_listed(a_session().id, record.owner)
    await store.delete(record.id)
    assert not await store.is_listed(record.id, record.owner)


async def test_usage_counts_sessions_and_what_they_take(store: SessionStore) -> None:
    owner = f"owner {os.urandom(4).hex()}"
    assert await store.usage(owner) == Usage(0, 0)
    record = await made(store, owner=owner)
    commit = logged(record, b"", tokens=10)
    await store.commit(commit)
    assert await store.usage(owner) == Usage(1, 40)
    snapshot = await with_snapshot(store, commit.record, b"x" * 1000)
    await store.commit(snapshot)
    await made(store, owner=owner, versions=snapshot.record.versions)
    assert await store.usage(owner) == Usage(2, 2000)
    await store.delete(record.id)
    assert await store.usage(owner) == Usage(1, 1000)


async def test_accepted_work_is_due_once_its_server_is_not_heard_of(store: SessionStore) -> None:
    record = await made(store)
    held = moved(record, drafts=(Draft("ing_1", "a", time.time() + 0.3, 0.0, accepted=True),))
    await store.commit(held)
    assert record.id not in await store.due()
    await asyncio.sleep(0.4)
    assert record.id in await store.due()
    await store.commit(moved(held.record, drafts=()))
    assert record.id not in await store.due()


async def test_a_cancelled_caller_leaves_the_store_as_good_as_before(store: SessionStore) -> None:
    blob = os.urandom(1 << 20)
    before = await asyncio.gather(*(made_with_snapshot(store, f"{i}".encode()) for i in range(10)))
    tasks = [asyncio.create_task(store.commit(logged(record, b"tokens"))) for record in before]
    tasks += [asyncio.create_task(_wait_for(store.write_blob(record.id, blob))) for record in before]
    tasks += [asyncio.create_task(_wait_for(snapshot_of(store, record))) for record in before]
    for turns, task in enumerate(tasks):
        for _ in range(turns % 4):
            await asyncio.sleep(0)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for i, record in enumerate(before):  # each answer is the one that was asked for
        async with asyncio.timeout(30):
            now = await store.get(record.id)
            assert (now.id, now.version in {1, 2}) == (record.id, True)
            assert await snapshot_of(store, record) == f"{i}".encode()


async def _wait_for(work: object) -> None:
    await work  # type: ignore[misc]


async def test_a_commit_that_has_begun_is_carried_through(store: SessionStore) -> None:
    commit = logged(await made(store), b"tokens")
    task = asyncio.create_task(store.commit(commit))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    for _ in range(1000):
        if await store.get(commit.record.id) == commit.record:
            break
        await asyncio.sleep(0.01)
    assert list(await store.read_log(commit.record.id, [0])) == [b"tokens"]


async def test_a_store_that_is_there_answers(store: SessionStore) -> None:
    await store.ping()
    await store.sweep()
