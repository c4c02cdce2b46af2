"""A driver that puts both clients through the same tests, and a small real server that speaks docs/api.md."""

import inspect
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from titans_client import AsyncClient, Client

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TITANS_BASE_URL", raising=False)
    monkeypatch.delenv("TITANS_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A response's body in given pieces, which knows whether it was closed; an exception among them is raised."""

    def __init__(self, pieces: Iterable[bytes | Exception]) -> None:
        self._pieces = pieces
        self.num_sent = 0
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            self.num_sent += 1
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class Driver:
    """Does with one kind of client what a test says; the test need not know which kind."""

    kind: str

    async def use(self, handler: Handler | Any, action: Callable[[Any], Any], **settings: Any) -> Any:
        """What `action` gives for a fresh client; `handler` may be a transport instead."""
        transport: Any = httpx.MockTransport(handler) if inspect.isroutine(handler) else handler
        if self.kind == "sync":
            with Client(transport=transport, **settings) as client:
                return await _settled(action(client))
        async with AsyncClient(transport=transport, **settings) as async_client:
            return await _settled(action(async_client))

    async def collect(self, handler: Handler | Any, action: Callable[[Any], Any], **settings: Any) -> list[Any]:
        """The items of the stream that `action` gives."""

        async def drain(client: Any) -> list[Any]:
            stream = action(client)
            return list(stream) if self.kind == "sync" else [item async for item in stream]

        result: list[Any] = await self.use(handler, drain, **settings)
        return result

    async def first(self, stream: Any) -> Any:
        return next(stream) if self.kind == "sync" else await anext(stream)

    async def close(self, stream: Any) -> None:
        await _settled(stream.close())


async def _settled(value: Any) -> Any:
    return await value if isinstance(value, Awaitable) else value


@pytest.fixture(params=["sync", "async"])
def driver(request: pytest.FixtureRequest) -> Driver:
    return Driver(request.param)


@pytest.fixture
def pieces() -> type[Pieces]:
    return Pieces


SESSION: dict[str, Any] = {
    "id": "ses_1",
    "object": "session",
    "version": 0,
    "tokens_seen": 0,
    "state_bytes": 0,
    "model": "tiny",
    "fingerprint": "f00d",
    "created_at": 1760000000.0,
    "updated_at": 1760000000.0,
    "stored_bytes": 0,
    "expires_at": None,
    "parent": None,
    "ingestions": [],
    "metadata": {},
}
DOCUMENT: dict[str, Any] = {
    "object": "document",
    "session": "ses_1",
    "version": 1,
    "tokens": 100,
    "bytes": 400,
    "tokens_seen": 100,
    "seconds": 0.5,
    "ingestion": "ing_1_a",
    "replayed": False,
}
COMPLETION: dict[str, Any] = {
    "id": "cmpl_1",
    "object": "completion",
    "session": "ses_1",
    "version": 1,
    "model": "tiny",
    "text": " 4819203.",
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 18, "completion_tokens": 9, "total_tokens": 27},
}
HEALTH = {"status": "ready", "model": "tiny", "fingerprint": "f00d", "device": "cpu", "store": "memory"}


@pytest.fixture
def wire() -> dict[str, dict[str, Any]]:
    """An example of each body."""
    return {"session": SESSION, "document": DOCUMENT, "completion": COMPLETION, "health": HEALTH}


@dataclass
class Seen:
    """A request as the server had it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Contract:
    """What the small server has seen, and how it is to behave."""

    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)
    answer: list[str] = field(default_factory=lambda: [" 48", "192", "03."])
    endless: bool = False  # completions go on until the client leaves
    fail: tuple[int, str, str] | None = None  # status, code, message; inside a stream if status is 200
    retry_after: str = "0"
    body_began: threading.Event = field(default_factory=threading.Event)
    client_left: threading.Event = field(default_factory=threading.Event)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    contract: Contract

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.contract.client_left.set()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def _answer(self) -> None:
        contract = self.server.contract
        body = self._read_body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        contract.seen.append(Seen(self.command, self.path, headers, body))
        if contract.fail is not None and contract.fail[0] != 200:
            status, code, message = contract.fail
            self._send_json(status, _error(code, message))
            return
        match [self.command, *self.path.strip("/").split("/")]:
            case ["GET", "health", "ready"]:
                self._send_json(200, HEALTH)
            case ["POST", "v1", "sessions"]:
                session = SESSION | {"id": f"ses_{len(contract.sessions) + 1}"}
                contract.sessions[session["id"]] = session
                self._send_json(201, session)
            case [_, "v1", "sessions", name, *_] if name not in contract.sessions:
                self._send_json(404, _error("session_not_found", f"no session {name}"))
            case ["GET", "v1", "sessions", name]:
                self._send_json(200, contract.sessions[name])
            case ["DELETE", "v1", "sessions", name]:
                del contract.sessions[name]
                self.send_response(204)
                self.end_headers()
            case ["POST", "v1", "sessions", name, "documents"]:
                self._ingest(name, body)
            case ["POST", "v1", "sessions", name, "completions"]:
                self._complete(name, json.loads(body))

    def _ingest(self, name: str, body: bytes) -> None:
        size = len(body)
        document = DOCUMENT | {"session": name, "bytes": size, "tokens": size // 4}
        if "text/event-stream" not in self.headers["Accept"]:
            self._send_json(200, document)
            return
        self._start_stream()
        self._send_event({"tokens": size // 8, "bytes": size // 2, "seconds": 0.25}, "progress")
        if self._failed_inside():
            return
        self._send_event(document, "done")
        self._end_stream()

    def _complete(self, name: str, request: dict[str, Any]) -> None:
        contract = self.server.contract
        if not request.get("stream"):
            self._send_json(200, COMPLETION | {"session": name, "text": "".join(contract.answer)})
            return
        self._start_stream()
        chunk = COMPLETION | {"object": "completion.chunk", "session": name, "finish_reason": None, "usage": None}
        for text in contract.answer:
            self._send_event(chunk | {"text": text})
        while contract.endless:
            self._send_event(chunk | {"text": "more"})
        if self._failed_inside():
            return
        self._send_event(chunk | {"text": "", "finish_reason": "stop", "usage": COMPLETION["usage"]})
        self._end_stream()

    def _failed_inside(self) -> bool:
        fail = self.server.contract.fail
        if fail is None:
            return False
        self._send_event(_error(fail[1], fail[2]), "error")
        self._end_stream()
        return True

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
            self.server.contract.body_began.set()
        self.rfile.readline()
        return body

    def _send_json(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status in {429, 503}:
            self.send_header("Retry-After", self.server.contract.retry_after)
        self.end_headers()
        self.wfile.write(data)

    def _start_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _send_event(self, data: Any, event: str | None = None) -> None:
        name = "" if event is None else f"event: {event}\n"
        text = data if isinstance(data, str) else json.dumps(data)
        self._send_piece(f"{name}data: {text}\n\n".encode())

    def _end_stream(self) -> None:
        self._send_event("[DONE]")
        self._send_piece(b"")

    def _send_piece(self, piece: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))


def _error(code: str, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


@pytest.fixture
def contract() -> Iterator[Contract]:
    """A server on a real socket, in a thread of its own."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.contract = Contract(url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.contract
    server.contract.endless = False
    server.shutdown()
    server.server_close()
    thread.join()
