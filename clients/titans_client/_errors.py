"""Everything that can go wrong, as one tree. Catch a leaf to act on it, `TitansError` to report it.

    TitansError
    ├── APIConnectionError             no answer came, or it broke off before its end
    │   └── APITimeoutError            … within the time allowed
    ├── APIResponseError               an answer that is not of this API: a proxy's page, a body of another shape
    └── APIStatusError                 the server said no: status, code, message, param, retry_after
        ├── InvalidRequestError 422    invalid_request, empty_document, invalid_utf8, invalid_json, invalid_form,
        │                          prompt_too_long, unsupported_parameter, no_chat_template, items_not_kept
        │                          body_too_large (413), headers_too_large (431)
        ├── AuthenticationError 401    invalid_api_key
        ├── UploadStalledError 408     upload_stalled: nothing more of the body came
        ├── UnsupportedMediaTypeError 415   unsupported_media_type
        ├── DocumentTooLargeError 413  document_too_large
        ├── SessionNotFoundError 404   session_not_found
        ├── VersionNotFoundError 404   version_not_found
        ├── IngestionNotFoundError 404 ingestion_not_found
        ├── ModelNotFoundError 404     model_not_found
        ├── StreamNotFoundError 404    stream_not_found
        ├── EventsLostError 410        events_lost: what a stream is to go on with is kept no more
        ├── StreamStoppedError 410     stream_stopped: somebody deleted the stream
        ├── StateMismatchError 409     state_mismatch: the session was made by another model
        ├── IngestionInFlightError 409 ingestion_in_flight: the same key; try again after `retry_after` seconds
        ├── IngestionCancelledError 409   ingestion_cancelled
        ├── VersionConflictError 412   version_conflict: nothing was written
        ├── IdempotencyKeyReusedError 422 idempotency_key_reused: for another document
        ├── InvalidStateError 422      invalid_state: a file that is no state of this model
        ├── SessionBusyError 429       session_busy: try again after `retry_after` seconds
        ├── RateLimitError 429         rate_limit_exceeded: try again after `retry_after` seconds; quota_exceeded
        ├── ServerUnavailableError 503 loading, overloaded, shutting_down, store_unavailable, model_failed, or a
        │                          gateway's own 503
        ├── StateCorruptedError 500    state_corrupted
        └── InternalServerError 500    internal_error

A code that is not in the tree raises a bare `APIStatusError`. An `error` event inside a stream raises the same classes.
Mistakes that never reach the server are Python's own: TypeError, ValueError, OSError.
"""

import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Final

from pydantic import BaseModel, ValidationError


class TitansError(Exception):
    """Base of all that a client raises on the server's or the network's account."""


class APIConnectionError(TitansError):
    """No answer came, or it broke off before its end. Whether the server has acted is not known."""


class APITimeoutError(APIConnectionError):
    """Nothing was heard within the time allowed."""


class APIResponseError(TitansError):
    """An answer that is not of this API."""


class APIStatusError(TitansError):
    """The server said no.

    status: of the answer; inside a stream, the one that the code stands for.
    code: the stable name, None if the answer did not come from a titans server.
    param: the field at fault, if one is.
    retry_after: seconds after which to try again, if the server says so.
    """

    def __init__(
        self,
        message: str,
        status: int,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, status, code, param, retry_after)  # all of them, so that it can be pickled
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.message


class InvalidRequestError(APIStatusError):
    """The request's values make no sense."""


class AuthenticationError(APIStatusError):
    """No API key, an unknown one, or one that was revoked."""


class UploadStalledError(APIStatusError):
    """Nothing more of the body came, and the server waits no more. A document with a key goes on when sent again."""


class UnsupportedMediaTypeError(APIStatusError):
    """A document of a kind that is not read, or not in UTF-8."""


class DocumentTooLargeError(APIStatusError):
    """More bytes than the server takes as one document."""


class SessionNotFoundError(APIStatusError):
    """No such session."""


class VersionNotFoundError(APIStatusError):
    """The session keeps no such version."""


class IngestionNotFoundError(APIStatusError):
    """No such document is under way or was learnt lately."""


class IngestionInFlightError(APIStatusError):
    """A document with the same key is being worked on."""


class IngestionCancelledError(APIStatusError):
    """Somebody cancelled the document; nothing was written."""


class IdempotencyKeyReusedError(APIStatusError):
    """The key was used for another document."""


class InvalidStateError(APIStatusError):
    """A file that is torn, altered or of another shape; nothing was written."""


class ModelNotFoundError(APIStatusError):
    """Another model is served than the one asked for."""


class StreamNotFoundError(APIStatusError):
    """No such stream, or it cannot be resumed."""


class EventsLostError(APIStatusError):
    """A stream cannot go on where it was cut: its events are kept no more."""


class StreamStoppedError(APIStatusError):
    """The stream was deleted before its end."""


class StateMismatchError(APIStatusError):
    """The session was made by another model than the one served; it is left as it is."""


class VersionConflictError(APIStatusError):
    """The session is at another version than was asked for; nothing was written."""


class SessionBusyError(APIStatusError):
    """One writer a session at a time, and too many wait already."""


class RateLimitError(APIStatusError):
    """The API key has had what it may have: for now (`retry_after` says how long), or until something is deleted."""


class ServerUnavailableError(APIStatusError):
    """The server takes no work now; later it may."""


class StateCorruptedError(APIStatusError):
    """The stored state is torn; it is left as it is."""


class InternalServerError(APIStatusError):
    """A fault of the server."""


BY_CODE: Final[Mapping[str, tuple[int, type[APIStatusError]]]] = {
    "invalid_request": (422, InvalidRequestError),
    "empty_document": (422, InvalidRequestError),
    "invalid_utf8": (422, InvalidRequestError),
    "invalid_json": (422, InvalidRequestError),
    "invalid_form": (422, InvalidRequestError),
    "prompt_too_long": (422, InvalidRequestError),
    "unsupported_parameter": (422, InvalidRequestError),
    "no_chat_template": (422, InvalidRequestError),
    "items_not_kept": (422, InvalidRequestError),
    "body_too_large": (413, InvalidRequestError),
    "headers_too_large": (431, InvalidRequestError),
    "invalid_api_key": (401, AuthenticationError),
    "upload_stalled": (408, UploadStalledError),
    "unsupported_media_type": (415, UnsupportedMediaTypeError),
    "document_too_large": (413, DocumentTooLargeError),
    "session_not_found": (404, SessionNotFoundError),
    "version_not_found": (404, VersionNotFoundError),
    "ingestion_not_found": (404, IngestionNotFoundError),
    "ingestion_in_flight": (409, IngestionInFlightError),
    "ingestion_cancelled": (409, IngestionCancelledError),
    "idempotency_key_reused": (422, IdempotencyKeyReusedError),
    "invalid_state": (422, InvalidStateError),
    "model_not_found": (404, ModelNotFoundError),
    "stream_not_found": (404, StreamNotFoundError),
    "events_lost": (410, EventsLostError),
    "stream_stopped": (410, StreamStoppedError),
    "state_mismatch": (409, StateMismatchError),
    "version_conflict": (412, VersionConflictError),
    "session_busy": (429, SessionBusyError),
    "rate_limit_exceeded": (429, RateLimitError),
    "quota_exceeded": (429, RateLimitError),
    "loading": (503, ServerUnavailableError),
    "model_failed": (503, ServerUnavailableError),
    "overloaded": (503, ServerUnavailableError),
    "shutting_down": (503, ServerUnavailableError),
    "store_unavailable": (503, ServerUnavailableError),
    "state_corrupted": (500, StateCorruptedError),
    "internal_error": (500, InternalServerError),
}


class _Fault(BaseModel):
    message: str
    code: str | None = None
    param: str | None = None


class _ErrorBody(BaseModel):
    error: _Fault


def status_error(status: int, body: bytes, retry_after: str | None = None) -> APIStatusError:
    """The error that an answer of this status stands for; `retry_after` is the header's value."""
    seconds = parse_retry_after(retry_after)
    try:
        fault = _ErrorBody.model_validate_json(body).error
    except ValidationError:
        fault = _Fault(message=_describe(status, body))
    fallback = ServerUnavailableError if status == HTTPStatus.SERVICE_UNAVAILABLE else APIStatusError
    _, error = BY_CODE.get(fault.code or "", (status, fallback))
    return error(fault.message, status, fault.code, fault.param, seconds)


def event_error(data: str) -> TitansError:
    """The error that an `error` event inside a stream stands for."""
    try:
        fault = _ErrorBody.model_validate_json(data).error
    except ValidationError:
        return APIResponseError(f"the stream failed with something that is not an error body: {data[:200]!r}")
    status, error = BY_CODE.get(fault.code or "", (500, APIStatusError))
    return error(fault.message, status, fault.code, fault.param)


def parse_retry_after(value: str | None) -> float | None:
    """Seconds from now, of a Retry-After header: a number or a date. None for none and for nonsense."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _describe(status: int, body: bytes) -> str:
    """One line about an answer that is not an error body."""
    name = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "unknown status"
    text = " ".join(body[:200].decode("utf-8", "replace").split())
    return f"HTTP {status} {name}: {text}" if text else f"HTTP {status} {name}"
