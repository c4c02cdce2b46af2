"""A server or its Redis is killed, at every step in turn that makes something durable, and nothing is lost.

Where an answer was lost, what was asked for may be done or not, whole; the client looks, and goes on from there.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import get_args

import pytest
from support.extent import first, whole_or
from support.life import Life
from support.proxy import Fault
from support.sweep import Sweep
from support.tracing import can_trace, inject, when_stopped
from support.world import World
from titans_server.failpoints import Moment

WITHIN_A_STEP = [moment for moment in get_args(Moment) if moment != "during_replay"]
COMMAND = whole_or(b"EVAL", b"")  # commits are scripts; the whole of it is about any command
each_store = pytest.mark.parametrize("world", ["sqlite", "redis"], indirect=True)


@pytest.mark.parametrize("calls", first(1, ["fsync,fdatasync", "rename,unlink", "pwrite64"]))
def test_a_server_killed_on_the_way_into_a_system_call(sqlite: World, sweep: Sweep, calls: str) -> None:
    def damage(position: int) -> AbstractContextManager[object]:
        return inject(sqlite.server.pid, calls, "signal=SIGKILL", position + 1)

    if not can_trace(sqlite.server.pid):
        pytest.skip("needs strace, and leave to use it")
    sweep(("sqlite", "server killed", f"before {calls}"), sqlite.new_life, damage, representative=5)


@pytest.mark.parametrize("calls", first(1, ["fdatasync", "write"]))
def test_a_redis_killed_on_the_way_into_a_system_call(redis: World, sweep: Sweep, calls: str) -> None:
    def damage(position: int) -> AbstractContextManager[object]:
        return inject(redis.redis_server.pid, calls, "signal=SIGKILL", position + 1)

    if not can_trace(redis.redis_server.pid):
        pytest.skip("needs strace, and leave to use it")
    sweep(("redis", "Redis killed", f"before {calls}"), redis.new_life, damage, representative=5)


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
        return redis.proxy.fault(replace(fault, when=COMMAND, skip=position, times=1))

    sweep(("redis", f"{victim} killed", moment), redis.new_life, damage, representative=2)


@each_store
@pytest.mark.parametrize("moment", WITHIN_A_STEP)
def test_a_server_killed_at_a_moment(world: World, sweep: Sweep, moment: str) -> None:
    def damage(position: int) -> AbstractContextManager[object]:
        world.restart_with(TITANS_FAILPOINTS=f"{moment}=kill@{position + 1}")
        return nullcontext()

    sweep((world.kind, "server killed", moment), world.new_life, damage)


@pytest.mark.parametrize("moment", first(1, WITHIN_A_STEP))
def test_a_redis_killed_at_a_moment_of_the_server(redis: World, sweep: Sweep, moment: str) -> None:
    def damage(position: int) -> AbstractContextManager[object]:
        redis.restart_with(TITANS_FAILPOINTS=f"{moment}=stop@{position + 1}")
        return when_stopped(redis.server.pid, redis.kill_redis)

    sweep(("redis", "Redis killed", moment), redis.new_life, damage)


@each_store
def test_a_server_killed_while_it_replays(world: World, sweep: Sweep) -> None:
    """Killed after a step, it has to read again what no snapshot has; and is killed in the middle of that, too."""
    killed_after, lives = 0, list[Life]()

    def kill(num_steps: int) -> None:
        if num_steps == killed_after:
            world.restart_with(TITANS_FAILPOINTS="during_replay=kill")

    def damage(position: int) -> AbstractContextManager[object]:
        nonlocal killed_after
        killed_after = position + 1
        return nullcontext()

    def new_life() -> Life:
        world.recover()
        lives.append(Life(world.server.http, world.recover, kill))
        return lives[-1]

    row = (world.kind, "server killed", "during_replay")
    sweep(row, new_life, damage, lambda: lives[-1].num_steps >= killed_after, representative=2)
    assert any(life.num_troubles for life in lives)
