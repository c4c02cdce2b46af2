"""Accepted documents whose server is gone, in a store that fails, and as much of a server as goes on with them."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from support.engines import states_on
from support.records import made
from titans_server import accepted, takeover
from titans_server.accepted import Accepted
from titans_server.engine import Engine
from titans_server.errors import VersionConflict
from titans_server.learning import Learning
from titans_server.leases import Leases
from titans_server.observer import Observer
from titans_server.sessions import history
from titans_server.sessions.history import Portion
from titans_server.sessions.ledger import Ledger
from titans_server.sessions.memory import MemoryStore
from titans_server.sessions.record import Draft, SessionRecord
from titans_server.sessions.store import Commit
from titans_server.takeover import TakeOver
from titans_server.writers import Writers

TOKENS = tuple(range(3, 90))
SECONDS = 60.0  # on a machine that has other things to do


class Faulty(MemoryStore):
    """Fails as no store should."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = ""  # a session, which comes first wherever there are several
        self.endless = ""  # another one, whose record is never done with being read
        self.num_tries = 0  # to read the broken one
        self.faults: list[str] = []  # that are still to come

    async def due(self) -> Sequence[str]:
        self._fail_if("due")
        return sorted(await super().due(), key=lambda name: name not in {self.broken, self.endless})

    async def get(self, session_id: str) -> SessionRecord:
        if session_id == self.endless:
            await asyncio.Event().wait()
        if session_id == self.broken:
            self.num_tries += 1
            raise RuntimeError("unforeseen")
        return await super().get(session_id)

    async def commit(self, commit: Commit) -> None:
        if commit.record.version and "race" in self.faults:
            self.faults.remove("race")
            raise VersionConflict("others are always faster")
        await super().commit(commit)

    async def read_log(self, session_id: str, numbers: Sequence[int]) -> Sequence[bytes | None]:
        self._fail_if("log")
        return await super().read_log(session_id, numbers)

    def _fail_if(self, what: str) -> None:
        if what in self.faults:
            self.faults.remove(what)
            raise RuntimeError("unforeseen")


def be_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look, and try again, in hundredths of a second."""
    monkeypatch.setattr(takeover, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(takeover, "_MAX_BROKEN_PAUSE", 0.2)
    monkeypatch.setattr(accepted, "_MIN_PAUSE", 0.01)
    monkeypatch.setattr(accepted, "_MAX_FAULT_PAUSE", 0.02)


@asynccontextmanager
async def server_on(
    store: MemoryStore, engine: Engine, writers: Writers | None = None, observer: Observer | None = None
) -> AsyncIterator[tuple[TakeOver, Accepted]]:
    """As much of a server as takes over."""
    ledger, states = Ledger(store), states_on(store, engine)
    learning = Learning(engine, ledger, states, (3,), num_kept_versions=8, observer=observer or Observer())
    accepted = Accepted(ledger, learning, writers or Writers(4), Leases(ledger), works={})
    take_over = TakeOver(store, states, accepted)
    take_over.start()
    try:
        yield take_over, accepted
    finally:
        await take_over.close()
        await accepted.close()


async def left_behind(store: MemoryStore, if_match: int | None = None, *, tokens: Sequence[int] = TOKENS) -> str:
    """A session with an accepted document whose server is gone."""
    record, ledger = await made(store), Ledger(store)
    draft = Draft(f"ing_{record.id}", "gone", 0.0, time.time(), is_async=True, if_match=if_match)
    portion = Portion(tokens, len(tokens), hashlib.sha256(b"text").hexdigest(), is_last=True)
    await ledger.change(record.id, lambda record: history.append(record, draft, (3,), portion))
    await ledger.change(record.id, lambda record: history.renew(record, draft.ingestion, "gone", seconds=0))
    return record.id


async def learnt(store: MemoryStore, sessions: list[str]) -> None:
    """Return when the sessions' documents are."""
    async with asyncio.timeout(SECONDS):
        while {(await store.get(name)).version for name in sessions} != {1}:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
