"""Streams on a real socket: cut and picked up again, stopped, left, and read too slowly."""

import asyncio
import contextlib
import json
import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import h11
import httpx
import pytest
from openai import APIError, OpenAI
from support.models import write_tiny_checkpoint
from support.servers import LiveServer, Upload, free_port
from titans.sampling import Drawn
from titans_client import AsyncClient, Client
from titans_server.api import deps
from titans_server.engine import Generation
from titans_server.engine.runner import Runner
from titans_server.errors import StoreUnavailable
from titans_server.service import SessionService
from titans_server.serving import PunctualProtocol
from titans_server.sessions.record import SessionRecord, Version
from titans_server.settings import Settings
from titans_server.states import States

MODEL = "tiny-0"
EOS = 2
PLAIN = {"Content-Type": "text/plain"}
RESUMABLE = {"Prefer": "respond-sooner, Resumable"}
ENDLESS = {"max_tokens": 1_000_000, "stream": True}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return Settings(
        port=free_port(),
        store="memory://",
        body=checkpoint.body,
        memory=checkpoint.memory,
        dtype="float32",
        threads=1,
        max_requests=2,
        max_completion_tokens=1_000_000,
        max_streams=2,
        stream_bytes=30_000,
        stream_keep_seconds=60,
        stream_ping_seconds=0.2,
        stream_stall_seconds=0.5,
    )


@dataclass(frozen=True)
class Event:
    id: int
    name: str
    data: str


def events(response: httpx.Response) -> Iterator[Event]:
    """The events of a stream, parsed by hand: their ids and names are what is tested."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            yield Event(int(fields["id"]), fields.get("event", "message"), fields["data"])
            fields = {}


def endless(endpoint: str, session: str) -> dict[str, Any]:
    """A request whose answer does not end by itself."""
    bias = {"logit_bias": {str(EOS): -100}}
    match endpoint:
        case "native":
            body: dict[str, Any] = {"prompt": "a", "temperature": 0}
            return {"method": "POST", "url": f"/v1/sessions/{session}/completions", "json": body | ENDLESS}
        case "text":
            body = {"model": MODEL, "prompt": "a"}
            return {"method": "POST", "url": "/v1/completions", "json": body | bias | ENDLESS}
        case _:
            body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
            return {"method": "POST", "url": "/v1/chat/completions", "json": body | bias | ENDLESS}


def wait_until_idle(http: httpx.Client) -> None:
    """Return when both places of the engine are free, long before an endless answer ends."""
    started = time.monotonic()
    body = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 1}
    while http.post("/v1/completions", json=body).status_code != 200:
        assert time.monotonic() - started < 60, "work that nobody waits for goes on"
        time.sleep(0.03)


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


@contextlib.contextmanager
def taking_nothing(server: LiveServer, request: dict[str, Any]) -> Iterator[socket.socket]:
    """A connection that has asked, and reads no more than that it is answered."""
    body = json.dumps(request["json"]).encode() if "json" in request else b""
    head = f"{request['method']} {request['url']} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        raw.connect(("127.0.0.1", server.port))
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b"200 OK" in raw.recv(100)
        yield raw


def telling_much(session: str) -> dict[str, Any]:
    """An answer that does not end, with much said of each of its tokens."""
    request = endless("chat", session)
    request["json"] |= {"logprobs": True, "top_logprobs": 20}
    return request


def connection_of(server: LiveServer, raw: socket.socket) -> Any:
    """The server's side of it, None where it is closed."""
    connections = list(server.server.server_state.connections)
    return next((each for each in connections if getattr(each, "client", None) == raw.getsockname()), None)


def wait_until_cut_off(server: LiveServer, raw: socket.socket) -> int:
    """The bytes that waited in the server for it at most."""
    most, deadline = 0, time.monotonic() + 30
    while (connection := connection_of(server, raw)) is not None:
        assert time.monotonic() < deadline, "what it does not take is kept for good"
        most = max(most, connection.transport.get_write_buffer_size())
        time.sleep(0.02)
    return most


def test_a_whole_answer_that_nobody_takes_is_not_kept(server: LiveServer, session: str, large_state: bytes) -> None:
    with taking_nothing(server, {"method": "GET", "url": f"/v1/sessions/{session}/state"}) as raw:
        assert wait_until_cut_off(server, raw) <= 1 << 20, "it is handed over as it is taken"


def test_a_whole_answer_that_is_taken_slowly_comes_whole(
    server: LiveServer, http: httpx.Client, session: str, large_state: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(server.server.lifespan.state, "stall_seconds", 2)
    taken = b""
    with http.stream("GET", f"/v1/sessions/{session}/state") as response:
        assert int(response.headers["content-length"]) == len(large_state)
        for piece in response.iter_bytes(2 << 20):
            taken += piece
            time.sleep(0.25)  # all together longer than a client that takes nothing is waited for
    assert taken == large_state


def test_a_client_that_takes_a_little_all_the_time_is_not_cut_off(
    server: LiveServer, session: str, large_state: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(server.server.lifespan.state, "stall_seconds", 1)
    with taking_nothing(server, {"method": "GET", "url": f"/v1/sessions/{session}/state"}) as raw:
        num_bytes, slow_until = 100, time.monotonic() + 5
        while data := raw.recv(4_096 if time.monotonic() < slow_until else 1 << 20):
            num_bytes += len(data)
            if time.monotonic() < slow_until:
                time.sleep(0.05)  # so that what the kernel holds for it lasts for minutes
    assert num_bytes > len(large_state)


def test_a_body_that_does_not_end_and_that_nobody_reads_keeps_no_connection(
    server: LiveServer, session: str, large_state: bytes
) -> None:
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        raw.connect(("127.0.0.1", server.port))
        head = f"GET /v1/sessions/{session}/state HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw.sendall(head.encode())
        assert b"200 OK" in raw.recv(100)
        wait_until_cut_off(server, raw)


@pytest.fixture
def large_state(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """More than the system's buffers take, in the place of a tiny model's."""
    export, blob = SessionService.export_state, random.Random(0).randbytes(24 << 20)

    async def export_large(self: SessionService, *args: Any) -> tuple[SessionRecord, Version, bytes]:
        record, version, _ = await export(self, *args)
        return record, version, blob

    monkeypatch.setattr(SessionService, "export_state", export_large)
    return blob


def test_a_reader_that_takes_nothing_is_left(server: LiveServer, http: httpx.Client, session: str) -> None:
    with taking_nothing(server, telling_much(session)) as raw:
        wait_until_idle(http)
        wait_until_cut_off(server, raw)
        raw.settimeout(10)
        while raw.recv(1 << 20):
            pass  # what had been sent; the end comes, though not the answer's


def learnt(http: httpx.Client, session: str) -> int:
    """Tokens of the document that is under way."""
    (ingestion,) = http.get(f"/v1/sessions/{session}").json()["ingestions"] or [None]
    return http.get(f"/v1/ingestions/{ingestion}").json()["tokens_learnt"] if ingestion else 0


TEXT = b"words " * 6_000  # of whose progress the events are more than all that lies between the two holds


@contextlib.contextmanager
def sending_before_reading(
    server: LiveServer, http: httpx.Client, session: str, monkeypatch: pytest.MonkeyPatch, prefer: str = ""
) -> Iterator[socket.socket]:
    """A connection that has sent nearly all of TEXT, and read nothing of how far that is learnt."""
    connection_made = PunctualProtocol.connection_made

    def with_little_room(self: PunctualProtocol, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
        transport.set_write_buffer_limits(1_000)
        connection_made(self, transport)

    monkeypatch.setattr(PunctualProtocol, "connection_made", with_little_room)
    head = f"POST /v1/sessions/{session}/documents HTTP/1.1\r\nHost: test\r\nContent-Type: text/plain\r\n{prefer}"
    head += f"Accept: text/event-stream\r\nConnection: close\r\nContent-Length: {len(TEXT)}\r\n\r\n"
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        raw.settimeout(60)
        raw.connect(("127.0.0.1", server.port))
        raw.sendall(head.encode() + TEXT[:-1_000])
        while learnt(http, session) < len(TEXT) - 2_000:
            time.sleep(0.05)
        yield raw


@pytest.mark.parametrize("prefer", ["", "Prefer: resumable\r\n"])
def test_a_client_that_reads_nothing_before_all_of_its_document_is_sent_is_not_waited_for(
    server: LiveServer, http: httpx.Client, session: str, monkeypatch: pytest.MonkeyPatch, prefer: str
) -> None:
    with sending_before_reading(server, http, session, monkeypatch, prefer) as raw:
        raw.sendall(TEXT[-1_000:])
        said = b""
        while data := raw.recv(1 << 16):
            said += data
    assert b"event: done" in said


def test_a_document_whose_stream_another_reader_takes_is_read_to_its_end(
    server: LiveServer, http: httpx.Client, session: str
) -> None:
    with Upload(server, session, prefer="resumable") as upload:
        upload.begin("words " * 500)
        with http.stream("GET", f"/v1/streams/{upload.stream_id}") as taken:
            told = events(taken)
            assert next(told).name == "progress"
            time.sleep(0.5)
            upload.send("more words " * 500)
            upload.end()
            assert [event.name for event in told][-2:] == ["done", "message"]
    assert http.get(f"/v1/sessions/{session}").json()["version"] == 1


def test_a_client_that_only_sends_what_is_read_no_further_is_left(
    server: LiveServer, http: httpx.Client, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sending_before_reading(server, http, session, monkeypatch) as raw:
        connection = connection_of(server, raw)
        time.sleep(1)
        assert connection is connection_of(server, raw), "it may still send the rest"
        raw.sendall(b"\xff\xff")
        wait_until_cut_off(server, raw)


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


class CuttingProxy:
    """Passes connections on to a server, and cuts each when it has brought so many bytes of the answer.

    A request is passed on when it has arrived whole, and in one piece, which the server reads as one: a document that
    is cut before the server has read all of it has broken off, which is another thing.
    """

    def __init__(self, server: LiveServer, num_bytes: int) -> None:
        self._target = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        self._num_bytes = num_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_cut = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(timeout=30)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._threads.append(threading.Thread(target=self._serve, args=[self._listener.accept()[0]]))
                self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        """A connection has one request; what comes from the client after it is that it has gone."""
        with contextlib.suppress(OSError), client, socket.create_connection(self._target) as server:
            server.sendall(read_request(client))
            left = self._num_bytes
            while left and client not in select.select([client, server], [], [])[0] and (data := server.recv(left)):
                client.sendall(data)
                left -= len(data)
            self.num_cut += not left
            client.shutdown(socket.SHUT_RDWR)
            server.shutdown(socket.SHUT_RDWR)


def read_request(client: socket.socket) -> bytes:
    """The bytes of a request, to the end of its body. Raises ConnectionError where it ends before."""
    parser, request = h11.Connection(h11.SERVER), b""
    while not isinstance(event := parser.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            if not (data := client.recv(65_536)):
                raise ConnectionError("the client has gone")
            parser.receive_data(data)
            request += data
    return request


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
