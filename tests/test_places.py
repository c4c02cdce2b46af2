"""Accepted documents beside all else: a few at once, in turn with their session's writers, none while a server ends."""

import asyncio
from collections.abc import Sequence

import pytest
from support.accepted import SECONDS, Faulty, be_impatient, learnt, left_behind, server_on
from support.engines import states_on
from titans_server.accepted import Accepted
from titans_server.engine import Engine
from titans_server.learning import Learning
from titans_server.leases import Leases
from titans_server.observer import Observer
from titans_server.sessions.ledger import Ledger
from titans_server.writers import Writers


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    be_impatient(monkeypatch)


async def test_accepted_documents_are_learnt_a_few_at_once_however_many_wait(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_max_requests", 8)
    store = Faulty()
    sessions, read_log, reading, most = [await left_behind(store) for _ in range(12)], store.read_log, 0, 0

    async def slowly(session_id: str, numbers: Sequence[int]) -> Sequence[bytes | None]:
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        await asyncio.sleep(0.1)
        reading -= 1
        return await read_log(session_id, numbers)

    store.read_log = slowly  # type: ignore[method-assign]
    async with server_on(store, engine):
        await learnt(store, sessions)
    assert most == 2, "a quarter of the engine's places"


async def test_a_session_that_somebody_writes_to_keeps_no_other_ones_document_waiting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_max_requests", 4)
    store, writers = Faulty(), Writers(4)
    sessions = [await left_behind(store) for _ in range(3)]
    async with writers.turn(sessions[0]), server_on(store, engine, writers):
        await learnt(store, sessions[1:])
        assert (await store.get(sessions[0])).version == 0
    async with server_on(store, engine, writers):
        await learnt(store, sessions)


def accepted_on(engine: Engine, writers: Writers) -> Accepted:
    ledger, store = Ledger(Faulty()), Faulty()
    learning = Learning(engine, ledger, states_on(store, engine), (3,), num_kept_versions=8, observer=Observer())
    return Accepted(ledger, learning, writers, Leases(ledger), works={})


async def take_place(accepted: Accepted) -> None:
    async with accepted._place("ses_1"):
        pass


async def test_a_writer_that_leaves_as_its_turn_comes_keeps_no_document_waiting(engine: Engine) -> None:
    writers = Writers(4)

    async def write() -> None:
        async with writers.turn("ses_1"):
            await asyncio.sleep(60)

    async with writers.turn("ses_1"):
        document = asyncio.create_task(take_place(accepted_on(engine, writers)))
        await asyncio.sleep(0.01)
        client = asyncio.create_task(write())
        await asyncio.sleep(0.01)
    client.cancel()
    async with asyncio.timeout(SECONDS):
        await document


async def test_a_document_has_its_turn_among_writers_that_overlap(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_max_requests", 4)
    writers = Writers(4)

    async def write() -> None:
        while True:
            async with writers.turn("ses_1"):
                await asyncio.sleep(0.005)

    clients = [asyncio.create_task(write()) for _ in range(2)]
    await asyncio.sleep(0.02)
    async with asyncio.timeout(SECONDS):
        await take_place(accepted_on(engine, writers))
    for client in clients:
        client.cancel()


async def test_a_server_that_retires_begins_with_no_other_document(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_max_requests", 4)
    store, reading, go_on = Faulty(), asyncio.Event(), asyncio.Event()
    sessions, read_log = [await left_behind(store) for _ in range(3)], store.read_log

    async def held(session_id: str, numbers: Sequence[int]) -> Sequence[bytes | None]:
        reading.set()
        await go_on.wait()
        return await read_log(session_id, numbers)

    store.read_log = held  # type: ignore[method-assign]
    async with server_on(store, engine) as (take_over, accepted), asyncio.timeout(SECONDS):
        await reading.wait()
        take_over.stop()
        accepted.retire()
        go_on.set()
        while accepted._tasks:
            await asyncio.wait(accepted._tasks)
        records = [await store.get(session) for session in sessions]
        assert sorted((record.version, len(record.drafts)) for record in records) == [(0, 1), (0, 1), (1, 0)]
    async with server_on(store, engine):
        await learnt(store, sessions)
