"""One model on several devices: a session stays where its state is, and is as if alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from support.models import make_tiny, write_tiny_checkpoint
from support.servers import LiveServer, free_port
from titans.sampling import Drawn, SamplingParams
from titans_client import Client
from titans_server.engine import Engine, Generation, Ingestion
from titans_server.engine.runner import Prefilled, Runner
from titans_server.settings import Settings

GREEDY = SamplingParams(temperature=0)


class Counting(Runner):
    """How many portions of documents and of prompts it has read."""

    num_portions = 0

    def ingest(self, chunks: list[tuple[Ingestion, int]]) -> None:
        self.num_portions += len(chunks)
        super().ingest(chunks)

    def prefill(self, parts: list[tuple[Generation, int]]) -> dict[Generation, Prefilled]:
        self.num_portions += len(parts)
        return super().prefill(parts)


class Elsewhere(Runner):
    """On another device, as far as it says."""

    @property
    def device(self) -> torch.device:
        return torch.device("meta")


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, 259, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


async def read_and_answer(engine: Engine, seed: int) -> list[Drawn | str]:
    state = await engine.ingest(engine.new_state(), tokens(100 + seed, seed))
    stream = engine.generate(state, tokens(5, seed + 50), max_tokens=12, sampling=GREEDY)
    return [token async for token in stream if isinstance(token, Drawn | str)]


@asynccontextmanager
async def started(*runners: Runner) -> AsyncIterator[Engine]:
    engine = Engine(runners, ends={2}, max_requests=8)
    engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def test_sessions_on_two_devices_are_each_as_alone() -> None:
    async with started(Runner(make_tiny())) as engine:
        one_by_one = [await read_and_answer(engine, seed) for seed in range(6)]
    runners = [Counting(make_tiny()) for _ in range(2)]
    async with started(*runners) as engine:
        assert await asyncio.gather(*(read_and_answer(engine, seed) for seed in range(6))) == one_by_one
        before = [runner.num_portions for runner in runners]
        assert all(before), "both had their share"
        assert [await read_and_answer(engine, seed) for seed in range(4)] == one_by_one[:4]
        assert all(runner.num_portions > count for runner, count in zip(runners, before, strict=True)), "and by turns"
    assert not engine.is_alive()
    assert engine.num_requests == 0


async def test_a_state_is_placed_once_and_stays() -> None:
    cpu, one, two = Runner(make_tiny()), Elsewhere(make_tiny()), Elsewhere(make_tiny())
    engine = Engine([one, two], ends={2})
    state = engine.new_state()
    assert state.position.device == torch.device("cpu"), "nobody's yet"
    placed = await engine.place(state)
    assert {x.device for x in placed.parts().values()} == {torch.device("meta")}
    assert await engine.place(placed) is placed
    assert await Engine([one, cpu], ends={2}).place(state) is state, "it is on one of them"
    assert await Engine([cpu], ends={2}).place(state) is state


def test_a_server_on_two_devices(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path)
    files = {"body": checkpoint.body, "memory": checkpoint.memory, "threads": 1}
    answers: list[list[str]] = []
    for device in ("cpu", "cpu,cpu"):
        store = f"sqlite:///{tmp_path}/titans.db"  # the second server reads what the first has kept
        settings = Settings(port=free_port(), store=store, device=device, **files)  # type: ignore[arg-type]
        with LiveServer(settings) as server, Client(server.url) as client:
            assert client.health().device == device
            sessions = client.sessions.list().data if answers else [client.sessions.create() for _ in range(4)]
            for i, session in enumerate(sorted(sessions, key=lambda x: x.created_at)):
                if not answers:
                    client.ingest(session.id, f"The code of the red door is {1000 + i}. " * 5)
            names = [session.id for session in sorted(sessions, key=lambda x: x.created_at)]
            answers.append([client.complete(name, "The code", max_tokens=8, temperature=0).text for name in names])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("device", ["gpu", "", "cuda:", "cuda:0,", "cpu cpu", "cuda:0;cuda:1", "cuda:0,cpu"])
def test_what_is_no_device_is_refused(device: str) -> None:
    with pytest.raises(ValidationError):
        Settings(device=device)


def test_devices_are_listed_with_commas() -> None:
    assert Settings(device="cuda:0,cuda:1").devices == ["cuda:0", "cuda:1"]
    assert Settings().devices == ["auto"]
