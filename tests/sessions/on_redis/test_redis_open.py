"""What the Redis store demands of a server, and what it warns of, when it is opened."""

import logging
from pathlib import Path

import pytest
from support.redis_server import RedisServer, redis_cluster
from titans_server.errors import StoreUnavailable
from titans_server.sessions import redis_client
from titans_server.sessions.redis import RedisStore


async def test_a_good_server_is_opened_in_silence(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    store = RedisStore(server.url)
    await store.open()
    await store.close()
    assert not caplog.records


async def test_a_server_that_may_forget_is_warned_of(
    server: RedisServer, store: RedisStore, caplog: pytest.LogCaptureFixture
) -> None:
    server.command("CONFIG", "SET", "appendfsync", "everysec")
    await store.check()
    server.command("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
    server.command("CONFIG", "SET", "appendonly", "no")
    await store.check()
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    for text in ("appendfsync is everysec", "volatile-lru", "append-only file is off"):
        assert text in caplog.text


@pytest.mark.parametrize("num_nodes", [1, 2])
async def test_every_primary_of_a_cluster_is_checked(
    tmp_path: Path, num_nodes: int, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_cluster(tmp_path, num_nodes) as url:
        store = RedisStore(url)
        await store.open()
        assert not caplog.records
        primaries = store._client.get_primaries()
        assert len(primaries) == num_nodes
        for node in primaries:
            await store._client.config_set("appendfsync", "everysec", target_nodes=node)
            await store.check()
            assert caplog.text.count("appendfsync is everysec") == 1
            caplog.clear()
            await store._client.config_set("appendfsync", "always", target_nodes=node)
        await store.close()


async def test_a_server_that_evicts_sessions_is_refused(server: RedisServer, store: RedisStore) -> None:
    server.command("CONFIG", "SET", "maxmemory", "100mb")
    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    evicting = RedisStore(server.url)
    with pytest.raises(StoreUnavailable, match=r"allkeys-lru.*noeviction"):
        await evicting.open()
    await evicting.close()


@pytest.mark.parametrize("text", ["6.0.16", "5.0"])
def test_an_old_server_is_refused(text: str) -> None:
    with pytest.raises(StoreUnavailable, match=f"{text}.*needs 6.2"):
        redis_client._check_version(text)
    for fine in ("6.2.0", "7.0.15", "10.1", "", "unstable"):
        redis_client._check_version(fine)


async def test_a_server_that_cannot_be_checked_is_warned_of(
    server: RedisServer, store: RedisStore, caplog: pytest.LogCaptureFixture
) -> None:
    server.command("ACL", "SETUSER", "ada", "on", ">right", "~*", "+@all", "-info")
    guarded = RedisStore(server.url.replace("redis://", "redis://ada:right@"))
    await guarded.open()
    await guarded.close()
    assert "does not let INFO be read" in caplog.text
    assert "maxmemory_policy cannot be checked" in caplog.text
    assert "append-only file cannot be checked" in caplog.text


async def test_a_newer_format_is_refused(server: RedisServer) -> None:
    server.command("SET", "titans:format", 99)
    store = RedisStore(server.url)
    with pytest.raises(StoreUnavailable, match="format 99"):
        await store.open()
    await store.close()
