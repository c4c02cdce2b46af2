"""What is said to the server and how its answers are read, without any I/O. Both clients are shells around this.

A `Call` is one request with the reader of its one answer; a `StreamCall`, of its stream of events.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar, cast
from urllib.parse import quote

import httpx
from httpx_sse import ServerSentEvent
from pydantic import ValidationError

from ._documents import AsyncBody, AsyncDocumentSource, Body
from ._errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    TitansError,
    event_error,
    status_error,
)
from ._models import (
    Completion,
    CompletionChunk,
    CompletionOptions,
    Document,
    Health,
    IngestEvent,
    Ingestion,
    Progress,
    Session,
    SessionList,
    VersionList,
    Wire,
)
from ._settings import Settings

PLAIN_TEXT = "text/plain; charset=utf-8"
EVENT_STREAM = "text/event-stream"
MAX_WAIT = 60.0  # seconds; a server that asks for more is not waited for
STOP_TIMEOUT = 5.0  # seconds for the server to stop a stream that is given up
POLL = 0.2  # seconds from one "ready?" to the next

T = TypeVar("T")
M = TypeVar("M", bound=Wire)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is sent. Of `json` and `document` at most one is there."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    document: AsyncDocumentSource | None = None
    is_work: bool = False  # the answer takes as long as the work does
    is_repeatable: bool = False  # twice is as good as once

    def arguments(self, body: Body | AsyncBody, settings: Settings) -> dict[str, Any]:
        """What httpx's `request` and `stream` are called with."""
        return {
            "method": self.method,
            "url": self.path,
            "headers": {**self.headers, **body.headers},
            "json": self.json,
            "content": body.content,
            "timeout": settings.timeout_for(work=self.is_work),
        }


@dataclass(frozen=True, kw_only=True)
class Call(Request, Generic[T]):
    """A request with one answer."""

    parse: Callable[[bytes], T]

    def read(self, response: httpx.Response) -> T:
        """The answer, of a response whose body is there. Raises APIStatusError, APIResponseError."""
        if not response.is_success:
            raise refusal(response)
        return self.parse(response.content)


@dataclass(frozen=True, kw_only=True)
class StreamCall(Request, Generic[M]):
    """A request with a stream for an answer: by the events' names, what they hold, and which one is the end."""

    events: Mapping[str, type[M]]
    is_end: Callable[[ServerSentEvent], bool]


class EventReader(Generic[M]):
    """Reads one stream, event by event, over as many connections as it takes."""

    def __init__(self, call: StreamCall[M], max_retries: int) -> None:
        self._call = call
        self._max_retries = max_retries
        self._retries: Retries | None = None  # since the last event
        self._path: str | None = None  # where the stream can be resumed, once it has begun
        self._last_event_id = ""
        self.has_ended = False

    @property
    def next_call(self) -> StreamCall[M]:
        """What to ask for now: the stream, or to go on with it."""
        if self._path is None:
            return replace(self._call, headers={**self._call.headers, "Prefer": "resumable"})
        headers = {"Accept": EVENT_STREAM} | ({"Last-Event-ID": self._last_event_id} if self._last_event_id else {})
        return replace(
            self._call, method="GET", path=self._path, headers=headers, json=None, document=None, is_repeatable=True
        )

    @property
    def stop_path(self) -> str | None:
        """What to DELETE where the rest is not wanted, None where leaving is enough."""
        return None if self.has_ended else self._path

    def check(self, response: httpx.Response) -> None:
        """Look at a response's head. Raises what a refusal stands for: its body has been read."""
        if is_refused(response):
            raise refusal(response)
        if response.headers.get("Preference-Applied") == "resumable" and "X-Stream-ID" in response.headers:
            self._path = f"/v1/streams/{quote(response.headers['X-Stream-ID'], safe='')}"

    def read(self, event: ServerSentEvent) -> M | None:
        """What the event holds, None if that is nothing. Raises what an `error` event stands for.

        Events of other names are skipped: a later server may send more of them.
        """
        self._last_event_id, self._retries = event.id, None
        if event.event == "error":
            self.has_ended = True
            raise event_error(event.data)
        self.has_ended = self.has_ended or self._call.is_end(event)
        model = self._call.events.get(event.event)
        if model is None or event.data in {"", "[DONE]"}:
            return None
        return parse_as(model, event.data)

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """Around the reading: a stream that stops short of its end raises APIConnectionError.

        What happens to the connection after the end does not matter any more.
        """
        try:
            yield
        except httpx.TransportError:
            if not self.has_ended:
                raise
        if not self.has_ended:
            raise APIConnectionError("the stream broke off before its end")

    def wait_after(self, error: TitansError) -> float | None:
        """Seconds to wait before going on; None: the error is the caller's. Raises where the stream is lost."""
        if self._path is None or self.has_ended or isinstance(error, APIResponseError) or _is_silence(error):
            return None
        if isinstance(error, APIStatusError) and error.code in {"stream_not_found", "events_lost"}:
            self._path = None
            raise APIConnectionError(f"the stream broke off and cannot be resumed: {error}") from error
        self._retries = self._retries or Retries(self.next_call, self._max_retries)
        return self._retries.wait_after(error)


class Retries:
    """Whether a call is made again, and when."""

    def __init__(self, call: Request, max_retries: int) -> None:
        self._left = max_retries if call.is_repeatable else 0
        self._backoff = 0.25  # seconds

    def wait_after(self, error: TitansError) -> float | None:
        """Seconds to wait before the next try; None: give up, the error is the caller's.

        Tried again are connections that failed, 429 and 503; the server's Retry-After goes before our own back-off.
        """
        wait = self._backoff * random.uniform(0.5, 1.0)
        if isinstance(error, APIStatusError):
            if error.status not in {429, 503}:
                return None
            wait = wait if error.retry_after is None else error.retry_after
        elif not isinstance(error, APIConnectionError):
            return None
        if self._left == 0 or wait > MAX_WAIT:
            return None
        self._left -= 1
        self._backoff *= 2
        return wait


class Patience:
    """How long to ask a server whether it is ready."""

    def __init__(self, timeout: float, is_alive: Callable[[], bool] | None) -> None:
        self._deadline = time.monotonic() + timeout
        self._is_alive = is_alive

    def has_ended(self) -> bool:
        """Whether there is nothing left to wait for."""
        return time.monotonic() >= self._deadline or not (self._is_alive is None or self._is_alive())


@contextmanager
def connection_errors(base_url: str) -> Iterator[None]:
    """Around the I/O: httpx's errors become ours."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        kind = APITimeoutError if isinstance(error, httpx.TimeoutException) else APIConnectionError
        raise kind(f"cannot connect to {base_url}: {_text(error)}") from error
    except httpx.TimeoutException as error:
        raise APITimeoutError(f"no answer from {base_url} in time: {_text(error)}") from error
    except httpx.RequestError as error:
        raise APIConnectionError(f"the connection to {base_url} broke off: {_text(error)}") from error


def refusal(response: httpx.Response) -> APIStatusError:
    """The error that a response, already read, stands for."""
    return status_error(response.status_code, response.content, response.headers.get("Retry-After"))


def is_refused(response: httpx.Response) -> bool:
    """Whether a stream was refused. Raises APIResponseError if what is offered instead is not a stream."""
    if not response.is_success:
        return True
    content_type = response.headers.get("Content-Type", "")
    if content_type.partition(";")[0].strip().lower() != EVENT_STREAM:
        raise APIResponseError(f"expected a stream of events, but the answer is {content_type or 'of no type'!r}")
    return False


def parse_as(model: type[M], data: bytes | str) -> M:
    """JSON as a model. Raises APIResponseError."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise APIResponseError(f"the answer is not a {model.__name__}: {reason}") from error


def create_session(metadata: Mapping[str, str] | None, ttl_seconds: int | None = None) -> Call[Session]:
    """POST /v1/sessions."""
    given = {"metadata": metadata and dict(metadata), "ttl_seconds": ttl_seconds}
    return Call(method="POST", path="/v1/sessions", json=_given(given) or None, parse=_parser(Session))


def list_sessions(limit: int, after: str | None) -> Call[SessionList]:
    """GET /v1/sessions."""
    path = f"/v1/sessions?limit={limit}" + (f"&after={quote(after, safe='')}" if after else "")
    return Call(method="GET", path=path, is_repeatable=True, parse=_parser(SessionList))


def list_versions(session_id: str) -> Call[VersionList]:
    """GET /v1/sessions/{id}/versions."""
    return Call(method="GET", path=_path(session_id, "versions"), is_repeatable=True, parse=_parser(VersionList))


def restore(session_id: str, version: int, if_version: int | None) -> Call[Session]:
    """POST /v1/sessions/{id}/restore."""
    return Call(
        method="POST",
        path=_path(session_id, "restore"),
        headers=_headers(if_version=if_version),
        json={"version": version},
        is_work=True,
        parse=_parser(Session),
    )


def fork(
    session_id: str, version: int | None, metadata: Mapping[str, str] | None, ttl_seconds: int | None
) -> Call[Session]:
    """POST /v1/sessions/{id}/fork."""
    given = {"version": version, "metadata": metadata and dict(metadata), "ttl_seconds": ttl_seconds}
    return Call(method="POST", path=_path(session_id, "fork"), json=_given(given), parse=_parser(Session))


def export_state(session_id: str, version: int | None) -> Call[bytes]:
    """GET /v1/sessions/{id}/state."""
    path = _path(session_id, "state") + ("" if version is None else f"?version={version}")
    return Call(method="GET", path=path, is_repeatable=True, is_work=True, parse=lambda body: body)


def import_state(session_id: str, state: AsyncDocumentSource, if_version: int | None) -> Call[Session]:
    """PUT /v1/sessions/{id}/state."""
    return Call(
        method="PUT",
        path=_path(session_id, "state"),
        headers=_headers(if_version=if_version) | {"Content-Type": "application/octet-stream"},
        document=state,
        is_work=True,
        parse=_parser(Session),
    )


def ingest_later(
    session_id: str, document: AsyncDocumentSource, content_type: str, key: str | None, if_version: int | None
) -> Call[Ingestion]:
    """POST /v1/sessions/{id}/documents, answered once it is durable and before it is learnt."""
    return Call(
        method="POST",
        path=_path(session_id, "documents"),
        headers=_headers(key, if_version) | {"Content-Type": content_type, "Prefer": "respond-async"},
        document=document,
        is_work=True,
        parse=_parser(Ingestion),
    )


def get_ingestion(ingestion_id: str) -> Call[Ingestion]:
    """GET /v1/ingestions/{id}."""
    path = f"/v1/ingestions/{quote(ingestion_id, safe='')}"
    return Call(method="GET", path=path, is_repeatable=True, parse=_parser(Ingestion))


def cancel_ingestion(ingestion_id: str) -> Call[Ingestion]:
    """DELETE /v1/ingestions/{id}."""
    path = f"/v1/ingestions/{quote(ingestion_id, safe='')}"
    return Call(method="DELETE", path=path, is_repeatable=True, parse=_parser(Ingestion))


def get_session(session_id: str) -> Call[Session]:
    """GET /v1/sessions/{id}."""
    return Call(method="GET", path=_path(session_id), is_repeatable=True, parse=_parser(Session))


def delete_session(session_id: str) -> Call[None]:
    """DELETE /v1/sessions/{id}."""
    return Call(method="DELETE", path=_path(session_id), is_repeatable=True, parse=lambda _: None)


def ingest(
    session_id: str,
    document: AsyncDocumentSource,
    content_type: str,
    key: str | None = None,
    if_version: int | None = None,
) -> Call[Document]:
    """POST /v1/sessions/{id}/documents, one answer."""
    return Call(
        method="POST",
        path=_path(session_id, "documents"),
        headers=_headers(key, if_version) | {"Content-Type": content_type},
        document=document,
        is_work=True,
        parse=_parser(Document),
    )


def ingest_stream(
    session_id: str,
    document: AsyncDocumentSource,
    content_type: str,
    key: str | None = None,
    if_version: int | None = None,
) -> StreamCall[IngestEvent]:
    """The same, with progress. `done` is the end: it says that the document is durable."""
    return StreamCall(
        method="POST",
        path=_path(session_id, "documents"),
        headers=_headers(key, if_version) | {"Content-Type": content_type, "Accept": EVENT_STREAM},
        document=document,
        is_work=True,
        events=cast(Mapping[str, type[IngestEvent]], {"progress": Progress, "done": Document}),
        is_end=lambda event: event.event == "done",
    )


def complete(session_id: str, prompt: str, options: CompletionOptions) -> Call[Completion]:
    """POST /v1/sessions/{id}/completions, one answer."""
    return Call(
        method="POST",
        path=_path(session_id, "completions"),
        json=_completion_body(prompt, options),
        is_work=True,
        parse=_parser(Completion),
    )


def stream(session_id: str, prompt: str, options: CompletionOptions) -> StreamCall[CompletionChunk]:
    """The same, as it comes. `[DONE]` is the end: with `memory="write"` the last text is not yet all."""
    return StreamCall(
        method="POST",
        path=_path(session_id, "completions"),
        headers={"Accept": EVENT_STREAM},
        json={**_completion_body(prompt, options), "stream": True},
        is_work=True,
        events={"message": CompletionChunk},
        is_end=lambda event: event.data == "[DONE]",
    )


def health() -> Call[Health]:
    """GET /health/ready. Asked once: "not now" is an answer."""
    return Call(method="GET", path="/health/ready", parse=_parser(Health))


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _headers(key: str | None = None, if_version: int | None = None) -> dict[str, str]:
    version = None if if_version is None else f'"{if_version}"'
    return _given({"Idempotency-Key": key, "If-Match": version})


def _parser(model: type[M]) -> Callable[[bytes], M]:
    return lambda body: parse_as(model, body)


def _path(session_id: str, *rest: str) -> str:
    if not session_id.strip("."):  # "", "." and ".." would name another resource
        raise ValueError(f"not a session's id: {session_id!r}")
    return "/".join(["/v1/sessions", quote(session_id, safe=""), *rest])


def _completion_body(prompt: str, options: CompletionOptions) -> dict[str, Any]:
    unknown = options.keys() - CompletionOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"no such option of a completion: {', '.join(sorted(unknown))}")
    body = {name: value for name, value in options.items() if value is not None}
    if isinstance(body.get("stop"), Sequence) and not isinstance(body["stop"], str):
        body["stop"] = list(cast(Sequence[str], body["stop"]))
    return {"prompt": prompt, **body}


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


def _is_silence(error: TitansError) -> bool:
    """Whether the server was reached and said nothing for too long; one not reached in time may be tried again."""
    return isinstance(error, APITimeoutError) and not isinstance(error.__cause__, httpx.ConnectTimeout)
