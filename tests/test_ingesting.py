"""Documents on their way in beside much else to do, and what is left of those whose client leaves."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.engines import service_on
from support.models import make_tiny
from support.records import made
from titans.sampling import SamplingParams
from titans.state import State
from titans_server.engine import Engine
from titans_server.engine.runner import Runner
from titans_server.errors import IngestionCancelled, Overloaded, StoreUnavailable
from titans_server.events import DocumentLearnt
from titans_server.ingesting import Terms
from titans_server.prompts import CompletionRequest
from titans_server.sessions.memory import MemoryStore
from titans_server.sessions.record import SessionRecord
from titans_server.sessions.store import Commit
from titans_server.sessions.uncancelled import Uncancelled

TEXT = "The keeper kept a key under the third stone, and told nobody of it. " * 10
SECONDS = 60.0  # on a machine that has other things to do


class Slow(MemoryStore):
    """A commit takes a while to get there, or its answer to get back."""

    def __init__(self, late: str) -> None:
        super().__init__()
        self._late = late
        self._uncancelled = Uncancelled()
        self.num_commits = 0  # that are on their way, or there

    async def commit(self, commit: Commit) -> None:
        self.num_commits += 1
        await self._uncancelled(self._commit(commit))

    async def _commit(self, commit: Commit) -> None:
        await asyncio.sleep(0.05 * (self._late == "request"))
        await super().commit(commit)
        await asyncio.sleep(0.05 * (self._late == "answer"))


async def endless() -> AsyncIterator[str]:
    """A client that has sent something and sends no more."""
    yield TEXT
    await asyncio.Event().wait()


@pytest.mark.parametrize("late", ["request", "answer"])
@pytest.mark.parametrize("key", ["", "key"])
async def test_a_document_whose_client_leaves_during_its_first_append_is_let_go_of(
    engine: Engine, key: str, late: str
) -> None:
    store = Slow(late)
    session = (await made(store)).id
    service = service_on(store, engine)

    async def send() -> None:
        async for _ in service.ingest(session, endless(), Terms(key)):
            pass

    async with asyncio.timeout(SECONDS):
        sending = asyncio.create_task(send())
        while not store.num_commits:  # noqa: ASYNC110
            await asyncio.sleep(0)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        while (await store.get(session)).revision < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    after = (await store.get(session)).drafts
    assert [x.key for x in after] == ([key] if key else [])
    assert all(x.lease_until <= time.time() for x in after)
    await service.close()


class Leaving(MemoryStore):
    """When it has taken in the end of a document it cannot be reached, for a while."""

    is_away = was_away = False

    async def commit(self, commit: Commit) -> None:
        await super().commit(commit)
        if not self.was_away:
            self.is_away = self.was_away = any(x.accepted for x in commit.record.drafts)

    async def get(self, session_id: str) -> SessionRecord:
        if self.is_away:
            raise StoreUnavailable("the store cannot be reached")
        return await super().get(session_id)


async def test_that_a_document_was_accepted_is_told_whatever_becomes_of_the_store(engine: Engine) -> None:
    store = Leaving()
    session = (await made(store)).id
    service = service_on(store, engine)

    async def pieces() -> AsyncIterator[str]:
        yield TEXT

    told = await service.accept(session, pieces(), Terms())
    assert (told.status, told.committed_bytes) == ("learning", len(TEXT))
    store.is_away = False
    async with asyncio.timeout(SECONDS):
        while (await service.ingestion(told.id)).status != "done":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await service.close()


async def test_a_document_that_goes_on_and_is_cancelled_says_so(engine: Engine) -> None:
    store = MemoryStore()
    session = (await made(store)).id
    service = service_on(store, engine)

    async def pieces(*, are_all: bool) -> AsyncIterator[str]:
        for _ in range(20):
            yield TEXT[:80]
        if not are_all:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        async for _ in service.ingest(session, pieces(are_all=False), Terms("key")):
            pass
    (draft,) = (await store.get(session)).drafts
    assert len(draft.entries) > 10
    events = service.ingest(session, pieces(are_all=True), Terms("key"))
    async with asyncio.timeout(SECONDS):
        await anext(events)
        await service.cancel_ingestion(draft.ingestion)
        with pytest.raises(IngestionCancelled):
            async for _ in events:
                pass
    await service.close()


@asynccontextmanager
async def small_engine() -> AsyncIterator[Engine]:
    """It takes one request at a time."""
    engine = Engine([Runner(make_tiny())], ends={0}, max_requests=1)
    engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def full(engine: Engine) -> "asyncio.Task[State]":
    """Give it all the work that it takes, once it takes some."""
    while True:
        task = asyncio.create_task(engine.ingest(engine.new_state(), list(range(3, 90)) * 10_000))
        await asyncio.sleep(0)
        if not task.done():
            with pytest.raises(Overloaded):
                await engine.ingest(engine.new_state(), [5])
            return task
        assert isinstance(task.exception(), Overloaded)
        await asyncio.sleep(0.01)


async def test_a_document_that_has_begun_goes_on_where_the_server_takes_no_more() -> None:
    store = MemoryStore()
    session = (await made(store)).id
    others: list[asyncio.Task[State]] = []

    async def pieces() -> AsyncIterator[str]:
        yield TEXT * 10
        others.append(await full(engine))
        yield TEXT * 10

    async with small_engine() as engine, asyncio.timeout(SECONDS):
        service = service_on(store, engine)
        events = [event async for event in service.ingest(session, pieces())]
        assert isinstance(events[-1], DocumentLearnt)
        assert not others[0].done()
        others[0].cancel()


async def test_an_answer_that_was_made_is_learnt_where_the_server_takes_no_more() -> None:
    store = MemoryStore()
    session = (await made(store)).id
    request = CompletionRequest("The keeper", 50, SamplingParams(temperature=0), memory="write")
    others: list[asyncio.Task[State]] = []
    async with small_engine() as engine, asyncio.timeout(SECONDS):
        async for piece in service_on(store, engine).answer(session, request):
            if not others:
                assert piece.finish_reason is None
                others.append(await full(engine))
        assert (piece.finish_reason, piece.version) == ("length", 1)
        assert not others[0].done()
        others[0].cancel()
