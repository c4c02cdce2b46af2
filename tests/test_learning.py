"""Long documents: out of the log a part at a time, from where they were broken off, while their session is there."""

import asyncio
import hashlib
import time
from contextlib import aclosing
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from support.records import made
from titans_server import leases
from titans_server.engine import Engine
from titans_server.errors import IngestionCancelled, KeyReused, Overloaded, SessionNotFound, VersionConflict
from titans_server.learning import Learning, Work
from titans_server.leases import Leases
from titans_server.observer import Observer
from titans_server.sessions import history
from titans_server.sessions.cache import StateCache
from titans_server.sessions.history import Portion
from titans_server.sessions.ledger import Ledger
from titans_server.sessions.memory import MemoryStore
from titans_server.sessions.record import Draft, Entries
from titans_server.states import Moment, SnapshotPolicy, States
from titans_server.telemetry.metrics import Metrics

SEPARATOR = (3, 4)
TOKENS = [3 + i * i % 80 for i in range(6_000)]
PORTION = 90
SHA256 = hashlib.sha256(b"text").hexdigest()


class Counting(Ledger):
    """Knows how many tokens were read at once, at most."""

    most = 0

    async def read(self, session_id: str, entries: Entries) -> list[int]:
        tokens = await super().read(session_id, entries)
        self.most = max(self.most, len(tokens))
        return tokens


async def accepted(store: MemoryStore, session: str, ingestion: str) -> Draft:
    """TOKENS in the log as a document of many portions."""
    draft = Draft(ingestion, "ours", 0.0, time.time(), is_async=True)
    for end in range(PORTION, len(TOKENS) + PORTION, PORTION):
        portion = Portion(TOKENS[end - PORTION : end], end, SHA256, is_last=end >= len(TOKENS))
        append = partial(history.append, draft=draft, separator=SEPARATOR, portion=portion)
        draft = (await Ledger(store).change(session, append)).drafts[-1]
    return draft


def learner_on(
    store: MemoryStore, engine: Engine, observer: Observer | None = None, *, tokens: int = 1_000
) -> tuple[Learning, States, Counting]:
    """What a server that has just started learns with; it writes a state down every so many tokens."""
    policy, ledger = SnapshotPolicy(tokens, idle_seconds=1_000), Counting(store)
    states = States(engine, Ledger(store), "f" * 32, StateCache(1 << 30), policy=policy, observer=Observer())
    observer = observer or Observer()
    return Learning(engine, ledger, states, SEPARATOR, num_kept_versions=8, observer=observer), states, ledger


async def test_a_long_document_is_learnt_a_part_at_a_time_from_where_it_was_broken_off(engine: Engine) -> None:
    store = MemoryStore()
    session = (await made(store)).id
    everything = Portion((), len(TOKENS), SHA256, is_last=True)
    for number in range(2):
        work = Work(session, await accepted(store, session, f"ing_{number}"))
        learning, _, ledger = learner_on(store, engine)
        async with aclosing(learning.learn(work, everything)) as events:
            async for progress in events:
                if progress.tokens > len(TOKENS) / 2:
                    break
        (draft,) = (await store.get(session)).drafts
        assert draft.snapshot is not None
        assert ledger.most <= PORTION
        learning, states, ledger = learner_on(store, engine)
        async for _ in learning.learn(Work(session, draft), everything):
            pass
        assert ledger.most <= PORTION
    record, state = await states.newest(session)
    whole = await engine.ingest(states.empty, [*TOKENS, *SEPARATOR, *TOKENS])
    assert record.head.tokens == int(whole.position)
    for name, part in whole.parts().items():
        torch.testing.assert_close(state.parts()[name], part, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("is_torn", [True, False])
async def test_a_document_whose_checkpoint_is_torn_or_gone_is_learnt_from_its_beginning(
    engine: Engine, is_torn: bool
) -> None:
    store, everything = MemoryStore(), Portion((), len(TOKENS), SHA256, is_last=True)
    session = (await made(store)).id
    work = Work(session, await accepted(store, session, "ing_0"))
    async with aclosing(learner_on(store, engine)[0].learn(work, everything)) as events:
        async for progress in events:
            if progress.tokens > len(TOKENS) / 2:
                break
    (draft,) = (await store.get(session)).drafts
    assert draft.snapshot is not None
    if is_torn:
        store._blobs[draft.snapshot.blob] = store._blobs[draft.snapshot.blob][:-1] + b"?"
    else:
        del store._blobs[draft.snapshot.blob]
    async for _ in learner_on(store, engine, tokens=1_000_000)[0].learn(Work(session, draft), everything):
        pass
    record, state = await learner_on(store, engine)[1].newest(session)  # as a server that has just started reads it
    assert (record.version, int(state.position)) == (1, len(TOKENS))


async def test_what_a_failover_lost_of_a_document_is_in_no_checkpoint_of_it(engine: Engine) -> None:
    store = MemoryStore()
    session, ledger = (await made(store)).id, Ledger(store)
    learning, states, _ = learner_on(store, engine)

    async def append(draft: Draft, portion: Portion) -> Draft:
        edit = partial(history.append, draft=draft, separator=SEPARATOR, portion=portion)
        return (await ledger.change(session, edit)).drafts[-1]

    async def learn(work: Work, portion: Portion) -> None:
        async for _ in learning.learn(work, portion):
            pass

    first, rest = Portion(TOKENS[:900], 900, "begun"), Portion(TOKENS[900:3_000], 3_000, "whole")
    work = Work(session, await append(Draft("ing_0", "ours", 0.0, time.time(), key="key"), first))
    await learn(work, first)
    kept = deepcopy(store._sessions[session])
    work.draft = await append(work.draft, rest)
    store._sessions[session] = kept
    with pytest.raises(VersionConflict):
        await learn(work, rest)
    (draft,) = (await store.get(session)).drafts  # the client sends the document again
    await learn(Work(session, draft), replace(rest, is_last=True))
    record, state = await states.newest(session)
    assert (record.tokens_seen, int(state.position)) == (3_000, 3_000)


async def test_a_document_that_another_server_was_faster_than_is_learnt_again_and_counted_as_a_conflict(
    engine: Engine,
) -> None:
    store, metrics, everything = MemoryStore(), Metrics(), Portion((), len(TOKENS), SHA256, is_last=True)
    session = (await made(store)).id
    slow, fast = [Work(session, await accepted(store, session, f"ing_{i}")) for i in range(2)]
    events = learner_on(store, engine, metrics, tokens=1_000_000)[0].learn(slow, everything)
    await anext(events)
    async for _ in learner_on(store, engine)[0].learn(fast, everything):
        pass
    async for _ in events:
        pass
    assert (await store.get(session)).tokens_seen == 2 * len(TOKENS) + len(SEPARATOR)
    assert metrics.registry.get_sample_value("titans_commit_conflicts_total") == 1
    assert metrics.registry.get_sample_value("titans_work_failures_total", {"work": "commit"}) == 0


async def test_a_document_whose_key_has_another_one_learnt_meanwhile_is_not_said_to_be_learnt(engine: Engine) -> None:
    """Ours stands still; meanwhile the client sends theirs another text that begins the same, under the same key."""
    store = MemoryStore()
    session, ledger = (await made(store)).id, Ledger(store)
    first = Portion(TOKENS[:900], 900, "begun")
    append = partial(history.append, draft=Draft("ing_0", "ours", 0.0, 0.0, "key"), separator=SEPARATOR, portion=first)
    (draft,) = (await ledger.change(session, append)).drafts
    ours, theirs = Work(session, draft), Work(session, replace(draft, server="theirs"))
    learning, _, _ = learner_on(store, engine)
    async for _ in learning.learn(ours, first):
        pass
    async for _ in learner_on(store, engine)[0].learn(theirs, Portion((7, 8), 902, "another", is_last=True)):
        pass
    with pytest.raises(KeyReused):
        async for _ in learning.learn(ours, Portion((5, 6), 902, "whole", is_last=True)):
            pass
    assert theirs.learnt is not None and ours.learnt is None


async def test_what_learns_a_document_stops_once_its_session_is_deleted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_BEAT_SECONDS", 0.01)
    store = MemoryStore()
    session = (await made(store)).id
    work = Work(session, await accepted(store, session, "ing_0"))
    policy = SnapshotPolicy(1_000_000, idle_seconds=1_000)  # no commit would tell
    states = States(engine, Ledger(store), "f" * 32, StateCache(1 << 30), policy=policy, observer=Observer())
    learning = Learning(engine, Ledger(store), states, SEPARATOR, num_kept_versions=8, observer=Observer())
    async with Leases(Ledger(store)).held(work):
        events = learning.learn(work, Portion((), len(TOKENS), SHA256, is_last=True))
        await anext(events)
        await store.delete(session)
        async with asyncio.timeout(60):
            while not work.cancelled:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        with pytest.raises((IngestionCancelled, SessionNotFound)):
            async for _ in events:
                pass


async def test_a_server_that_stood_still_leaves_a_document_to_the_one_that_took_it_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leases, "_BEAT_SECONDS", 0.01)
    store = MemoryStore()
    session, ledger = (await made(store)).id, Ledger(store)
    ours = Leases(ledger)
    draft = Draft("ing_0", ours.server, 0.0, time.time(), key="key")
    append = partial(history.append, draft=draft, separator=SEPARATOR, portion=Portion((5, 6), 2, SHA256))
    (draft,) = (await ledger.change(session, append)).drafts
    async with ours.held(Work(session, draft)):
        await asyncio.sleep(0.1)
        (renewed,) = (await store.get(session)).drafts
        assert renewed.lease_until > draft.lease_until
        await ledger.change(session, partial(history.take, ingestion="ing_0", server="theirs"))
        (taken,) = (await store.get(session)).drafts
        await asyncio.sleep(0.1)
        assert (await store.get(session)).drafts == (taken,)


async def test_a_document_that_has_begun_waits_for_room_where_its_session_has_to_be_read_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, everything = MemoryStore(), Portion((), len(TOKENS), SHA256, is_last=True)
    session = (await made(store)).id
    learning, states, _ = learner_on(store, engine)
    newest, num_refused = states.newest, 0

    async def refuse_twice(*args: Any) -> Moment:
        nonlocal num_refused
        if num_refused < 2:
            num_refused += 1
            raise Overloaded("256 requests are under way already")
        return await newest(*args)

    monkeypatch.setattr(states, "newest", refuse_twice)
    monkeypatch.setattr("titans_server.learning._MIN_PAUSE", 0.01)
    with pytest.raises(Overloaded):
        async for _ in learning.learn(Work(session, Draft("ing_new", "ours", 0.0, time.time())), everything):
            pass
    work = Work(session, await accepted(store, session, "ing_0"))
    async for _ in learning.learn(work, everything):
        pass
    assert num_refused == 2 and work.learnt is not None
