"""Bytes that no well-behaved client sends, on raw sockets: others are served all the while, and nothing is left."""

import contextlib
import gc
import itertools
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.models import write_tiny_checkpoint
from support.servers import LiveServer, tiny_settings
from titans_server.api import lingering
from titans_server.settings import Settings

EOS = 2
MODEL = "tiny-0"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return tiny_settings(
        checkpoint,
        store="memory://",
        max_document_bytes=100_000,
    )


class Raw:
    """A connection on which a test says every byte itself."""

    def __init__(self, server: LiveServer) -> None:
        self.socket = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20)

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, head: str, body: bytes = b"") -> None:
        lines = [line.strip() for line in head.strip().splitlines()]
        self.socket.sendall("\r\n".join([*lines, "Host: test", "", ""]).encode("latin-1") + body)

    def reset(self) -> None:
        """RST instead of FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def answer(self) -> tuple[int, bytes]:
        """The status, and all that comes until the server closes; 0 where it closes without a word."""
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := self.socket.recv(65_536):
                data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        return (int(head.split(b" ")[1]) if head else 0), body


@pytest.fixture
def raw(server: LiveServer) -> Iterator[Raw]:
    with Raw(server) as connection:
        yield connection


def is_served(http: httpx.Client) -> bool:
    session = http.post("/v1/sessions").json()["id"]
    learnt = http.post(f"/v1/sessions/{session}/documents", content="text", headers={"Content-Type": "text/plain"})
    return learnt.status_code == 200 and http.delete(f"/v1/sessions/{session}").status_code == 204


def version(http: httpx.Client, session: str) -> int:
    return int(http.get(f"/v1/sessions/{session}").json()["version"])


def test_slow_heads_and_bodies_keep_nobody_waiting(server: LiveServer, http: httpx.Client, session: str) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(Raw(server)) for _ in range(100)]
        for i, connection in enumerate(slow):
            if i % 2:
                connection.socket.sendall(b"GET /v1/models HTTP/1.1\r\nHost: te")
            else:
                path = f"/v1/sessions/{session}/completions"
                connection.send(f"POST {path} HTTP/1.1\nContent-Type: application/json\nContent-Length: 900", b"{")
        started = time.monotonic()
        for _ in range(5):
            assert is_served(http)
            for connection in slow:
                connection.socket.sendall(b" ")
        assert time.monotonic() - started < 25, "later than that, the slow are left"


def test_a_half_closed_connection_is_answered(raw: Raw) -> None:
    raw.send("GET /health/live HTTP/1.1\nConnection: close")
    raw.socket.shutdown(socket.SHUT_WR)
    status, body = raw.answer()
    assert status in {0, 200}, "uvicorn takes it for a client that has gone; others may answer"
    assert not body or json.loads(body) == {"status": "ok"}


def test_a_document_that_is_half_closed_is_not_learnt(raw: Raw, http: httpx.Client, session: str) -> None:
    raw.send(f"POST /v1/sessions/{session}/documents HTTP/1.1\nContent-Type: text/plain\nContent-Length: 999", b"half")
    raw.socket.shutdown(socket.SHUT_WR)
    raw.answer()
    assert version(http, session) == 0
    assert is_served(http)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/sess", b"POST /v1/sessions HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_resets_before_an_answer_leave_nothing(server: LiveServer, http: httpx.Client, sent: bytes) -> None:
    before = num_descriptors()
    for _ in range(50):
        connection = Raw(server)
        connection.socket.sendall(sent)
        connection.reset()
    assert is_served(http)
    wait_for(lambda: num_descriptors() <= before + 2)


@pytest.mark.parametrize(
    "head",
    [
        "GET /v1/models HTTP/1.1\nX-Bomb: " + "a" * 200_000,
        "GET /v1/models HTTP/1.1\n" + "\n".join(f"X-{i}: {'b' * 60}" for i in range(3_000)),
        "GET /" + "c" * 200_000 + " HTTP/1.1",
    ],
    ids=["one", "many", "path"],
)
def test_a_bomb_of_headers_is_refused(raw: Raw, http: httpx.Client, head: str) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        raw.send(head)
    assert raw.answer()[0] in {0, 400, 431}
    assert is_served(http)


@pytest.mark.parametrize(
    "head",
    [
        "GARBAGE",
        "GET / HTTP/9.9",
        "GET /v1/models HTTP/1.1\nContent-Length: -1",
        "GET /v1/models HTTP/1.1\nContent-Length: 1e3",
        "GET /v1/models HTTP/1.1\nContent-Length: 5\nContent-Length: 6",
        "GET /v1/models HTTP/1.1\nBad Header: x",
        "GET /v1/models HTTP/1.1\nX: a\0b",
        "POST /v1/sessions HTTP/1.1\nTransfer-Encoding: gzip, chunked",
        "\x16\x03\x01\x02",
    ],
)
def test_what_is_not_http_is_refused(raw: Raw, http: httpx.Client, head: str) -> None:
    raw.send(head)
    raw.socket.shutdown(socket.SHUT_WR)
    assert raw.answer()[0] in {0, 400, 404, 501, 505}
    assert is_served(http)


@pytest.mark.parametrize(
    ("chunks", "status"),
    [
        (b"4\r\ntext\r\n0\r\n\r\n", 200),
        (b"4;ext=1\r\ntext\r\n0\r\nTrailer: x\r\n\r\n", 200),
        (b"0\r\n\r\n", 422),
        (b"x\r\ntext\r\n", 0),
        (b"4\r\ntextmore\r\n", 0),
        (b"FFFFFFFFFFFFFFFFFFFF\r\n", 0),
    ],
)
def test_chunks_without_a_length_are_read_and_torn_ones_are_not(
    raw: Raw, http: httpx.Client, session: str, chunks: bytes, status: int
) -> None:
    head = "Content-Type: text/plain\nTransfer-Encoding: chunked\nConnection: close"
    raw.send(f"POST /v1/sessions/{session}/documents HTTP/1.1\n{head}", chunks)
    if not status:
        raw.socket.shutdown(socket.SHUT_WR)
    assert raw.answer()[0] in ({status} if status else {0, 400, 499, 500})
    assert version(http, session) == (1 if status == 200 else 0)
    assert is_served(http)


def test_chunks_without_end_stop_at_the_limit(raw: Raw, http: httpx.Client, session: str) -> None:
    head = "Content-Type: text/plain\nTransfer-Encoding: chunked\nConnection: close"
    raw.send(f"POST /v1/sessions/{session}/documents HTTP/1.1\n{head}")
    chunk = b"1000\r\n" + b"word " * 819 + b"a\r\n"
    for _ in range(30):
        raw.socket.sendall(chunk)
    assert raw.socket.recv(1, socket.MSG_PEEK), "it is refused already"
    raw.socket.sendall(b"0\r\n\r\n")
    assert raw.answer()[0] == 413
    assert version(http, session) == 0
    assert is_served(http)


@pytest.mark.parametrize("http_version", ["1.0", "1.1"])
def test_a_refusal_reaches_who_goes_on_sending(raw: Raw, http: httpx.Client, session: str, http_version: str) -> None:
    """As nginx does, which asks for a connection that is closed."""
    size = 90_000
    head = f"Content-Type: text/plain\nContent-Length: {size}\nConnection: close"
    raw.send(f"POST /v1/sessions/{session}/documents HTTP/{http_version}\n{head}", b"\xff")
    assert raw.socket.recv(1, socket.MSG_PEEK), "it is refused already"
    for _ in range(10):
        raw.socket.sendall(b"a" * (size // 10))
        time.sleep(0.01)
    assert raw.answer()[0] == 422
    assert is_served(http)


def test_a_client_that_was_refused_and_falls_silent_is_left(
    raw: Raw, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`answer` reads until the connection is closed."""
    monkeypatch.setattr(lingering, "_SILENCE_SECONDS", 0.1)
    head = "Content-Type: text/plain\nContent-Length: 900\nConnection: close"
    raw.send(f"POST /v1/sessions/{session}/documents HTTP/1.1\n{head}", b"\xff")
    assert raw.answer()[0] == 422


@pytest.mark.parametrize("length", [3, 10])
def test_a_wrong_length_learns_nothing_but_what_was_announced(
    raw: Raw, http: httpx.Client, session: str, length: int
) -> None:
    head = f"Content-Type: text/plain\nContent-Length: {length}\nConnection: close"
    raw.send(f"POST /v1/sessions/{session}/documents HTTP/1.1\n{head}", b"text is")
    raw.socket.shutdown(socket.SHUT_WR)
    raw.answer()
    seen = http.get(f"/v1/sessions/{session}").json()
    assert seen["tokens_seen"] in ({0, 3} if length == 3 else {0})
    assert is_served(http)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/sessions/../../etc/passwd",
        "/v1/sessions/..%2f..%2f..%2fetc%2fpasswd",
        "/v1/sessions/%00",
        "/v1/sessions/ses_a%0d%0aX-Injected:%201",
        "/v1/sessions/ses_*",
        "/v1/sessions/{ses}",
        "/v1/sessions/%ff%fe",
        "/v1/sessions/'; DROP TABLE sessions; --",
        "/v1/streams/..%2fsessions",
        "/v1/conversations/%2e%2e",
        "//v1/sessions/x",
        "http://elsewhere/v1/sessions/x",
    ],
)
def test_a_path_cannot_be_turned_into_another(raw: Raw, path: str) -> None:
    raw.send(f"GET {path.replace(' ', '%20')} HTTP/1.1\nConnection: close")
    status, body = raw.answer()
    assert status in {400, 404, 405}
    assert b"root:" not in body
    assert b"X-Injected" not in body.partition(b"{")[0]


@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=200), cuts=st.lists(st.integers(0, 200), max_size=5))
@example(data=b"\xef\xbb", cuts=[])
@example(data=b"\xef\xbb\xbf\xef\xbb\xbfa", cuts=[1, 4])
def test_a_document_is_learnt_or_refused_however_its_bytes_are_cut(
    server: LiveServer, http: httpx.Client, data: bytes, cuts: list[int]
) -> None:
    session = http.post("/v1/sessions").json()["id"]
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    head = f"POST /v1/sessions/{session}/documents HTTP/1.1\nContent-Type: text/plain\nConnection: close"
    with Raw(server) as raw:
        raw.send(f"{head}\nTransfer-Encoding: chunked")
        for start, end in itertools.pairwise(edges):
            raw.socket.sendall(b"%x\r\n%b\r\n" % (end - start, data[start:end]))
        raw.socket.sendall(b"0\r\n\r\n")
        status, body = raw.answer()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        assert (status, json.loads(body)["error"]["code"]) == (422, "invalid_utf8")
        assert version(http, session) == 0
        return
    assert status == (200 if text else 422)
    assert not text or json.loads(body)["bytes"] == len(text.encode())


def num_descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_cancelled_streams_leave_no_task_no_slot_and_no_descriptor(server: LiveServer, http: httpx.Client) -> None:
    """TITANS_TEST_STREAMS: how many, 300 unless said otherwise; `make fuzz` has 10,000."""
    body = {"model": MODEL, "prompt": "a", "max_tokens": 4_000, "stream": True, "logit_bias": {str(EOS): -100}}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\nContent-Type: application/json\nContent-Length: {len(content)}"
    context = server.context
    assert http.post("/v1/completions", json=body | {"max_tokens": 1}).status_code == 200  # so that all is set up
    wait_for(lambda: not len(context.streams))
    tasks, descriptors = server.num_tasks(), num_descriptors()
    for i in range(int(os.environ.get("TITANS_TEST_STREAMS", "300"))):
        raw = Raw(server)
        raw.send(head, content)
        if i % 3:
            assert raw.socket.recv(10 if i % 3 == 1 else 1_000)
        if i % 2:
            raw.reset()
        else:
            raw.socket.close()
    wait_for(lambda: not len(context.streams), 60)
    wait_for(lambda: server.num_tasks() <= tasks)
    wait_for(lambda: num_descriptors() <= descriptors + 1)
    wait_for(lambda: "titans_num_requests_running 0.0" in http.get("/metrics").text)  # the compute thread's next step
    assert is_served(http)
