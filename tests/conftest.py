"""Fixtures that more than one part of the tests needs."""

import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from support.engines import running_engine
from support.redis_server import RedisServer, redis_cluster, redis_sentinel
from titans_server.engine import Engine

torch.set_num_threads(1)  # tiny models: more threads only wait for one another
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")  # the machine may have other things to do


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    """The tiny model's, running."""
    async with running_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis that the tests of a file share: use ids of your own, and leave its settings alone.

    What they leave in it, no other file finds: API keys, of which the first closes the door to whoever has none.
    """
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server.url
    server.kill(signal.SIGTERM)


@pytest.fixture(scope="module")
def redis_cluster_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same, as a cluster of two."""
    with redis_cluster(tmp_path_factory.mktemp("redis-cluster")) as url:
        yield url


@pytest.fixture(scope="module")
def redis_sentinel_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same, behind a Sentinel."""
    with redis_sentinel(tmp_path_factory.mktemp("redis-sentinel")) as url:
        yield url


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[Callable[[], RedisServer]]:
    """Starts a Redis for this test alone, which may kill it and change its settings."""
    servers: list[RedisServer] = []

    def start() -> RedisServer:
        folder = tmp_path / f"redis-{len(servers)}"
        folder.mkdir()
        servers.append(RedisServer(folder))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.kill()
