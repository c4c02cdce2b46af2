"""Clients that fall silent: what they hold is given back, and what was committed of theirs is kept."""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from support.servers import LiveServer, Upload
from titans_client import AsyncClient, Client, cli
from titans_server import serving
from titans_server.settings import Settings

TEXT = b"a story that is told in pieces. " * 20
KEY = {"Idempotency-Key": "the-story"}
PLAIN = "Content-Type: text/plain"


@pytest.fixture(scope="module")
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"upload_idle_seconds": 0.5})


def silent(server: LiveServer, head: str, body: bytes) -> tuple[str, str]:
    """Send a request whose body does not end; the answer's head and its body."""
    with connected(server) as raw:
        lines = [*head.splitlines(), "Host: test", f"Content-Length: {len(body) + 100}", "", ""]
        raw.sendall("\r\n".join(lines).encode() + body)
        answer = b""
        while b"data: [DONE]" not in answer and (data := raw.recv(65_536)):
            answer += data
    found, _, rest = answer.decode().partition("\r\n\r\n")
    return found, rest


def connected(server: LiveServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60)


def assert_stalled(head: str, body: str) -> None:
    assert head.startswith("HTTP/1.1 408 ")
    assert "connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "upload_stalled"


def learn(http: httpx.Client, session: str, text: bytes, headers: dict[str, str]) -> dict[str, Any]:
    headers = {"Content-Type": "text/plain"} | headers
    response = http.post(f"/v1/sessions/{session}/documents", content=text, headers=headers)
    learnt: dict[str, Any] = response.raise_for_status().json()
    return learnt


def test_a_silent_document_lets_go_of_its_session_and_is_gone_on_with_under_its_key(
    server: LiveServer, http: httpx.Client, session: str
) -> None:
    head = f"POST /v1/sessions/{session}/documents HTTP/1.1\n{PLAIN}\nIdempotency-Key: the-story"
    assert_stalled(*silent(server, head, TEXT[:400]))
    (ingestion,) = http.get(f"/v1/sessions/{session}").json()["ingestions"]
    committed = http.get(f"/v1/ingestions/{ingestion}").json()["committed_bytes"]
    assert 0 < committed <= 400
    assert learn(http, session, b"another one, in between", {})["version"] == 1
    learnt = learn(http, session, TEXT, KEY)
    assert (learnt["version"], learnt["bytes"], learnt["replayed"]) == (2, len(TEXT), False)
    assert learnt["ingestion"] == ingestion, "it went on, from what was committed"


@pytest.mark.parametrize("kind", ["sync", "async", "command line"])
async def test_what_comes_out_of_a_pipe_little_by_little_is_sent_as_it_comes(
    server: LiveServer, http: httpx.Client, session: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write() -> None:
        with pipe.open("wb", buffering=0) as file:
            for start in range(0, len(TEXT), 64):  # longer all together than the server waits
                file.write(TEXT[start : start + 64])
                time.sleep(0.15)

    def read() -> None:
        with pipe.open("rb") as file, Client(server.url) as client:
            if kind == "sync":
                client.ingest(session, file)
            else:
                monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=file))
                assert cli.main(["--url", server.url, "ingest", "-", "--session", session]) == 0

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        if kind == "async":
            async with AsyncClient(server.url) as client:
                await client.ingest(session, pipe)
        else:
            await asyncio.to_thread(read)
        writing.result()
    shown = await asyncio.to_thread(http.get, f"/v1/sessions/{session}")
    assert shown.json()["tokens_seen"] == len(TEXT)


@pytest.mark.parametrize("preference", ["", "\nPrefer: respond-async"])
def test_a_silent_document_without_a_key_leaves_nothing(
    server: LiveServer, http: httpx.Client, session: str, preference: str
) -> None:
    path = f"/v1/sessions/{session}"
    assert_stalled(*silent(server, f"POST {path}/documents HTTP/1.1\n{PLAIN}{preference}", TEXT[:400]))
    deadline = time.monotonic() + 30
    while (shown := http.get(path).json())["ingestions"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (shown["version"], shown["stored_bytes"]) == (0, 0)


def test_a_silent_document_that_tells_how_far_it_is_ends_with_an_error(server: LiveServer, session: str) -> None:
    head = f"POST /v1/sessions/{session}/documents HTTP/1.1\n{PLAIN}\nAccept: text/event-stream"
    answered, body = silent(server, head, TEXT[:400])
    assert answered.startswith("HTTP/1.1 200 ")
    assert "event: progress" in body
    assert '"code":"upload_stalled"' in body.partition("event: error")[2]
    assert "data: [DONE]" in body


@pytest.mark.parametrize("method, what", [("POST", "completions"), ("PUT", "state"), ("POST", "fork")])
def test_any_other_silent_body_is_answered(server: LiveServer, session: str, method: str, what: str) -> None:
    head = f"{method} /v1/sessions/{session}/{what} HTTP/1.1\nContent-Type: application/json"
    assert_stalled(*silent(server, head, b'{"prompt": "'))


@pytest.fixture
def hurried(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.5)
    yield server


@pytest.mark.parametrize("sent", [b"", b"GET /health/live HTTP/1.1\r\nHost: te"])
def test_a_connection_without_a_request_is_closed(hurried: LiveServer, sent: bytes) -> None:
    with connected(hurried) as raw:
        raw.sendall(sent)
        assert raw.recv(1) == b""


def test_a_head_that_comes_byte_by_byte_is_not_waited_for(hurried: LiveServer, http: httpx.Client) -> None:
    with connected(hurried) as raw, contextlib.suppress(ConnectionError):
        raw.sendall(b"GET /health/live HTTP/1.1\r\nX: ")
        raw.settimeout(0.05)
        for _ in range(1_000):
            with contextlib.suppress(TimeoutError):
                assert raw.recv(1) == b""
                break
            raw.sendall(b"x")
        else:
            raise AssertionError("it is waited for")
    assert http.get("/health/live").status_code == 200


def test_the_head_of_a_second_request_is_not_waited_for_either(hurried: LiveServer) -> None:
    with connected(hurried) as raw:
        raw.sendall(b"GET /health/live HTTP/1.1\r\nHost: test\r\n\r\n")
        answer = b""
        while b'{"status":"ok"}' not in answer:
            answer += raw.recv(65_536)
        raw.sendall(b"GET /health")
        assert raw.recv(1) == b""


def test_a_body_may_take_longer_than_a_head(server: LiveServer, session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.2)
    assert_stalled(*silent(server, f"POST /v1/sessions/{session}/documents HTTP/1.1\n{PLAIN}", TEXT))


@pytest.mark.parametrize("accept", ["", "Accept: text/event-stream\r\n"], ids=["whole", "streamed"])
@pytest.mark.parametrize("is_whole", [True, False], ids=["all of it sent", "broken off"])
def test_a_client_that_leaves_while_it_waits_for_its_turn_gives_up_its_place(
    server: LiveServer, http: httpx.Client, session: str, accept: str, is_whole: bool
) -> None:
    head = f"POST /v1/sessions/{session}/documents HTTP/1.1\r\nHost: test\r\n{PLAIN}\r\n{accept}"
    with Upload(server, session) as upload, ThreadPoolExecutor() as threads:
        upload.begin("a story that is told for long. " * 20)
        with connected(server) as raw:  # the one place in the line
            raw.sendall(f"{head}Content-Length: {len(TEXT) + (not is_whole)}\r\n\r\n".encode() + TEXT)
            while "titans_http_requests_in_flight 3.0" not in http.get("/metrics").text:
                time.sleep(0.02)
            time.sleep(0.1)
            with pytest.raises(httpx.HTTPStatusError, match="429"):
                learn(http, session, TEXT, {})
        upload.send("and longer. ")  # who is silent for too long is not waited for
        waiting = threads.submit(learn, http, session, TEXT, {})
        deadline = time.monotonic() + 30
        while wait([waiting], timeout=0.3).done:  # refused
            assert time.monotonic() < deadline, "who has left is still waited for"
            upload.send("and longer. ")
            waiting = threads.submit(learn, http, session, TEXT, {})
        upload.send("and that was it.")
        assert upload.finish()[0] == "done"
        assert waiting.result()["version"] == 2
