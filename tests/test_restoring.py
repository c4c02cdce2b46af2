"""A session is put back after what was accepted before, on whatever server, or not at all."""

import time
from dataclasses import replace

import pytest
from support.accepted import left_behind
from support.engines import service_on
from titans_server import accepted
from titans_server.engine import Engine
from titans_server.errors import SessionBusy, StateMismatch, VersionConflict, VersionNotFound
from titans_server.sessions import history
from titans_server.sessions.ledger import Ledger
from titans_server.sessions.memory import MemoryStore
from titans_server.sessions.record import Snapshot, Version


async def test_another_models_session_is_not_put_back_nor_is_its_document_lost(engine: Engine) -> None:
    store = MemoryStore()
    service, session = service_on(store, engine), await left_behind(store)
    kept = store._sessions[session]
    kept.record = replace(kept.record, fingerprint="e" * 32)
    with pytest.raises(StateMismatch):
        await service.restore(session, 0, None)
    with pytest.raises(StateMismatch):
        await service._ingestions.settle(session)
    assert len((await store.get(session)).drafts) == 1
    await service.close()


async def test_what_would_be_gone_by_its_turn_is_not_waited_for(engine: Engine) -> None:
    store = MemoryStore()
    service, session = service_on(store, engine), await left_behind(store)
    kept = store._sessions[session]
    (draft,) = kept.record.drafts
    many = tuple(replace(draft, ingestion=f"ing_{i}") for i in range(8))
    kept.record = replace(kept.record, drafts=many)
    with pytest.raises(SessionBusy, match="version 0 would be gone"):
        await service.restore(session, 0, None)
    with pytest.raises(VersionNotFound):
        await service.restore(session, 1, None)
    with pytest.raises(VersionConflict):
        await service.restore(session, 0, 3)
    assert (await store.get(session)).drafts == many
    old = kept.record.head
    newer = tuple(replace(old, number=i, write_id=f"{i}") for i in range(1, 12))
    kept.record = replace(kept.record, versions=(old, *newer), drafts=())  # as a server kept them that keeps more
    assert (await service.restore(session, 0, None)).version == 12
    await service.close()


@pytest.mark.parametrize("change", ["restore", "state"])
async def test_what_is_put_back_is_put_back_after_what_was_accepted_before(engine: Engine, change: str) -> None:
    store = MemoryStore()
    service, session = service_on(store, engine), await left_behind(store)
    if change == "restore":
        record = await service.restore(session, 0, None)
    else:
        *_, empty = await service.export_state(session, 0)
        record = await service.import_state(session, empty, None)
    assert (record.version, record.tokens_seen, record.drafts) == (2, 0, ())
    assert [outcome.version for outcome in record.outcomes] == [1]
    await service.close()


async def test_a_session_is_not_put_back_while_another_server_learns(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepted, "_WAIT_SECONDS", 0.3)
    store = MemoryStore()
    service, session = service_on(store, engine), await left_behind(store)
    await Ledger(store).change(session, lambda record: history.take(record, f"ing_{session}", "another"))
    with pytest.raises(SessionBusy):
        await service.restore(session, 0, None)
    assert (await store.get(session)).version == 0
    await service.close()


async def test_a_session_is_put_back_though_what_was_accepted_cannot_follow_what_it_is(engine: Engine) -> None:
    store = MemoryStore()
    service, session = service_on(store, engine), await left_behind(store)
    kept = store._sessions[session]
    torn = Snapshot("torn", "0" * 64, 4, 7)
    head = Version(1, 7, time.time(), "torn", torn)
    kept.record = replace(kept.record, versions=(*kept.record.versions, head))
    record = await service.restore(session, 0, None)
    assert (record.version, record.tokens_seen, len(record.drafts)) == (2, 0, 1)
    await service.close()
