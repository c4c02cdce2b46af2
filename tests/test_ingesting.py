"""Documents on their way in, and what is left of those whose client leaves."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from support.engines import service_on
from support.records import made
from titans_server.engine import Engine
from titans_server.ingesting import Terms
from titans_server.sessions.memory import MemoryStore
from titans_server.sessions.store import Commit

TEXT = "The keeper kept a key under the third stone, and told nobody of it. " * 10
SECONDS = 60.0  # on a machine that has other things to do


class Slow(MemoryStore):
    """Its answer to a commit takes a while."""

    async def commit(self, commit: Commit) -> None:
        await super().commit(commit)
        await asyncio.sleep(0.05)


async def endless() -> AsyncIterator[str]:
    """A client that has sent something and sends no more."""
    yield TEXT
    await asyncio.Event().wait()


@pytest.mark.parametrize("key", ["", "key"])
async def test_a_document_whose_client_leaves_during_its_first_append_is_let_go_of(engine: Engine, key: str) -> None:
    store = Slow()
    session = (await made(store)).id
    service = service_on(store, engine)

    async def send() -> None:
        async for _ in service.ingest(session, endless(), Terms(key)):
            pass

    async with asyncio.timeout(SECONDS):
        sending = asyncio.create_task(send())
        while not (drafts := (await store.get(session)).drafts):  # noqa: ASYNC110
            await asyncio.sleep(0)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        while (await store.get(session)).drafts == drafts:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    after = (await store.get(session)).drafts
    assert [x.key for x in after] == ([key] if key else [])
    assert all(x.lease_until <= time.time() for x in after)
    await service.close()
