"""Sessions belong to the key that made them: to others they are not there, by any way in."""

import asyncio
import concurrent.futures
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import connect_sse
from support.models import write_tiny_checkpoint
from support.servers import LiveServer, free_port
from titans_server.app import create_app
from titans_server.settings import Settings
from titans_server.tenants import keys
from titans_server.tenants.quotas import Quotas
from titans_server.tenants.store import open_keys

STATIC = "a-static-key-of-the-operator"
PLAIN = {"Content-Type": "text/plain"}
ASK = {"prompt": "what now", "max_tokens": 20, "temperature": 0}
UNKNOWN = "ses_AAAAAAAAAAAAAAAAAAAAAA"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder: Path = tmp_path_factory.mktemp("owners")
    tiny = write_tiny_checkpoint(folder)
    own: dict[str, Any] = {"body": tiny.body, "memory": tiny.memory, "dtype": "float32", "threads": 1}
    settings = Settings(port=free_port(), store=f"sqlite:///{folder}/titans.db", api_key=STATIC, **own)
    with LiveServer(settings) as server:
        server.store = settings.store  # type: ignore[attr-defined]
        yield server


def client_of(server: LiveServer, owner: str | None = None, quotas: Quotas | None = None) -> httpx.Client:
    """A client with a new key of its own."""
    key, text = keys.make("test", time.time(), quotas, owner)
    asyncio.run(open_keys(server.store).put(key))  # type: ignore[attr-defined]
    return httpx.Client(
        base_url=server.url, headers={"Authorization": f"Bearer {text}", "X-Key-ID": key.id}, timeout=60
    )


@pytest.fixture
def alice(server: LiveServer) -> Iterator[httpx.Client]:
    with client_of(server) as client:
        yield client


@pytest.fixture
def mallory(server: LiveServer) -> Iterator[httpx.Client]:
    with client_of(server) as client:
        yield client


@pytest.fixture
def session(alice: httpx.Client) -> str:
    made = str(alice.post("/v1/sessions").raise_for_status().json()["id"])
    learn(alice, made, "the key is under the third stone").raise_for_status()
    return made


def learn(http: httpx.Client, session: str, text: str) -> httpx.Response:
    return http.post(f"/v1/sessions/{session}/documents", content=text, headers=PLAIN)


def seen(response: httpx.Response) -> tuple[Any, ...]:
    """All of an answer that could tell two apart, but for the id that was asked for and the request's own."""
    headers = {k: v for k, v in response.headers.items() if k not in {"date", "x-request-id", "content-length"}}
    return response.status_code, response.json(), headers


def tear(server: LiveServer, *sessions: str) -> None:
    """Have records that cannot be read."""
    with closing(sqlite3.connect(server.store.removeprefix("sqlite:///"))) as database, database:  # type: ignore[attr-defined]
        database.executemany("UPDATE sessions SET record = '{torn' WHERE id = ?", [(each,) for each in sessions])


def routes() -> list[tuple[str, str]]:
    paths = create_app(Settings()).openapi()["paths"]
    found = [(method.upper(), path) for path, methods in paths.items() for method in methods if "{session_id}" in path]
    assert len(found) >= 4
    return found


@pytest.mark.parametrize(("method", "path"), routes())
@pytest.mark.parametrize("body", [{"json": ASK}, {"content": b"\xff", "headers": PLAIN}, {}])
@pytest.mark.parametrize("torn", [False, True])
def test_a_foreign_session_is_answered_exactly_like_an_unknown_one(
    server: LiveServer,
    mallory: httpx.Client,
    alice: httpx.Client,
    session: str,
    method: str,
    path: str,
    body: dict[str, Any],
    *,
    torn: bool,
) -> None:
    if torn:
        tear(server, session)
    before = alice.get(f"/v1/sessions/{session}").json()
    named = path.replace("{session_id}", "{}")
    named = named if named.count("{") == 1 else named.rpartition("/")[0] + "/1"
    foreign = mallory.request(method, named.format(session), **body)
    unknown = mallory.request(method, named.format(UNKNOWN), **body)
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (404, "session_not_found")
    assert seen(foreign) == (404, *[json_with(unknown, UNKNOWN, session)], seen(unknown)[2])
    assert alice.get(f"/v1/sessions/{session}").json() == before


def json_with(response: httpx.Response, this: str, other: str) -> Any:
    return json.loads(response.text.replace(this, other))


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_document_into_a_foreign_session_is_answered_exactly_like_an_unknown_one(
    server: LiveServer, mallory: httpx.Client, alice: httpx.Client, session: str, method: str
) -> None:
    ingestion = learn(alice, session, "more words").json()["ingestion"]
    unknown = ingestion.replace(*(name.removeprefix("ses_") for name in (session, UNKNOWN)))
    expected = mallory.request(method, f"/v1/ingestions/{unknown}")
    assert (expected.status_code, expected.json()["error"]["code"]) == (404, "ingestion_not_found")
    for own in (200, 500):
        foreign = mallory.request(method, f"/v1/ingestions/{ingestion}")
        assert seen(foreign) == (404, json_with(expected, unknown, ingestion), seen(expected)[2])
        assert alice.request(method, f"/v1/ingestions/{ingestion}").status_code == own
        tear(server, session)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["body", "header"])
def test_openais_endpoints_do_not_see_it_either(
    mallory: httpx.Client, session: str, path: str, stream: bool, where: str
) -> None:
    model = mallory.get("/v1/models").json()["data"][0]["id"]
    asked: dict[str, Any] = {
        "/v1/completions": {"prompt": "x", "max_tokens": 4},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4},
        "/v1/responses": {"input": "x", "max_output_tokens": 4},
    }[path]
    answers = []
    for name in (session, UNKNOWN):
        body = asked | {"model": model, "stream": stream, "memory": "write"}
        body |= {"session": name} if where == "body" else {}
        headers = {"X-Session-ID": name} if where == "header" else {}
        answers.append(mallory.post(path, json=body, headers=headers))
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].json() == json_with(answers[1], UNKNOWN, session)


def test_each_has_their_own(alice: httpx.Client, mallory: httpx.Client, session: str) -> None:
    assert alice.get(f"/v1/sessions/{session}").status_code == 200
    assert alice.post(f"/v1/sessions/{session}/completions", json=ASK).status_code == 200
    theirs = mallory.post("/v1/sessions").json()["id"]
    assert mallory.delete(f"/v1/sessions/{theirs}").status_code == 204
    assert mallory.delete(f"/v1/sessions/{session}").status_code == 404
    assert alice.delete(f"/v1/sessions/{session}").status_code == 204


def test_the_operators_key_sees_no_tenants_sessions_and_theirs_are_its_own(
    server: LiveServer, alice: httpx.Client, session: str
) -> None:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {STATIC}"}) as operator:
        assert operator.get(f"/v1/sessions/{session}").status_code == 404
        own = operator.post("/v1/sessions").json()["id"]
        assert operator.get(f"/v1/sessions/{own}").status_code == 200
        assert alice.get(f"/v1/sessions/{own}").status_code == 404


def test_a_key_that_replaces_another_has_its_sessions(server: LiveServer, alice: httpx.Client, session: str) -> None:
    with client_of(server, owner=alice.headers["X-Key-ID"]) as renewed:
        assert renewed.get(f"/v1/sessions/{session}").status_code == 200


def test_a_stream_can_be_resumed_and_stopped_by_its_own_key_alone(
    alice: httpx.Client, mallory: httpx.Client, session: str
) -> None:
    body = ASK | {"max_tokens": 2_000, "temperature": 1, "stream": True}
    path = f"/v1/sessions/{session}/completions"
    with connect_sse(alice, "POST", path, json=body, headers={"Prefer": "resumable"}) as events:
        stream = events.response.headers["x-stream-id"]
        assert mallory.get(f"/v1/streams/{stream}").status_code == 404
        assert mallory.delete(f"/v1/streams/{stream}").status_code == 404
        assert alice.delete(f"/v1/streams/{stream}").status_code == 204


def test_keys_at_once_never_see_each_others_sessions(server: LiveServer) -> None:
    clients = [client_of(server) for _ in range(4)]
    sessions = [[http.post("/v1/sessions").json()["id"] for _ in range(5)] for http in clients]

    def look(mine: int) -> None:
        for others, ids in enumerate(sessions):
            for session in ids:
                expected = 200 if others == mine else 404
                assert learn(clients[mine], session, f"a secret of {mine}").status_code == expected
                found = clients[mine].get(f"/v1/sessions/{session}")
                assert found.status_code == expected
                assert expected == 404 or found.json()["version"] == 1

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(look, range(4)))
    for http in clients:
        http.close()


def test_each_lists_only_their_own(alice: httpx.Client, mallory: httpx.Client, session: str) -> None:
    own = mallory.post("/v1/sessions").json()["id"]
    assert [x["id"] for x in mallory.get("/v1/sessions").json()["data"]] == [own]
    assert [x["id"] for x in alice.get("/v1/sessions").json()["data"]] == [session]
    foreign, unknown = (mallory.get("/v1/sessions", params={"after": name}) for name in (session, UNKNOWN))
    assert foreign.status_code == unknown.status_code == 404
    assert foreign.json() == json_with(unknown, UNKNOWN, session)


def test_a_session_that_cannot_be_read_is_deleted_by_its_own_key_alone(
    server: LiveServer, alice: httpx.Client, mallory: httpx.Client
) -> None:
    names = [alice.post("/v1/sessions").json()["id"] for _ in range(2)]
    tear(server, *names)
    for path in (f"/v1/sessions/{names[0]}", f"/v1/conversations/{names[1]}"):
        assert mallory.delete(path).json()["error"]["code"] == "session_not_found"
        torn = alice.get(path)
        assert torn.json()["error"]["code"] == "state_corrupted"
        assert torn.headers["x-should-retry"] == "false"
        assert alice.delete(path).is_success
        assert alice.get(path).status_code == 404


def refused(response: httpx.Response) -> bool:
    """Whether it is for want of room, which no client should try again by itself."""
    if response.status_code != 429:
        return False
    assert response.json()["error"]["code"] == "quota_exceeded"
    assert response.headers["x-should-retry"] == "false"
    return True


def test_a_key_has_no_more_sessions_than_it_may_have(server: LiveServer) -> None:
    with client_of(server, quotas=Quotas(sessions=2)) as http:
        first = http.post("/v1/sessions").json()["id"]
        learn(http, first, "words").raise_for_status()
        assert http.post("/v1/conversations").status_code == 200
        for path in ("/v1/sessions", "/v1/conversations", f"/v1/sessions/{first}/fork"):
            assert refused(http.post(path)), path
        assert learn(http, first, "more words").status_code == 200
        http.delete(f"/v1/sessions/{first}").raise_for_status()
        assert http.post("/v1/sessions").status_code == 201


def test_a_key_has_no_more_bytes_than_it_may_have(server: LiveServer) -> None:
    with client_of(server, quotas=Quotas(bytes=1)) as http:
        full, other = (http.post("/v1/sessions").json()["id"] for _ in range(2))
        learn(http, full, "words").raise_for_status()
        model = http.get("/v1/models").json()["data"][0]["id"]
        path = f"/v1/sessions/{other}"
        for response in (
            learn(http, other, "words"),
            http.post(f"{path}/documents", content="x", headers=PLAIN | {"Prefer": "respond-async"}),
            http.post(f"{path}/completions", json=ASK | {"memory": "write"}),
            http.post("/v1/completions", json=ASK | {"model": model, "session": other, "memory": "write"}),
            http.post("/v1/responses", json={"model": model, "input": "x", "conversation": other}),
            http.put(f"{path}/state", content=b"x"),
            http.post("/v1/sessions"),
        ):
            assert refused(response), response.request.url
        assert http.post(f"{path}/completions", json=ASK).status_code == 200, "reading takes no room"
        http.delete(f"/v1/sessions/{full}").raise_for_status()
        assert learn(http, other, "words").status_code == 200
