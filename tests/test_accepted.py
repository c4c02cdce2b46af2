"""Accepted documents that a server is gone from, taken over beside errors that nobody foresaw."""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Sequence

import pytest
from support.models import make_tiny
from support.records import made
from titans_server import accepted
from titans_server.accepted import Accepted
from titans_server.engine import Engine
from titans_server.engine.runner import Runner
from titans_server.learning import Learning, Work
from titans_server.leases import Leases
from titans_server.observer import Observer
from titans_server.sessions import history
from titans_server.sessions.cache import StateCache
from titans_server.sessions.history import Portion
from titans_server.sessions.ledger import Ledger
from titans_server.sessions.memory import MemoryStore
from titans_server.sessions.record import Draft, SessionRecord
from titans_server.states import SnapshotPolicy, States
from titans_server.writers import Writers

TOKENS = tuple(range(3, 90))


class Faulty(MemoryStore):
    """Fails as no store should: once when it is asked what is due, once for a log, always for one session."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = ""
        self.num_faults = 0
        self._are_due: list[str] = ["due", "log"]

    async def due(self) -> Sequence[str]:
        self._fail_once("due")
        return sorted(await super().due(), key=lambda name: name != self.broken)  # the broken one comes first

    async def get(self, session_id: str) -> SessionRecord:
        if session_id == self.broken:
            self.num_faults += 1
            raise RuntimeError("unforeseen")
        return await super().get(session_id)

    async def read_log(self, session_id: str, numbers: Sequence[int]) -> Sequence[bytes | None]:
        self._fail_once("log")
        return await super().read_log(session_id, numbers)

    def _fail_once(self, what: str) -> None:
        if what in self._are_due:
            self._are_due.remove(what)
            self.num_faults += 1
            raise RuntimeError("unforeseen")


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine(Runner(make_tiny()), eos_token=0)
    engine.start()
    yield engine
    await engine.close()


def accepted_on(store: MemoryStore, engine: Engine, works: dict[str, Work]) -> Accepted:
    ledger, observer = Ledger(store), Observer()
    policy = SnapshotPolicy(tokens=10_000, idle_seconds=1000)
    states = States(engine, ledger, "f" * 32, StateCache(1 << 30), policy=policy, observer=observer)
    learning = Learning(engine, ledger, states, (3,), num_kept_versions=8, observer=observer)
    return Accepted(ledger, states, learning, Writers(4), Leases(ledger), works=works)


async def left_behind(store: MemoryStore) -> str:
    """A session with an accepted document whose server is gone."""
    record, ledger = await made(store), Ledger(store)
    draft = Draft(f"ing_{record.id}", "gone", 0.0, time.time(), is_async=True)
    portion = Portion(TOKENS, len(TOKENS), hashlib.sha256(b"text").hexdigest(), is_last=True)
    await ledger.change(record.id, lambda record: history.append(record, draft, (3,), portion))
    await ledger.change(record.id, lambda record: history.renew(record, draft.ingestion, "gone", seconds=0))
    return record.id


async def test_an_unforeseen_error_is_logged_and_the_others_go_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(accepted, "_WATCH_SECONDS", 0.01)
    store, works = Faulty(), dict[str, Work]()
    broken, *whole = [await left_behind(store) for _ in range(3)]
    store.broken = broken
    taking_over = accepted_on(store, engine, works)
    with caplog.at_level(logging.ERROR):
        taking_over.start()
        async with asyncio.timeout(60):
            while [(await store.get(name)).version for name in whole] != [1, 1] or works:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await taking_over.close()
    assert store.num_faults >= 3
    told = [record.message for record in caplog.records if record.exc_info]
    assert "cannot look for work that was left: a fault of the server's" in told
    assert f"cannot go on with session {broken}: a fault of the server's" in told
    assert any("waits: a fault of the server's" in message for message in told)
    store.broken = ""
    (draft,) = (await store.get(broken)).drafts
    assert draft.accepted, "it is left as it is"
