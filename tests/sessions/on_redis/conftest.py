"""A Redis of a test's own, which it may kill, and a session in it."""

from collections.abc import AsyncIterator, Callable

import pytest
from support.records import STATE, made_with_snapshot
from support.redis_server import RedisServer
from titans_server.sessions.record import SessionRecord
from titans_server.sessions.redis import RedisStore


@pytest.fixture
def server(start_redis: Callable[[], RedisServer]) -> RedisServer:
    return start_redis()


@pytest.fixture
async def store(server: RedisServer) -> AsyncIterator[RedisStore]:
    store = RedisStore(server.url)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def record(store: RedisStore) -> SessionRecord:
    """A session at version 1, with the snapshot STATE."""
    return await made_with_snapshot(store, STATE)
