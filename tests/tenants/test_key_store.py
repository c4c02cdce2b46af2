"""Every place that keeps keys keeps them alike."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from titans_server.errors import StoreUnavailable
from titans_server.sessions import redis_client
from titans_server.tenants import keys
from titans_server.tenants.quotas import Quotas
from titans_server.tenants.store import KeyStore, open_keys


@pytest.fixture(params=["memory", "sqlite", "redis", "redis_cluster", "redis_sentinel"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param.startswith("redis"):
        found = str(request.getfixturevalue(f"{request.param}_url"))
        client = redis_client.connect(found, max_connections=1)
        await client.delete("titans:api-keys")
        await client.aclose()
        return found
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/new/folder/titans.db"


@pytest.fixture
async def store(url: str) -> AsyncIterator[KeyStore]:
    store = open_keys(url)
    yield store
    await store.close()


async def test_what_is_put_is_there_and_what_is_not_is_none(store: KeyStore) -> None:
    assert await store.is_empty()
    assert await store.list() == []
    key, _ = keys.make("bob", 2.0, Quotas(sessions=1))
    await store.put(key)
    assert await store.get(key.id) == key
    assert await store.get("0" * 16) is None
    assert not await store.is_empty()


async def test_a_key_is_replaced_by_its_id_and_the_oldest_is_listed_first(store: KeyStore) -> None:
    late, _ = keys.make("late", 9.0)
    early, _ = keys.make("early", 1.0)
    for key in (late, early, replace(late, revoked_at=10.0)):
        await store.put(key)
    assert [(key.name, key.revoked_at) for key in await store.list()] == [("early", None), ("late", 10.0)]


async def test_many_at_once(store: KeyStore) -> None:
    made = [keys.make(str(i), float(i))[0] for i in range(20)]
    await asyncio.gather(*map(store.put, made))
    assert await asyncio.gather(*(store.get(key.id) for key in made)) == made
    assert await store.list() == made


@pytest.mark.parametrize("url", ["sqlite", "redis"], indirect=True)
async def test_another_process_sees_it(store: KeyStore, url: str) -> None:
    key, _ = keys.make("bob", 2.0)
    await store.put(key)
    other = open_keys(url)
    assert await other.get(key.id) == key
    await other.close()


async def test_a_redis_that_is_gone_is_told_as_such(start_redis: Callable[[], object]) -> None:
    server = start_redis()
    store = open_keys(server.url)  # type: ignore[attr-defined]
    server.kill()  # type: ignore[attr-defined]
    with pytest.raises(StoreUnavailable):
        await store.get("0" * 16)
    await store.close()


async def test_a_file_that_is_no_database_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "titans.db").write_text("no database" * 100)
    with pytest.raises(StoreUnavailable, match="not a database"):
        await open_keys(f"sqlite:///{tmp_path}/titans.db").is_empty()


async def test_keys_and_sessions_share_a_database(tmp_path: Path) -> None:
    from titans_server.sessions.open import open_store

    url = f"sqlite:///{tmp_path}/titans.db"
    key, _ = keys.make("bob", 2.0)
    await open_keys(url).put(key)
    sessions = open_store(url)
    await sessions.open()
    await sessions.ping()
    assert await open_keys(url).get(key.id) == key
    await sessions.close()
    with sqlite3.connect(tmp_path / "titans.db") as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    database.close()
    assert {"sessions", "api_keys"} <= tables
