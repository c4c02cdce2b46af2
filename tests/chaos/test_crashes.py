"""A server or its Redis is killed, at every step in turn that makes something durable, and nothing is lost.

Where an answer was lost, what was asked for may be done or not, whole; the client looks, and goes on from there.
"""

from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
from support.proxy import Fault
from support.sweep import Sweep
from support.tracing import can_trace, inject
from support.world import World


@pytest.mark.parametrize("calls", ["fsync,fdatasync", "rename,unlink", "pwrite64"])
def test_a_server_killed_on_the_way_into_a_system_call(sqlite: World, sweep: Sweep, calls: str) -> None:
    def damage(position: int) -> AbstractContextManager[object]:
        return inject(sqlite.server.pid, calls, "signal=SIGKILL", position + 1)

    if not can_trace(sqlite.server.pid):
        pytest.skip("needs strace, and leave to use it")
    sweep(("sqlite", "server killed", f"before {calls}"), sqlite.new_life, damage)


@pytest.mark.parametrize("calls", ["fdatasync", "write"])
def test_a_redis_killed_on_the_way_into_a_system_call(redis: World, sweep: Sweep, calls: str) -> None:
    def damage(position: int) -> AbstractContextManager[object]:
        return inject(redis.redis_server.pid, calls, "signal=SIGKILL", position + 1)

    if not can_trace(redis.redis_server.pid):
        pytest.skip("needs strace, and leave to use it")
    sweep(("redis", "Redis killed", f"before {calls}"), redis.new_life, damage)


@pytest.mark.parametrize("victim", ["server", "Redis"])
@pytest.mark.parametrize("moment", ["before a command to Redis", "before a reply of Redis"])
def test_a_kill_between_server_and_redis(redis: World, sweep: Sweep, victim: str, moment: str) -> None:
    kill = redis.kill_redis if victim == "Redis" else redis.kill_server

    def damage(position: int) -> AbstractContextManager[object]:
        fault = (
            Fault(at_request=kill, request_bytes=0)
            if moment == "before a command to Redis"
            else Fault(at_reply=kill, reply_bytes=0)
        )
        return redis.proxy.fault(replace(fault, skip=position, times=1))

    sweep(("redis", f"{victim} killed", moment), redis.new_life, damage)
