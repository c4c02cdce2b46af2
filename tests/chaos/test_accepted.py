"""A document that was accepted, 202, is learnt once, whatever happens to its server: another one goes on with it."""

import time

import httpx
import pytest
from support.extent import first, whole_or
from support.life import ASK, FIRST, SECOND, LostError
from support.servers import ServerProcess
from support.table import Table
from support.world import World

MOMENTS = ["before_blob", "after_blob", "before_append", "after_append", "after_commit"]
SECONDS = 60.0  # the lease takes 3 s to run out; the machine may have other things to do


def create(http: httpx.Client) -> str:
    return str(http.post("/v1/sessions").raise_for_status().json()["id"])


def learn(http: httpx.Client, session: str, text: str) -> None:
    http.post(f"/v1/sessions/{session}/documents", json={"text": text}).raise_for_status()


def see(http: httpx.Client, session: str) -> tuple[int, str]:
    """Its version, and what it answers."""
    answer = http.post(f"/v1/sessions/{session}/completions", json=ASK).raise_for_status().json()
    return answer["version"], answer["text"]


def accept(http: httpx.Client, session: str, text: str) -> bool:
    """Whether it was; not where the server dies, or the document is in the hands of one that has."""
    headers = {"Prefer": "respond-async", "Idempotency-Key": "key"}
    try:
        response = http.post(f"/v1/sessions/{session}/documents", json={"text": text}, headers=headers)
    except httpx.TransportError:
        return False
    assert response.status_code in {202, 409}, response.text
    return response.status_code == 202


@pytest.mark.parametrize("world", ["sqlite", "redis"], indirect=True)
@pytest.mark.parametrize("moment", first(1, MOMENTS))
def test_what_was_accepted_is_learnt_once(world: World, twin: ServerProcess, table: Table, moment: str) -> None:
    whole = create(twin.http)
    for text in (FIRST, SECOND):
        learn(twin.http, whole, text)
    expected = see(twin.http, whole)
    for n in whole_or([1], range(1, 10)):
        session = create(twin.http)
        learn(twin.http, session, FIRST)
        world.restart_with(TITANS_FAILPOINTS=f"{moment}=kill@{n}", TITANS_SNAPSHOT_TOKENS="100")
        deadline = time.monotonic() + SECONDS
        with table.attempt(world.kind, "server killed", f"202, {moment}") as attempt:
            http = world.server.http
            while not accept(http, session, SECOND):
                http = twin.http
                assert time.monotonic() < deadline
                time.sleep(0.1)
            while (seen := see(twin.http, session)) != expected:
                if seen[0] > 1 or time.monotonic() > deadline:
                    raise LostError(f"{session} is {seen}, not {expected}")
                time.sleep(0.1)
            attempt.was_made = not world.server.is_running()
            world.recover()
            if (seen := see(world.server.http, session)) != expected:
                raise LostError(f"{session} is {seen}, not {expected}, when its first server is back")
        if not attempt.was_made:
            break
    assert n > 1 or attempt.was_made
