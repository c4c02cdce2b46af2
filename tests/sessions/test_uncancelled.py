"""An operation outlives the caller that asked for it."""

import asyncio
import gc

import pytest
from titans_server.sessions.uncancelled import Uncancelled


async def test_results_and_errors_reach_the_caller() -> None:
    async def answer() -> int:
        return 42

    async def fail() -> None:
        raise KeyError("gone")

    uncancelled = Uncancelled()
    assert await uncancelled(answer()) == 42
    with pytest.raises(KeyError):
        await uncancelled(fail())


async def test_an_operation_ends_though_its_caller_is_cancelled() -> None:
    uncancelled, gate, done = Uncancelled(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await gate.wait()
        done.set()

    caller = asyncio.create_task(uncancelled(work()))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    gc.collect()  # nobody but the helper holds the task now
    gate.set()
    await uncancelled.drain()
    assert done.is_set()


async def test_an_error_that_nobody_waits_for_makes_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    uncancelled, gate = Uncancelled(), asyncio.Event()

    async def fail() -> None:
        await gate.wait()
        raise KeyError("gone")

    caller = asyncio.create_task(uncancelled(fail()))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    gate.set()
    await uncancelled.drain()
    await asyncio.sleep(0)
    gc.collect()
    assert not caplog.records


async def test_draining_nothing_returns() -> None:
    await Uncancelled().drain()
