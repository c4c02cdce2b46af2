"""Many sessions over few places in memory: all but a handful are in the store at any time, and none notices."""

import asyncio
import os
import random
import re
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.models import TinyCheckpoint
from support.servers import ServerProcess
from titans_client import AsyncClient, Client

NUM_SESSIONS = int(os.environ.get("TITANS_TEST_SESSIONS", "60"))
ROUNDS = 3
AT_ONCE = 24
PLACES = 8
WORDS = "amber anchor arrow barrel beacon candle canyon copper crystal dragon engine falcon garden harbor jade".split()


@pytest.fixture(scope="module")
def roomy(checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess("memory://", tmp_path_factory.mktemp("roomy") / "log", checkpoint.environment) as server:
        yield server


@pytest.fixture
def crowded(checkpoint: TinyCheckpoint, roomy: ServerProcess, tmp_path: Path) -> Iterator[ServerProcess]:
    with Client(roomy.url) as client:
        size = client.sessions.create().state_bytes
    few = checkpoint.environment | {"TITANS_RESIDENT_BYTES": str(PLACES * size)}
    with ServerProcess(f"sqlite:///{tmp_path}/titans.db", tmp_path / "log", few) as server:
        yield server


def pieces_of(number: int) -> list[str]:
    """A session's documents, unlike all others'."""
    rng = random.Random(number)
    return [" ".join(rng.choices(WORDS, k=rng.randint(2, 24))) + ". " for _ in range(ROUNDS)]


async def all_of(jobs: Sequence[Coroutine[Any, Any, Any]], at_once: int) -> list[Any]:
    """Their results, so many at a time."""
    places = asyncio.Semaphore(at_once)

    async def one(job: Coroutine[Any, Any, Any]) -> Any:
        async with places:
            return await job

    return await asyncio.gather(*map(one, jobs))


async def answer(client: AsyncClient, session: str) -> str:
    return (await client.complete(session, "what?", temperature=0, max_tokens=8)).text


async def test_sessions_far_beyond_the_places_in_memory_are_each_as_if_alone(
    crowded: ServerProcess, roomy: ServerProcess
) -> None:
    order, rng = list(range(NUM_SESSIONS)), random.Random(0)
    async with AsyncClient(crowded.url) as client:
        created = await all_of([client.sessions.create() for _ in order], AT_ONCE)
        sessions = [session.id for session in created]
        for turn in range(ROUNDS):
            rng.shuffle(order)
            posts = [client.ingest(sessions[i], pieces_of(i)[turn]) for i in order]
            asked = [answer(client, sessions[i]) for i in rng.sample(order, NUM_SESSIONS // 3)]
            await all_of(rng.sample([*posts, *asked], len(posts) + len(asked)), AT_ONCE)
        answers = await all_of([answer(client, session) for session in sessions], AT_ONCE)
        infos = await all_of([client.sessions.get(session) for session in sessions], AT_ONCE)
    assert [info.version for info in infos] == [ROUNDS] * NUM_SESSIONS
    page = crowded.http.get("/metrics").text
    (resident,) = re.findall(r'titans_resident_sessions\{.*tier="memory".*\} (\S+)', page)
    (loads,) = re.findall(r"titans_load_seconds_count(?:\{.*\})? (\S+)", page)
    assert float(resident) <= PLACES
    assert float(loads) > NUM_SESSIONS, "nearly every request had to bring its session in"

    async with AsyncClient(roomy.url) as client:
        for i in range(NUM_SESSIONS):
            session = await client.sessions.create()
            for piece in pieces_of(i):
                await client.ingest(session.id, piece)
            assert await answer(client, session.id) == answers[i], f"session {i}"
    assert len(set(answers)) > NUM_SESSIONS / 3, "they are told apart"
