"""Connections go wrong, between client and server and between server and Redis; each write happens once."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import httpx
import pytest
from support.extent import first, whole_or
from support.life import Life
from support.proxy import CUT, HALF_OPEN, SWALLOWED, SWALLOWED_SILENTLY, Fault, FaultProxy
from support.sweep import Sweep
from support.world import World

FAULTS = {
    "reply swallowed": SWALLOWED,
    "half-open": HALF_OPEN,
    "reply truncated": Fault(reply_bytes=5),
    "reply never sent": SWALLOWED_SILENTLY,
    "cut": CUT,
    "late": Fault(delay=0.1),
}
COMMAND = whole_or(b"EVAL", b"")  # commits are scripts; the whole of it is about any command
each_fault = pytest.mark.parametrize("name", first(2, list(FAULTS)))


@each_fault
def test_a_connection_to_redis_that_goes_wrong(redis: World, sweep: Sweep, name: str) -> None:
    def damage(position: int) -> AbstractContextManager[object]:
        return redis.proxy.fault(replace(FAULTS[name], when=COMMAND, skip=position, times=1))

    sweep(("redis", name, "a command to Redis"), redis.new_life, damage, lambda: redis.proxy.num_befallen > 0, 2)


@pytest.fixture
def door(sqlite: World) -> Iterator[FaultProxy]:
    with FaultProxy(sqlite.server.port) as proxy:
        yield proxy


@pytest.fixture
def http(door: FaultProxy) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{door.port}", timeout=2) as http:
        yield http


@each_fault
def test_a_connection_to_the_server_that_goes_wrong(
    door: FaultProxy, http: httpx.Client, sweep: Sweep, name: str
) -> None:
    def damage(position: int) -> AbstractContextManager[object]:
        return door.fault(replace(FAULTS[name], skip=position, times=1))

    row = ("sqlite", name, "a request to the server")
    sweep(row, lambda: Life(http, lambda: None), damage, lambda: door.num_befallen > 0, 2)
