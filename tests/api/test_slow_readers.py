"""Clients on a real socket that take what they are sent too slowly, late, or not at all."""

import contextlib
import json
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.servers import LiveServer, Upload
from support.streams import endless, events, stream_settings, wait_until_idle
from titans_server.service import SessionService
from titans_server.serving import PunctualProtocol
from titans_server.sessions.record import SessionRecord, Version
from titans_server.settings import Settings

TEXT = b"words " * 6_000  # of whose progress the events are more than all that lies between the two holds


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return stream_settings(tmp_path_factory.mktemp("tiny"))


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
    """A long answer, with something said of each of its tokens."""
    request = endless("chat", session)
    request["json"] |= {"logprobs": True, "top_logprobs": 1, "max_tokens": 250_000}
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


def test_an_answer_that_nobody_takes_is_learnt_and_holds_up_no_other_writer(
    server: LiveServer, http: httpx.Client, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(server.server.lifespan.state, "stall_seconds", 60)
    request = telling_much(session)
    request["json"] |= {"max_tokens": 2_000, "top_logprobs": 20, "memory": "write", "session": session}
    with taking_nothing(server, request) as raw:
        plain = {"Content-Type": "text/plain"}
        learnt = http.post(f"/v1/sessions/{session}/documents", content=b"text", headers=plain)
        assert learnt.json()["version"] == 2, "the answer is the version before"
        assert connection_of(server, raw) is not None, "it waits to be taken"


def learnt(http: httpx.Client, session: str) -> int:
    """Tokens of the document that is under way."""
    (ingestion,) = http.get(f"/v1/sessions/{session}").json()["ingestions"] or [None]
    return http.get(f"/v1/ingestions/{ingestion}").json()["tokens_learnt"] if ingestion else 0


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
