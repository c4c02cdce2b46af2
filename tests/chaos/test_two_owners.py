"""Two servers on one store write to one session at once: every acknowledged write is there, once, in one order."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from support.life import ASK, LostError
from support.servers import ServerProcess, Upload
from support.table import Table
from support.world import StoreKind, World

REFUSED = {(412, "version_conflict"), (429, "session_busy"), (409, "version_conflict")}
TAKEOVER_SECONDS = 10.0  # on a machine that has other things to do


@pytest.fixture(params=["sqlite", "redis"])
def world(request: pytest.FixtureRequest, make_world: Callable[[StoreKind], World]) -> World:
    return make_world(request.param)


@pytest.fixture
def twin(world: World) -> Iterator[ServerProcess]:
    """A second server on the world's store."""
    with world.new_server() as twin:
        yield twin


@dataclass(frozen=True)
class Written:
    """One acknowledged write."""

    version: int
    tokens: int
    text: str


def create(server: ServerProcess) -> str:
    return str(server.http.post("/v1/sessions").raise_for_status().json()["id"])


def show(server: ServerProcess, session: str) -> dict[str, Any]:
    shown: dict[str, Any] = server.http.get(f"/v1/sessions/{session}").raise_for_status().json()
    return shown


def ask(server: ServerProcess, session: str) -> str:
    return str(server.http.post(f"/v1/sessions/{session}/completions", json=ASK).raise_for_status().json()["text"])


def write(server: ServerProcess, session: str, text: str) -> Written | None:
    """What is acknowledged; None where the write is refused for another's sake."""
    response = server.http.post(f"/v1/sessions/{session}/documents", json={"text": text})
    if response.is_success:
        answer = response.json()
        return Written(answer["version"], answer["tokens"], text)
    assert (response.status_code, response.json()["error"]["code"]) in REFUSED
    return None


def test_of_writes_through_two_servers_none_is_lost(
    world: World, twin: ServerProcess, table: Table, is_whole: bool
) -> None:
    session = create(world.server)
    texts = [f"Line {i} is {'very ' * (i % 5)}short. " for i in range(120 if is_whole else 24)]
    servers = [(world.server, twin)[i % 2] for i in range(len(texts))]
    with table.attempt(world.kind, "two servers", "writes to one session"):
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda server, text: write(server, session, text), servers, texts))
        written = sorted((answer for answer in answers if answer), key=lambda answer: answer.version)

        shown = show(world.server, session)
        if [answer.version for answer in written] != list(range(1, shown["version"] + 1)):
            raise LostError(f"acknowledged are the versions {[answer.version for answer in written]}, shown is {shown}")
        if sum(answer.tokens for answer in written) != shown["tokens_seen"]:
            raise LostError(f"acknowledged are {written}, shown is {shown}")
        alone = create(world.server)
        for answer in written:
            assert write(world.server, alone, answer.text)
        answers_of_all = {ask(server, name) for server in (world.server, twin) for name in (session, alone)}
        if len(answers_of_all) != 1:
            raise LostError(f"the same documents in the same order are answered from differently: {answers_of_all}")


def test_another_server_takes_over_at_once_when_one_is_killed(world: World, twin: ServerProcess, table: Table) -> None:
    session = create(twin)
    assert write(twin, session, "The first document. ")
    with table.attempt(world.kind, "server killed", "amid a document; another takes over"):
        with Upload(twin, session) as upload:
            upload.begin("A second document that never ends. " * 20)
            twin.kill()
            began = time.monotonic()
            while (answer := write(world.server, session, "The third document. ")) is None:
                time.sleep(0.05)
            assert time.monotonic() - began < TAKEOVER_SECONDS
        if (answer.version, show(world.server, session)["version"]) != (2, 2):
            raise LostError(f"{answer} after version 1")
