"""Accepted documents that a server is gone from, taken over beside sessions and stores that are broken."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from support.accepted import SECONDS, TOKENS, Faulty, be_impatient, learnt, left_behind, server_on
from support.engines import states_on
from titans_server import accepted, learning
from titans_server.accepted import Accepted
from titans_server.engine import Engine, Ingestion
from titans_server.engine.runner import Runner
from titans_server.learning import Learning
from titans_server.leases import Leases
from titans_server.observer import Observer
from titans_server.sessions import history, ledger
from titans_server.sessions.history import Writing
from titans_server.sessions.ledger import Ledger
from titans_server.sessions.memory import MemoryStore
from titans_server.sessions.record import Draft, Outcome, SessionRecord
from titans_server.telemetry.metrics import Metrics
from titans_server.writers import Writers


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    be_impatient(monkeypatch)


async def failure(store: MemoryStore, session: str) -> str:
    """The code of the error that ended a session's document."""
    async with asyncio.timeout(SECONDS):
        while not (outcomes := (await store.get(session)).outcomes):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert [x.status for x in outcomes] == ["failed"]
    return outcomes[0].code


def told(caplog: pytest.LogCaptureFixture, beginning: str) -> list[bool]:
    """The lines of the log that begin so: whether each has a traceback."""
    return [bool(record.exc_info) for record in caplog.records if record.getMessage().startswith(beginning)]


async def test_a_session_that_stays_broken_is_tried_at_growing_intervals_and_told_of_in_a_line(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    store = Faulty()
    broken, *whole = [await left_behind(store) for _ in range(3)]
    store.broken = broken
    async with server_on(store, engine):
        began = time.monotonic()
        await learnt(store, whole)
        await asyncio.sleep(1)
        tries = store.num_tries
        assert 4 <= tries <= 6 + (time.monotonic() - began) / 0.2  # 0.01 s, 0.02, 0.04, 0.08, 0.16, 0.2, 0.2 ...
        lines = told(caplog, f"cannot go on with session {broken}: a fault of the server's: RuntimeError('unforeseen')")
        assert lines == [True] + [False] * (tries - 1)

        (draft,) = store._sessions[broken].record.drafts
        assert draft.accepted, "it is left as it is"
        store.broken = ""
        await learnt(store, [broken])


async def test_nobody_waits_for_a_session_that_is_never_done_with_being_read(engine: Engine) -> None:
    store = Faulty()
    store.endless, *whole = [await left_behind(store) for _ in range(3)]
    async with server_on(store, engine):
        await learnt(store, whole)
        await learnt(store, [await left_behind(store)])


async def test_a_store_and_a_document_that_fail_for_a_while_are_told_of_with_one_traceback(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    store = Faulty()
    session = await left_behind(store)
    store.faults = ["due", "due", "due", "log", "log", "log"]
    metrics = Metrics()
    async with server_on(store, engine, observer=metrics):
        await learnt(store, [session])
    assert not store.faults
    assert 'titans_ingestions_put_off_total{code="internal_error"} 3.0' in metrics.exposition().decode()
    assert told(caplog, "cannot look for work that was left: a fault of the server's") == [True, False, False]
    assert told(caplog, f"ingestion ing_{session} waits: a fault of the server's") == [True, False, False]


async def test_a_document_that_another_server_took_over_between_two_tries_is_left_to_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(accepted, "_MIN_PAUSE", 0.5)
    store = Faulty()
    session = await left_behind(store)
    store.faults = ["log"]
    async with server_on(store, engine), asyncio.timeout(SECONDS):
        while not told(caplog, f"ingestion ing_{session} waits"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await Ledger(store).change(session, lambda record: history.take(record, f"ing_{session}", "theirs"))
        await asyncio.sleep(1)
        (draft,) = (await store.get(session)).drafts
        assert draft.server == "theirs"
        await learnt(store, [session])  # once the other one's lease has run out


async def test_a_document_whose_end_a_failover_lost_is_not_learnt_without_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its server has taken it in whole, and said so, and has not learnt it yet."""
    monkeypatch.setattr(accepted, "_MIN_PAUSE", 0.5)
    store = Faulty()
    session = await left_behind(store)
    kept = store._sessions[session]
    (draft,) = kept.record.drafts
    store.faults = ["log"]
    async with server_on(store, engine), asyncio.timeout(SECONDS):
        while not told(caplog, f"ingestion ing_{session} waits"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        begun = replace(draft, num_bytes=draft.num_bytes - 1, sha256="begun", accepted=False)
        kept.record = replace(kept.record, drafts=(begun,))
        while not told(caplog, f"ingestion ing_{session} is left"):
            assert not kept.record.outcomes, "a part of a document is a version"
            await asyncio.sleep(0.01)
    assert [x.accepted for x in kept.record.drafts] == [False]


@pytest.mark.parametrize("if_match", [None, 0])
async def test_a_document_whose_commit_loses_every_race_is_tried_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, if_match: int | None
) -> None:
    monkeypatch.setattr(ledger, "_ATTEMPTS", 1)
    store = Faulty()
    session = await left_behind(store, if_match)
    store.faults = ["race", "race"]
    async with server_on(store, engine):
        await learnt(store, [session])
    assert not store.faults


async def test_a_document_that_was_to_follow_another_version_fails(engine: Engine) -> None:
    store = Faulty()
    session = await left_behind(store, if_match=7)
    async with server_on(store, engine):
        assert await failure(store, session) == "version_conflict"


@pytest.mark.parametrize("num_faults", [accepted._MAX_FAULTS - 1, accepted._MAX_FAULTS])
async def test_a_document_that_the_model_fails_on_is_tried_again_so_often_and_no_more(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, num_faults: int
) -> None:
    ingest, left = Runner.ingest, list(range(num_faults))

    def failing(runner: Runner, chunks: list[tuple[Ingestion, int]]) -> None:
        if left:
            left.pop()
            raise RuntimeError("out of memory")
        ingest(runner, chunks)

    monkeypatch.setattr(Runner, "ingest", failing)
    store = Faulty()
    session = await left_behind(store)
    async with server_on(store, engine):
        if num_faults < accepted._MAX_FAULTS:
            await learnt(store, [session])
        else:
            assert await failure(store, session) == "internal_error"
    assert not left


async def test_a_document_that_comes_further_from_fault_to_fault_is_not_given_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepted, "_MAX_FAULTS", 2)
    monkeypatch.setattr(learning, "_STRIDE", 1)
    ingest, failed_at = Runner.ingest, set[int]()

    def failing_once_everywhere(runner: Runner, chunks: list[tuple[Ingestion, int]]) -> None:
        ((request, _),) = chunks
        if request.position not in failed_at:
            failed_at.add(request.position)
            raise RuntimeError("out of memory")
        ingest(runner, chunks)

    monkeypatch.setattr(Runner, "ingest", failing_once_everywhere)
    store = Faulty()
    session = await left_behind(store, tokens=TOKENS * 4)
    async with server_on(store, engine):
        await learnt(store, [session])
    assert len(failed_at) > 2


async def test_a_document_of_a_session_that_is_damaged_waits_until_that_is_mended(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    store = Faulty()
    session = await left_behind(store)
    writing = Writing((await store.get(session)).head, "said", TOKENS, 8, num_kept=8)
    await Ledger(store).change(session, lambda record: history.write(record, writing))
    kept = store._sessions[session]
    ((number, _),) = kept.record.head.entries
    entry = kept.log.pop(number)
    async with server_on(store, engine), asyncio.timeout(SECONDS):
        while len(told(caplog, f"ingestion ing_{session} waits: entry {number}")) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert [x.accepted for x in kept.record.drafts] == [True]
        kept.log[number] = entry
        while kept.record.version < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not kept.record.drafts


async def test_a_document_of_which_the_log_is_torn_fails(engine: Engine) -> None:
    store = Faulty()
    session = await left_behind(store)
    store._sessions[session].log.popitem()
    async with server_on(store, engine):
        assert await failure(store, session) == "state_corrupted"


async def test_a_document_behind_one_that_is_cancelled_when_its_turn_has_come_is_learnt(engine: Engine) -> None:
    store = Faulty()
    session, get = await left_behind(store), store.get
    (first,) = (await get(session)).drafts
    cancelled = Outcome(first.ingestion, "cancelled", time.time())

    async def and_then(session_id: str) -> SessionRecord:
        record = await get(session_id)
        store.get = get  # type: ignore[method-assign]
        await Ledger(store).change(session_id, lambda record: history.end(record, cancelled))
        return record

    store.get = and_then  # type: ignore[method-assign]
    ledger, states = Ledger(store), states_on(store, engine)
    learning = Learning(engine, ledger, states, (3,), num_kept_versions=8, observer=Observer())
    accepted = Accepted(ledger, learning, Writers(4), Leases(ledger), works={})
    assert not (await accepted.after_others(session, "ing_behind")).drafts


async def test_the_time_that_an_accepted_document_takes_is_not_taken_for_another_servers(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepted, "_WAIT_SECONDS", 0.2)
    store = Faulty()
    session, read_log = await left_behind(store), store.read_log

    async def slowly(session_id: str, numbers: Sequence[int]) -> Sequence[bytes | None]:
        await asyncio.sleep(0.5)
        return await read_log(session_id, numbers)

    store.read_log = slowly  # type: ignore[method-assign]
    ledger, states = Ledger(store), states_on(store, engine)
    learning = Learning(engine, ledger, states, (3,), num_kept_versions=8, observer=Observer())
    record = await Accepted(ledger, learning, Writers(4), Leases(ledger), works={}).after_others(session, "ing_behind")
    assert record.version == 1


async def test_an_accepted_document_behind_one_that_broke_off_is_not_waited_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepted, "_WAIT_SECONDS", 2.0)
    store = Faulty()
    session = await left_behind(store)
    kept = store._sessions[session]
    broken_off = Draft("ing_broken_off", "ours", time.time() - 1, time.time() - 1, key="key")
    kept.record = replace(kept.record, drafts=(broken_off, *kept.record.drafts))
    ledger, states = Ledger(store), states_on(store, engine)
    learning = Learning(engine, ledger, states, (3,), num_kept_versions=8, observer=Observer())
    record = await Accepted(ledger, learning, Writers(4), Leases(ledger), works={}).after_others(session, "ing_behind")
    assert (record.version, record.drafts) == (1, (broken_off,))


async def test_another_models_session_is_left_to_that_models_server(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    store = Faulty()
    session, other = await left_behind(store), await left_behind(store)
    theirs = store._sessions[other]
    theirs.record = replace(theirs.record, fingerprint="e" * 32)
    async with server_on(store, engine):
        await learnt(store, [session])
        assert (await store.get(other)).drafts
    assert set(told(caplog, f"cannot go on with session {other}: session {other} was made by model")) == {False}


async def test_another_models_session_is_let_go_of_once_that_models_server_has_learnt_it(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    store = Faulty()
    other = await left_behind(store)
    theirs = store._sessions[other]
    theirs.record = replace(theirs.record, fingerprint="e" * 32)
    async with server_on(store, engine), asyncio.timeout(SECONDS):
        beginning = f"cannot go on with session {other}"
        while not told(caplog, beginning):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        outcome = Outcome(theirs.record.drafts[0].ingestion, "done", time.time())
        await Ledger(store).change(other, lambda record: history.end(record, outcome))
        num_lines = len(told(caplog, beginning))
        await asyncio.sleep(1)  # several of the longest pauses
        assert len(told(caplog, beginning)) == num_lines
