"""Two servers on one store write to one session at once: every acknowledged write is there, once, in one order."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from support.extent import whole_or
from support.life import ASK, LostError
from support.servers import ServerProcess, Upload
from support.table import Table
from support.tracing import when_stopped
from support.world import World
from titans_server.sessions.history import LEASE_SECONDS

REFUSED = {(412, "version_conflict"), (429, "session_busy"), (409, "version_conflict")}
each_store = pytest.mark.parametrize("world", ["sqlite", "redis"], indirect=True)
TAKEOVER_SECONDS = 10.0  # on a machine that has other things to do


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


@each_store
def test_of_writes_through_two_servers_none_is_lost(world: World, twin: ServerProcess, table: Table) -> None:
    session = create(world.server)
    texts = [f"Line {i} is {'very ' * (i % 5)}short. " for i in range(whole_or(16, 120))]
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


@contextmanager
def overtaken(world: World, twin: ServerProcess, table: Table) -> Iterator[tuple[str, list[Written | None]]]:
    """A session, and what the twin writes to it when the world's server stands still, before its first commit."""
    session, theirs = create(twin), list[Written | None]()
    world.restart_with(TITANS_FAILPOINTS="before_append=stop")
    with (
        table.attempt(world.kind, "two servers", "one stands still before its commit"),
        when_stopped(world.server.pid, lambda: theirs.append(write(twin, session, "Theirs. "))),
    ):
        yield session, theirs


@each_store
def test_of_a_document_whose_server_stood_still_before_its_commit_nothing_is_lost(
    world: World, twin: ServerProcess, table: Table
) -> None:
    """The other server's commit comes in between, for sure: the one that stood still learns again, on top of it."""
    with overtaken(world, twin, table) as (session, theirs):
        ours = write(world.server, session, "Ours, which is longer. ")
        if [theirs[0] and theirs[0].version, ours and ours.version] != [1, 2]:
            raise LostError(f"theirs is {theirs}, ours is {ours}")
        alone = create(twin)
        for text in ("Theirs. ", "Ours, which is longer. "):
            assert write(twin, alone, text)
        seen = {
            (ask(server, x), show(server, x)["tokens_seen"])
            for server in (world.server, twin)
            for x in (session, alone)
        }
        if len(seen) != 1:
            raise LostError(f"the same documents in the same order are seen as {seen}")


@each_store
def test_an_answer_whose_server_stood_still_before_its_commit_is_refused(
    world: World, twin: ServerProcess, table: Table
) -> None:
    with overtaken(world, twin, table) as (session, theirs):
        path, body = f"/v1/sessions/{session}/completions", ASK | {"memory": "write"}
        response = world.server.http.post(path, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (412, "version_conflict")
        if theirs[0] is None or (theirs[0].version, show(twin, session)["tokens_seen"]) != (1, theirs[0].tokens):
            raise LostError(f"theirs is {theirs}, shown is {show(twin, session)}")


@each_store
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


@each_store
@pytest.mark.parametrize("same", [True, False])
def test_a_key_is_good_for_one_document_through_two_servers(
    world: World, twin: ServerProcess, table: Table, same: bool
) -> None:
    """Whoever is told that a document was learnt under a key is told of his own document."""
    texts = ["The document. " * 9, "The document. " * 9 if same else "Another document. " * 9]
    for i in range(whole_or(3, 20)):
        session, headers = create(world.server), {"Idempotency-Key": f"key-{i}"}

        def learn(server: ServerProcess, text: str) -> httpx.Response:
            path = f"/v1/sessions/{session}/documents"  # noqa: B023
            return server.http.post(path, json={"text": text}, headers=headers)  # noqa: B023

        with table.attempt(world.kind, "two servers", "one Idempotency-Key"), ThreadPoolExecutor(2) as pool:
            both = list(pool.map(learn, (world.server, twin), texts))
            acknowledged = [text for text, response in zip(texts, both, strict=True) if response.is_success]
            assert acknowledged, [response.text for response in both]
            if len(set(acknowledged)) > 1 or show(world.server, session)["version"] != 1:
                raise LostError(f"{[response.text for response in both]}, shown is {show(world.server, session)}")


@each_store
def test_a_document_that_was_sent_to_another_server_meanwhile_is_not_read_twice(
    world: World, twin: ServerProcess, table: Table
) -> None:
    """Its server stands still before the last commit; the other one has accepted all of it, and learnt nothing yet."""
    session, text = create(twin), "A document of several portions, which is sent again. " * 8
    headers = {"Idempotency-Key": "key", "Content-Type": "text/plain"}
    accepted, answered, later = threading.Event(), threading.Event(), list[httpx.Response]()
    twin.kill()
    twin.environment = twin.environment | {"TITANS_FAILPOINTS": "after_append=stop"}
    twin.start()
    world.restart_with(TITANS_FAILPOINTS="before_append=stop@2")

    def post(server: ServerProcess, **more: str) -> httpx.Response:
        return server.http.post(f"/v1/sessions/{session}/documents", content=text, headers=headers | more)

    def hand_over() -> None:
        time.sleep(LEASE_SECONDS + 0.5)
        sending.start()
        accepted.wait(TAKEOVER_SECONDS)

    def stay() -> None:
        accepted.set()
        answered.wait(TAKEOVER_SECONDS)

    sending = threading.Thread(target=lambda: later.append(post(twin, Prefer="respond-async")))
    with table.attempt(world.kind, "two servers", "one goes on with the other's document"):
        with when_stopped(twin.pid, stay), when_stopped(world.server.pid, hand_over):
            response = post(world.server)
            answered.set()
            sending.join()
        assert accepted.is_set()
        assert later[0].status_code == 202
        deadline = time.monotonic() + TAKEOVER_SECONDS
        while not show(twin, session)["version"] and time.monotonic() < deadline:
            time.sleep(0.05)
        alone = create(twin)
        written = write(twin, alone, text)
        assert written is not None
        if (show(twin, session)["version"], show(twin, session)["tokens_seen"]) != (1, written.tokens):
            raise LostError(f"{written.tokens} tokens are shown as {show(twin, session)}, answered {response.text}")
        assert ask(twin, session) == ask(twin, alone)


@each_store
@pytest.mark.parametrize("same", [True, False])
def test_of_two_documents_that_two_servers_accepted_under_one_key_both_can_be_asked_for(
    world: World, twin: ServerProcess, same: bool
) -> None:
    session, text = create(twin), "The document, which is learnt later. "
    headers = {"Idempotency-Key": "key", "Content-Type": "text/plain", "Prefer": "respond-async"}
    world.restart_with(TITANS_FAILPOINTS="before_append=stop")

    def accept(server: ServerProcess, content: str) -> str:
        answer = server.http.post(f"/v1/sessions/{session}/documents", content=content, headers=headers)
        assert answer.status_code == 202
        return answer.headers["Location"]

    theirs = list[str]()
    with when_stopped(world.server.pid, lambda: theirs.append(accept(twin, text if same else "Another one. "))):
        place = accept(world.server, text)
    deadline = time.monotonic() + TAKEOVER_SECONDS
    while True:
        ours, other = (world.server.http.get(x).raise_for_status().json() for x in (place, theirs[0]))
        if "learning" not in {ours["status"], other["status"]} or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert show(twin, session)["version"] == 1
    assert (other["status"], other["version"]) == ("done", 1)
    if same:
        assert (ours["status"], ours["version"]) == ("done", 1)
    else:
        assert (ours["status"], ours["error"]["code"]) == ("failed", "idempotency_key_reused")
