"""States that are not what was stored: refused with a clear error, left as they are, and nobody else's harm."""

import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load
from support.extent import first
from support.launcher import Launcher
from support.life import ASK, FIRST, SECOND, LostError
from support.table import Table
from support.world import StoreKind, World
from titans.state import State
from titans_server.sessions import codec

SECONDS = 60.0  # until an accepted document is learnt; the machine may have other things to do

Damage = Callable[[bytes, bytes], bytes | None]  # of a state, given another session's; None: it is gone
DAMAGES: dict[str, Damage] = {
    "one bit altered": lambda state, _: state[:-9] + bytes([state[-9] ^ 1]) + state[-8:],
    "gone": lambda *_: None,
    "truncated": lambda state, _: state[: len(state) // 2],
    "emptied": lambda *_: b"",
    "replaced by another session's": lambda _, other: other,
}


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def world(
    request: pytest.FixtureRequest,
    environment: dict[str, str],
    launcher: Launcher,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    """A server that writes every version's state down."""
    kind: StoreKind = request.param
    often = environment | {"TITANS_SNAPSHOT_TOKENS": "1"}
    with World(kind, tmp_path_factory.mktemp(kind), often, launcher) as world:
        yield world


class StoredStates:
    """The states in a store, as bytes by name: files, or keys of Redis."""

    def __init__(self, world: World) -> None:
        self._folder = Path(world.store.removeprefix("sqlite:///") + ".states") if world.kind == "sqlite" else None
        self._world = world

    def of(self, session: str) -> dict[str, bytes]:
        """A session's."""
        if self._folder is not None:
            return {path.name: path.read_bytes() for path in self._folder.glob(f"{session}-*.state")}
        command = self._world.redis_server.command
        return {key: command("GET", key) for key in command("KEYS", f"titans:{{{session}}}:blob:*")}

    def put(self, name: str, state: bytes | None) -> None:
        """Replace one, or remove it."""
        if self._folder is None:
            self._world.redis_server.command(*(("DEL", name) if state is None else ("SET", name, state)))
        elif state is None:
            (self._folder / name).unlink()
        else:
            (self._folder / name).write_bytes(state)


@pytest.fixture
def stored(world: World) -> StoredStates:
    world.recover()
    return StoredStates(world)


def create(http: httpx.Client) -> str:
    return str(http.post("/v1/sessions").raise_for_status().json()["id"])


def learn(http: httpx.Client, session: str, text: str) -> httpx.Response:
    return http.post(f"/v1/sessions/{session}/documents", json={"text": text})


def ask(http: httpx.Client, session: str, **fields: Any) -> httpx.Response:
    return http.post(f"/v1/sessions/{session}/completions", json=ASK | fields)


def show(http: httpx.Client, session: str) -> Any:
    return http.get(f"/v1/sessions/{session}").raise_for_status().json()


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def with_first(http: httpx.Client) -> str:
    session = create(http)
    learn(http, session, FIRST).raise_for_status()
    return session


@pytest.mark.parametrize("damage", first(2, list(DAMAGES)))
def test_a_stored_state_that_is_not_what_was_stored(
    world: World, stored: StoredStates, damage: str, table: Table
) -> None:
    http = world.server.http
    session, healthy = with_first(http), create(http)
    learn(http, healthy, SECOND).raise_for_status()
    before = show(http, session), ask(http, session).json()["text"]
    world.server.terminate()
    (name, state), *more = stored.of(session).items()
    assert not more
    (other,) = stored.of(healthy).values()
    damaged = DAMAGES[damage](state, other)
    stored.put(name, damaged)
    world.recover()

    with table.attempt(world.kind, "state " + damage, "while no server runs"):
        for response in (
            ask(http, session),
            ask(http, session, memory="write"),
            learn(http, session, SECOND),
            http.get(f"/v1/sessions/{session}/state"),
        ):
            assert code(response) == (500, "state_corrupted")
        if show(http, session)["version"] != 1 or stored.of(session) != (
            {name: damaged} if damaged is not None else {}
        ):
            raise LostError("what was damaged was touched")
        assert learn(http, healthy, SECOND).json()["version"] == 2

        stored.put(name, state)
        if (show(http, session), ask(http, session).json()["text"]) != before:
            raise LostError("a state that is whole again is not what it was")
        assert learn(http, session, SECOND).json()["version"] == 2


def replace_record(world: World, session: str, record: bytes) -> bytes:
    """Returns the one that the store had."""
    if world.kind == "redis":
        key = f"titans:{{{session}}}:session"
        before: bytes = world.redis_server.command("HGET", key, "record")
        world.redis_server.command("HSET", key, "record", record)
        return before
    with closing(sqlite3.connect(world.store.removeprefix("sqlite:///"))) as database, database:
        (text,) = database.execute("SELECT record FROM sessions WHERE id = ?", (session,)).fetchone()
        database.execute("UPDATE sessions SET record = CAST(? AS TEXT) WHERE id = ?", (record, session))
    return bytes(text, "utf-8")


def traces(world: World, session: str) -> set[str]:
    """Where the store names a session."""
    if world.kind == "redis":
        command = world.redis_server.command
        found = {str(key) for key in command("KEYS", f"titans:{{{session}}}:*")}
        indices = [*command("KEYS", "titans:{owner:*}:sessions"), b"titans:due", b"titans:expires"]
        found |= {str(key) for key in indices if command("ZSCORE", key, session) is not None}
        return found | {str(key) for key in command("KEYS", "titans:{owner:*}:bytes") if command("HGET", key, session)}
    path = Path(world.store.removeprefix("sqlite:///"))
    columns = {"sessions": "id", "log": "session", "pointers": "session"}
    with closing(sqlite3.connect(path)) as database:
        return {path.name for path in path.with_name(path.name + ".states").glob(f"{session}-*")} | {
            table
            for table, column in columns.items()
            if database.execute(f"SELECT 1 FROM {table} WHERE {column} = ?", (session,)).fetchone()
        }


def listed(http: httpx.Client, limit: int) -> list[str]:
    """All sessions that are listed, page by page."""
    found: list[str] = []
    while True:
        path = f"/v1/sessions?limit={limit}" + (f"&after={found[-1]}" if found else "")
        page = http.get(path).raise_for_status().json()
        found += [session["id"] for session in page["data"]]
        if not page["has_more"]:
            return found
        assert len(page["data"]) == limit


def with_accepted(world: World) -> str:
    """A session at version 1 with an accepted document, whose server was killed while it learnt that."""
    session = with_first(world.server.http)
    world.restart_with(TITANS_FAILPOINTS="before_blob=kill@3")
    path, headers = f"/v1/sessions/{session}/documents", {"Prefer": "respond-async"}
    with suppress(httpx.TransportError):  # it may be killed before the answer is out
        world.server.http.post(path, json={"text": SECOND}, headers=headers).raise_for_status()
    assert world.server.wait() == -signal.SIGKILL
    return session


def await_version(world: World, session: str, version: int) -> None:
    deadline = time.monotonic() + SECONDS
    while show(world.server.http, session)["version"] != version:
        if time.monotonic() > deadline:
            raise LostError(f"the accepted document of session {session} is not learnt")
        time.sleep(0.1)


def test_a_record_that_cannot_be_read_keeps_no_other_accepted_document_waiting(world: World, table: Table) -> None:
    world.recover()
    broken = with_accepted(world)
    record = replace_record(world, broken, b"{torn")
    world.recover()
    with table.attempt(world.kind, "record torn", "an accepted document waits"):
        other = with_accepted(world)
        already = len(world.server.log)
        world.recover()
        await_version(world, other, 2)
        assert code(world.server.http.get(f"/v1/sessions/{broken}")) == (500, "state_corrupted")
        said = world.server.log[already:]
        assert 1 <= said.count(f"cannot go on with session {broken}: ") <= 6, said
        replace_record(world, broken, record)
        world.kill_server()  # the next one tries at once
        world.recover()
        await_version(world, broken, 2)
    assert "Traceback" not in said


def test_a_session_whose_record_cannot_be_read_is_left_out_of_lists_and_can_be_deleted(
    world: World, table: Table
) -> None:
    world.recover()
    http = world.server.http
    oldest = with_first(http)
    torn, not_text, lacking, foreign = unreadable = [with_first(http) for _ in range(4)]
    fork = str(http.post(f"/v1/sessions/{torn}/fork").raise_for_status().json()["id"])
    newest = with_first(http)
    whole = [name for name in listed(http, 100) if name not in unreadable]
    assert {oldest, fork, newest} <= set(whole)
    answers = [ask(http, session).json()["text"] for session in (oldest, fork, newest)]
    another = replace_record(world, oldest, b"")
    records = (b'{"id":"ses', b"\xff\xfe{", b'{"format":2}', another)
    for session, record in zip([*unreadable, oldest], [*records, another], strict=True):
        replace_record(world, session, record)
    with table.attempt(world.kind, "record torn", "it is listed and deleted"):
        already = len(world.server.log)
        assert [listed(http, limit) for limit in (1, 2, 100)] == [whole] * 3
        assert http.get("/v1/sessions", params={"after": torn, "limit": 1}).json()["data"][0]["id"] == oldest
        for session in unreadable:
            path = f"/v1/sessions/{session}"
            for response in (http.get(path), ask(http, session), http.delete(path, headers={"If-Match": '"1"'})):
                assert code(response) == (500, "state_corrupted")
            assert http.delete(path).status_code == 204
            assert code(http.delete(path)) == code(http.get(path)) == (404, "session_not_found")
        assert "Traceback" not in world.server.log[already:]
        assert f"session {torn} is left out of a list: " in world.server.log[already:]
        if [ask(http, session).json()["text"] for session in (oldest, fork, newest)] != answers:
            raise LostError("another session is not what it was")
        assert learn(http, fork, SECOND).json()["version"] == 2
        assert traces(world, oldest)
        assert not any(traces(world, session) for session in (not_text, lacking, foreign))
        assert listed(http, 100) == whole


def forged(state: bytes, fingerprint: str, **parts: torch.Tensor) -> bytes:
    """A state file that is whole, with other parts."""
    return codec.encode(State.from_parts(load(state) | parts), fingerprint)


def is_same(state: bytes, other: bytes) -> bool:
    """Whether two files hold the same numbers, to the bit."""
    parts, others = load(state), load(other)
    return parts.keys() == others.keys() and all(torch.equal(x, others[name]) for name, x in parts.items())


def see(http: httpx.Client, session: str) -> tuple[Any, ...]:
    shown = show(http, session)
    return shown["version"], shown["tokens_seen"], shown["updated_at"], ask(http, session).json()["text"]


def test_a_file_that_is_no_state_of_this_model_is_not_imported(world: World) -> None:
    world.recover()
    http = world.server.http
    session = with_first(http)
    path, own, before = f"/v1/sessions/{session}/state", show(http, session)["fingerprint"], see(http, session)
    state = http.get(path).raise_for_status().content
    name, numbers = next((name, x) for name, x in load(state).items() if x.is_floating_point() and x.numel())
    refused = {
        "empty": b"",
        "no file of this kind": b"nothing of the sort " * 100,
        "truncated": state[: len(state) // 2],
        "a header that lies": (1 << 40).to_bytes(8, "little") + state[8:],
        "one bit altered": state[:-9] + bytes([state[-9] ^ 1]) + state[-8:],
        "not a number": forged(state, own, **{name: torch.full_like(numbers, torch.nan)}),
        "infinite": forged(state, own, **{name: torch.full_like(numbers, torch.inf)}),
        "larger than any text makes it": forged(state, own, **{name: torch.full_like(numbers, -3e38)}),
        "of another shape": forged(state, own, **{name: torch.zeros(1, 2, 3)}),
        "read fewer than none": forged(state, own, position=torch.full_like(load(state)["position"], -1)),
        "read all that 64 bits count": forged(state, own, position=torch.full_like(load(state)["position"], 2**63 - 1)),
    }
    for what, file in refused.items():
        assert code(http.put(path, content=file)) == (422, "invalid_state"), what
    assert code(http.put(path, content=forged(state, "of another model"))) == (409, "state_mismatch")
    assert see(http, session) == before
    assert is_same(http.get(path).content, state)

    moved = create(http)
    assert http.put(f"/v1/sessions/{moved}/state", content=state).json()["version"] == 1
    assert see(http, moved)[-1] == before[-1]
    assert is_same(http.get(f"/v1/sessions/{moved}/state").content, state)
