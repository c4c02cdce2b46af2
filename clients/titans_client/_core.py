"""How a call's answer is read and when it is made again, without any I/O. Both clients are shells around this.

A `Call` is one request with the reader of its one answer; a `StreamCall`, of its stream of events.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar
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
from ._models import Wire
from ._settings import Settings

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


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


def _is_silence(error: TitansError) -> bool:
    """Whether the server was reached and said nothing for too long; one not reached in time may be tried again."""
    return isinstance(error, APITimeoutError) and not isinstance(error.__cause__, httpx.ConnectTimeout)
