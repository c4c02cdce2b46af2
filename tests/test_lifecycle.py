"""A server's life: what it says to work at each moment."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from support.models import write_tiny_checkpoint
from support.servers import LiveServer, free_port
from titans_server import app
from titans_server.errors import Loading, ModelFailed, ShuttingDown
from titans_server.lifecycle import Lifecycle
from titans_server.settings import Settings


class Worker:
    """Work that ends when it is told to."""

    num_requests = 0
    alive = True
    num_closed = 0

    def is_alive(self) -> bool:
        return self.alive

    async def close(self) -> None:
        self.num_closed += 1
        self.num_requests = 0


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
async def life(worker: Worker) -> AsyncIterator[Lifecycle[str]]:
    life = Lifecycle[str]()
    life.ready("served", worker)
    yield life


def never() -> bool:
    return False


async def test_it_loads_beside_its_other_work() -> None:
    life, go_on = Lifecycle[str](), asyncio.Event()

    async def load() -> None:
        await go_on.wait()
        life.ready("served", Worker())

    async with life.loading(load):
        with pytest.raises(Loading), life.in_flight():
            pass
        go_on.set()
        await asyncio.sleep(0.01)
        assert life.check() == "served"


async def test_a_model_that_cannot_be_loaded_is_told_to_everybody(caplog: pytest.LogCaptureFixture) -> None:
    async def load() -> None:
        raise OSError("no such file")

    life = Lifecycle[str]()
    async with life.loading(load):
        await asyncio.sleep(0.01)
        assert life.has_failed
        with pytest.raises(ModelFailed):
            life.check()
    assert "no such file" in caplog.text


async def test_a_thread_that_has_ended_is_told(life: Lifecycle[str], worker: Worker) -> None:
    worker.alive = False
    with pytest.raises(ModelFailed, match="thread"):
        life.check()


async def test_loading_is_given_up_at_the_end() -> None:
    async with asyncio.timeout(1), Lifecycle[str]().loading(asyncio.Event().wait):  # type: ignore[arg-type]
        pass


async def test_a_drain_waits_for_requests_and_for_work_without_one(life: Lifecycle[str], worker: Worker) -> None:
    worker.num_requests = 1
    with life.in_flight():
        drain = asyncio.create_task(life.drain(60, never))
        await asyncio.sleep(0.1)
        with pytest.raises(ShuttingDown):
            life.check()
    await asyncio.sleep(0.1)
    assert not drain.done()
    worker.num_requests = 0
    async with asyncio.timeout(1):
        await drain
    assert not worker.num_closed and not life.is_stopping


async def test_a_drain_waits_for_a_stream_that_nobody_reads_and_that_asks_for_nothing_just_now(worker: Worker) -> None:
    streams, life = ["a document between two strides"], Lifecycle[str]()
    retired: list[bool] = []
    life.ready("served", worker, num_streams=lambda: len(streams), retire=lambda: retired.append(life.is_draining))
    drain = asyncio.create_task(life.drain(60, never))
    await asyncio.sleep(0.1)
    assert not drain.done()
    streams.clear()
    async with asyncio.timeout(1):
        await drain
    assert not worker.num_closed and retired == [True]


async def test_what_is_left_is_ended_and_given_time_to_say_so(life: Lifecycle[str], worker: Worker) -> None:
    async def upload() -> None:
        with life.in_flight():
            try:
                with life.reading():
                    await asyncio.sleep(60)
            except ShuttingDown:
                await asyncio.sleep(0.1)  # telling the client
                raise

    task = asyncio.create_task(upload())
    await asyncio.sleep(0)
    await life.drain(0.1, never)
    assert worker.num_closed == 1
    with pytest.raises(ShuttingDown):
        await task
    with pytest.raises(ShuttingDown), life.reading():
        pass


async def test_a_client_that_leaves_is_not_told_that_the_server_ends(life: Lifecycle[str]) -> None:
    async def upload() -> None:
        with life.reading():
            await asyncio.sleep(60)

    task = asyncio.create_task(upload())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_whoever_is_hurried_waits_for_nothing(life: Lifecycle[str], worker: Worker) -> None:
    with life.in_flight():
        async with asyncio.timeout(1):
            await life.drain(60, lambda: True)
    assert worker.num_closed == 1


def test_a_server_that_loads_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = app._load

    def slowly(settings: Settings, device: str) -> object:
        time.sleep(1.5)
        return load(settings, device)

    checkpoint = write_tiny_checkpoint(tmp_path)
    monkeypatch.setattr(app, "_load", slowly)
    settings = Settings(port=free_port(), store="memory://", body=checkpoint.body, memory=checkpoint.memory, threads=1)
    server = LiveServer(settings)
    server.start()
    try:
        with httpx.Client(base_url=server.url) as http:
            for path in ("/health/ready", "/v1/models", "/v1/sessions/none"):
                response = http.get(path)
                assert (response.status_code, response.json()["error"]["code"]) == (503, "loading"), path
                assert int(response.headers["retry-after"]) > 0
            assert http.get("/health/live").status_code == 200
            assert http.get("/metrics").status_code == 200
            server.wait_until_ready()
            assert http.get("/health/ready").json()["status"] == "ready"
    finally:
        server.stop()
