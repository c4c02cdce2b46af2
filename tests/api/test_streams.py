"""Streams on a real socket: cut and picked up again, stopped, and left."""

import asyncio
import json
import socket
import threading
import time
from dataclasses import replace
from typing import Any

import httpx
import pytest
from openai import APIError, OpenAI
from support.cutting import CuttingProxy
from support.servers import LiveServer
from support.streams import EOS, MODEL, endless, events, stream_settings, wait_until_idle
from titans.sampling import Drawn
from titans_client import AsyncClient, Client
from titans_server.api import deps
from titans_server.engine import Generation
from titans_server.engine.runner import Runner
from titans_server.errors import StoreUnavailable
from titans_server.settings import Settings
from titans_server.states import States

PLAIN = {"Content-Type": "text/plain"}
RESUMABLE = {"Prefer": "respond-sooner, Resumable"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return stream_settings(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("endpoint", ["native", "text", "chat"])
def test_every_event_has_its_number(http: httpx.Client, session: str, endpoint: str) -> None:
    request = endless(endpoint, session)
    request["json"] |= {"max_tokens": 5}
    with http.stream(**request) as response:
        found = list(events(response))
    assert [event.id for event in found] == list(range(1, len(found) + 1))
    assert found[-1].data == "[DONE]"
    assert response.headers["x-stream-id"].startswith("str_")
    assert "preference-applied" not in response.headers
    gone = http.get(f"/v1/streams/{response.headers['x-stream-id']}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "stream_not_found")


def test_preferences_may_stand_in_several_lines(http: httpx.Client, session: str) -> None:
    request = endless("native", session)
    request["json"] |= {"max_tokens": 1}
    with http.stream(**request, headers=[("Prefer", "wait=5"), ("Prefer", "respond-async, resumable")]) as response:
        assert response.headers["preference-applied"] == "resumable"
        response.read()
    http.delete(f"/v1/streams/{response.headers['x-stream-id']}")


@pytest.mark.parametrize("endpoint", ["native", "text", "chat"])
def test_a_stream_is_resumed_where_it_was_cut(http: httpx.Client, session: str, endpoint: str) -> None:
    request = endless(endpoint, session)
    request["json"] |= {"max_tokens": 40, "temperature": 0}
    with http.stream(**request) as response:
        whole = [event.data for event in events(response)]
    with http.stream(**request, headers=RESUMABLE) as response:
        assert response.headers["preference-applied"] == "resumable"
        path = f"/v1/streams/{response.headers['x-stream-id']}"
        source = events(response)
        got = [next(source) for _ in range(3)]
    while True:
        with http.stream("GET", path, headers={"Last-Event-ID": str(got[-1].id)}) as response:
            if response.status_code == 204:
                break
            assert response.headers["content-type"].startswith("text/event-stream")
            got += [event for event, _ in zip(events(response), range(7), strict=False)]
    assert [event.id for event in got] == list(range(1, len(got) + 1))

    def text(data: str) -> Any:
        fields = json.loads(data)
        return fields.get("text") or [choice.get("text") or choice.get("delta") for choice in fields.get("choices", [])]

    assert [text(event.data) for event in got[:-1]] == [text(data) for data in whole[:-1]]
    with http.stream("GET", path) as response:
        assert list(events(response)) == got, "without an id, from the first on"


def test_what_is_learnt_is_learnt_though_the_client_has_gone(http: httpx.Client, session: str) -> None:
    headers = PLAIN | RESUMABLE | {"Accept": "text/event-stream"}
    url = f"/v1/sessions/{session}/documents"
    with http.stream("POST", url, content=b"words " * 500, headers=headers) as response:
        first = next(events(response))
        path = f"/v1/streams/{response.headers['x-stream-id']}"
    assert first.name == "progress"
    with http.stream("GET", path, headers={"Last-Event-ID": "1"}) as response:
        rest = list(events(response))
    assert [rest[-2].name, rest[-1].data] == ["done", "[DONE]"]
    assert json.loads(rest[-2].data)["tokens"] == 3_000
    assert http.get(f"/v1/sessions/{session}").json()["version"] == 1


def test_a_document_that_breaks_off_is_an_error_to_whoever_asks_again(
    server: LiveServer, http: httpx.Client, session: str
) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/sessions/{session}/documents HTTP/1.1\r\nHost: {host}\r\nContent-Type: text/plain\r\n"
    head += "Prefer: resumable\r\nAccept: text/event-stream\r\nContent-Length: 100000\r\n\r\n"
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(head.encode() + b"half a document " * 200)
        answer = b""
        while b"progress" not in answer:
            answer += raw.recv(65_536)
    stream_id = answer.lower().partition(b"x-stream-id: ")[2].partition(b"\r\n")[0].decode()
    stream_id = answer[answer.lower().index(stream_id.encode()) :][: len(stream_id)].decode()
    with http.stream("GET", f"/v1/streams/{stream_id}") as response:
        *_, error, done = events(response)
    assert (error.name, done.data) == ("error", "[DONE]")
    assert "broke off" in json.loads(error.data)["error"]["message"]
    assert http.get(f"/v1/sessions/{session}").json()["version"] == 0


@pytest.mark.parametrize("endpoint", ["native", "text", "chat"])
def test_a_dropped_client_stops_its_answer_at_once(http: httpx.Client, session: str, endpoint: str) -> None:
    for _ in range(3):
        with http.stream(**endless(endpoint, session)) as response:
            next(events(response))
        wait_until_idle(http)


@pytest.mark.parametrize("headers", [{}, RESUMABLE])
def test_delete_stops_the_work_and_tells_the_reader(
    http: httpx.Client, server: LiveServer, session: str, headers: dict[str, str]
) -> None:
    with (
        httpx.Client(base_url=server.url) as other,
        http.stream(**endless("chat", session), headers=headers) as response,
    ):
        source = events(response)
        next(source)
        path = f"/v1/streams/{response.headers['x-stream-id']}"
        assert other.delete(path).status_code == 204
        wait_until_idle(other)
        *_, error, done = source
    assert (error.name, json.loads(error.data)["error"]["code"], done.data) == ("error", "stream_stopped", "[DONE]")
    if headers:
        assert http.delete(path).status_code == 204, "it has ended, and is forgotten now"
    assert http.delete(path).status_code == 404


def test_openais_client_is_told_that_its_stream_was_stopped(server: LiveServer, http: httpx.Client) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as ai:
        stream = ai.completions.create(
            model=MODEL, prompt="a", max_tokens=1_000_000, stream=True, logit_bias={str(EOS): -100}
        )
        next(iter(stream))
        http.delete(f"/v1/streams/{stream.response.headers['x-stream-id']}")
        with pytest.raises(APIError) as caught:
            list(stream)
    assert caught.value.code == "stream_stopped"


def streamed(endpoint: str, session: str) -> dict[str, Any]:
    """A request for a short answer of a session."""
    if endpoint == "responses":
        body = {"model": MODEL, "input": "a", "max_output_tokens": 2, "stream": True, "session": session}
        return {"method": "POST", "url": "/v1/responses", "json": body}
    request = endless(endpoint, session)
    request["json"] |= {"max_tokens": 2} | ({} if endpoint == "native" else {"session": session})
    return request


ENDPOINTS = ["native", "text", "chat", "responses"]


@pytest.mark.parametrize("headers", [{}, RESUMABLE])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_answer_that_fails_before_it_begins_is_answered_with_its_status(
    server: LiveServer, http: httpx.Client, session: str, endpoint: str, headers: dict[str, str]
) -> None:
    before = len(server.context.streams)
    refused = http.request(**streamed(endpoint, session), headers=headers | {"If-Match": '"7"'})
    assert (refused.status_code, refused.json()["error"]["code"]) == (412, "version_conflict")
    assert "x-stream-id" not in refused.headers
    assert len(server.context.streams) == before


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_fault_before_an_answer_begins_is_a_500(
    http: httpx.Client, session: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("nobody foresaw this")

    monkeypatch.setattr(States, "newest", fail)
    failed = http.request(**streamed(endpoint, session))
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "internal_error")


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("headers", [{}, RESUMABLE], ids=["plain", "resumable"])
def test_an_answer_begins_also_where_each_event_fills_the_ring(
    server: LiveServer,
    http: httpx.Client,
    session: str,
    endpoint: str,
    headers: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = server.context.streams
    monkeypatch.setattr(streams, "limits", replace(streams.limits, max_bytes=1))
    monkeypatch.setattr(deps, "_BEGIN_SECONDS", 60)
    request = streamed(endpoint, session) | {"timeout": 20}
    refused = http.request(**request, headers=headers | {"If-Match": '"7"'})
    assert (refused.status_code, refused.json()["error"]["code"]) == (412, "version_conflict")
    with http.stream(**request, headers=headers) as response:
        *_, done = events(response)
    assert done.data == "[DONE]"


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_answer_that_is_long_in_beginning_fails_in_its_stream(
    http: httpx.Client, session: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    async def fail_late(*_: Any) -> None:
        await asyncio.to_thread(go_on.wait)
        raise StoreUnavailable("the store is away")

    monkeypatch.setattr(deps, "_BEGIN_SECONDS", 0.1)
    monkeypatch.setattr(States, "newest", fail_late)
    with http.stream(**streamed(endpoint, session)) as response:
        assert response.status_code == 200
        go_on.set()
        *_, error, done = events(response)
    assert (error.name, json.loads(error.data)["error"]["code"]) == ("error", "store_unavailable")
    assert done.data == "[DONE]"


@pytest.mark.parametrize("headers", [{}, RESUMABLE], ids=["plain", "resumable"])
def test_a_client_that_leaves_before_an_answer_begins_ends_it(
    server: LiveServer, http: httpx.Client, session: str, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    has_ended = threading.Event()

    async def wait(*_: Any) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            has_ended.set()

    monkeypatch.setattr(deps, "_BEGIN_SECONDS", 60)
    monkeypatch.setattr(States, "newest", wait)
    request = streamed("native", session)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + request["url"], json=request["json"], headers=headers, timeout=0.3)
    assert has_ended.wait(20), "nobody knows of it"


def test_openais_client_comes_again_where_there_was_no_room(server: LiveServer, http: httpx.Client) -> None:
    ask: dict[str, Any] = {"model": MODEL, "prompt": ["a", "b"], "stream": True, "logit_bias": {str(EOS): -100}}
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=20) as ai,
        ai.completions.create(**ask, max_tokens=1_000_000) as stream,
    ):
        next(iter(stream))
        refused = http.post("/v1/completions", json=ask | {"max_tokens": 2})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"] == "1"
        threading.Timer(0.5, stream.close).start()
        assert list(ai.completions.create(**ask, max_tokens=2))


def test_events_that_are_kept_no_more_are_told_as_lost(server: LiveServer, http: httpx.Client, session: str) -> None:
    request = endless("text", session)
    request["json"] |= {"max_tokens": 150, "temperature": 0}
    with http.stream(**request, headers=RESUMABLE) as response:
        path = f"/v1/streams/{response.headers['x-stream-id']}"
    wait_until_idle(http)
    lost = http.get(path, headers={"Last-Event-ID": "1"})
    assert (lost.status_code, lost.json()["error"]["code"]) == (410, "events_lost")
    late = http.get(path, headers={"Last-Event-ID": "145"})
    assert late.text.rstrip().endswith("data: [DONE]")
    streams = server.context.streams
    kept, streams.limits = streams.limits, replace(streams.limits, keep_seconds=0.1)
    assert http.get(path, headers={"Last-Event-ID": "145"}).status_code == 200
    streams.limits = kept
    time.sleep(0.5)
    assert http.get(path).status_code == 404


@pytest.mark.parametrize("number", ["-1", "x", "99999999", "1" * 400, "1.5", ""])
def test_a_number_that_was_never_sent_is_refused(http: httpx.Client, session: str, number: str) -> None:
    with http.stream(**endless("text", session), headers=RESUMABLE) as response:
        path = f"/v1/streams/{response.headers['x-stream-id']}"
        next(events(response))
    refused = http.get(path, headers={"Last-Event-ID": number})
    http.delete(path)
    assert refused.status_code == 422
    assert refused.json()["error"]["param"].endswith("Last-Event-ID")


@pytest.mark.parametrize("stream_id", ["str_nobody", "..%2f..%2fetc", "%00", "str_%C3%A4", "a" * 3_000])
def test_an_unknown_stream_is_not_found(http: httpx.Client, stream_id: str) -> None:
    for method in ("GET", "DELETE"):
        response = http.request(method, f"/v1/streams/{stream_id}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] in {"stream_not_found", "http_404"}


def test_no_more_streams_are_kept_than_there_is_room_for(http: httpx.Client, session: str) -> None:
    paths = []
    for _ in range(2):
        with http.stream(**endless("text", session), headers=RESUMABLE) as response:
            paths.append(f"/v1/streams/{response.headers['x-stream-id']}")
            next(events(response))
    refused = http.request(**endless("text", session), headers=RESUMABLE)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    for path in paths:
        http.delete(path)
    wait_until_idle(http)


def test_a_quiet_stream_has_comments(server: LiveServer, session: str) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/sessions/{session}/documents HTTP/1.1\r\nHost: {host}\r\nContent-Type: text/plain\r\n"
    head += "Accept: text/event-stream\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(head.encode())
        answer = b""
        while answer.count(b": ping") < 2:
            answer += raw.recv(65_536)
    assert b"data:" not in answer


def test_openais_client_takes_a_comment_for_no_event(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Runner.decode

    def slow(self: Runner, requests: list[Generation]) -> dict[Generation, Drawn]:
        time.sleep(0.5)  # a comment's time, and more
        return decode(self, requests)

    monkeypatch.setattr(Runner, "decode", slow)
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as ai:
        ask: dict[str, Any] = {"model": MODEL, "prompt": "a", "max_tokens": 3, "temperature": 0}
        stream = ai.completions.create(**ask, stream=True, logit_bias={str(EOS): -100})
        assert "".join(chunk.choices[0].text for chunk in stream)


def test_our_own_client_gives_up_a_stream_by_stopping_it(server: LiveServer, http: httpx.Client, session: str) -> None:
    with Client(server.url) as client:
        with client.stream(session, "a", max_tokens=1_000_000, temperature=0) as stream:
            next(stream)
        wait_until_idle(http)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_our_own_client_resumes_what_is_cut(server: LiveServer, kind: str) -> None:
    ask: Any = {"prompt": "what now", "max_tokens": 40, "temperature": 0}
    document = [b"a story. " * 50] * 4
    async with AsyncClient(server.url) as direct:
        session, other = [(await direct.sessions.create()).id for _ in range(2)]
        await direct.ingest(other, b"".join(document))
        expected = (await direct.complete(other, **ask)).text
    with CuttingProxy(server, 2_500) as proxy:
        # each has a connection of its own: one that is cut before its answer's head is not asked again
        if kind == "sync":
            with Client(proxy.url) as client:
                *_, learnt = await asyncio.to_thread(list, client.ingest_stream(session, iter(document)))
            with Client(proxy.url) as client:
                text = "".join(await asyncio.to_thread(lambda: [x.text for x in client.stream(session, **ask)]))
        else:
            async with AsyncClient(proxy.url) as aclient:
                *_, learnt = [event async for event in aclient.ingest_stream(session, iter(document))]
            async with AsyncClient(proxy.url) as aclient:
                text = "".join([x.text async for x in aclient.stream(session, **ask)])
    assert (learnt.tokens, text) == (1_800, expected)
    assert proxy.num_cut > 2
