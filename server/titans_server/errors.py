"""Everything that can go wrong where a user can see it: status, stable code, and whether trying again may help.

    TitansError
    ├── InvalidRequest 422          invalid_request, empty_document, invalid_utf8, invalid_json, invalid_form,
    │                               prompt_too_long, unsupported_parameter, no_chat_template,
    │                               items_not_kept; 400 on OpenAI's endpoints
    ├── InvalidAPIKey 401           invalid_api_key: none, an unknown one, or one that was revoked
    ├── UploadStalled 408           upload_stalled: nothing more came of a body; retryable
    ├── UnsupportedMediaType 415    unsupported_media_type
    ├── DocumentTooLarge 413        document_too_large
    ├── BodyTooLarge 413            body_too_large: of any other request
    ├── HeadersTooLarge 431         headers_too_large
    ├── SessionNotFound 404         session_not_found
    ├── ModelNotFound 404           model_not_found: another model is served
    ├── StreamNotFound 404          stream_not_found
    ├── EventsLost 410              events_lost: what a stream is to go on with is kept no more
    ├── StreamStopped 410           stream_stopped: somebody deleted the stream; only inside one
    ├── VersionNotFound 404         version_not_found: kept no more, or never was
    ├── IngestionNotFound 404       ingestion_not_found
    ├── StateMismatch 409           state_mismatch: the session belongs to another model; nothing is touched
    ├── IngestionInFlight 409       ingestion_in_flight: the same Idempotency-Key is being worked on; retryable
    ├── IngestionCancelled 409      ingestion_cancelled: somebody asked for it
    ├── KeyReused 422               idempotency_key_reused: for another document
    ├── InvalidState 422            invalid_state: a file that is not a session's state; nothing is touched
    ├── VersionConflict 412         version_conflict: the session is not at the version that was asked for
    ├── SessionBusy 429             session_busy: too many writers wait already; retryable
    ├── RateLimited 429             rate_limit_exceeded: a quota of requests or tokens; retryable
    ├── QuotaExceeded 429           quota_exceeded: a quota of sessions or bytes, a rate of 0: waiting does not cure it
    ├── Overloaded 503              overloaded; retryable
    ├── Loading 503                 loading: the model is not there yet; retryable
    ├── ModelFailed 503             model_failed: nothing is computed any more, or ever was
    ├── ShuttingDown 503            shutting_down; retryable
    ├── StoreUnavailable 503        store_unavailable; retryable
    └── StateCorrupted 500          state_corrupted: what the store holds is not what was put there; nothing is touched
                                    but by deleting it

The body is OpenAI's: {"error": {"message", "type", "param", "code"}}. The same names are sent inside a stream.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

_FINAL: Mapping[str, str] = {"X-Should-Retry": "false"}  # OpenAI's clients would, on any 409, 429 and 5xx


class TitansError(Exception):
    """Base of all; a bare one is a fault of ours."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"  # "type" in the body
    default_code: ClassVar[str] = "internal_error"
    retry_after: int | None = None  # seconds
    headers: ClassVar[Mapping[str, str]] = {}  # of the answer

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param

    def body(self) -> dict[str, Any]:
        """The JSON that a client receives."""
        fields = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": fields}


class InvalidRequest(TitansError):
    """The request's values make no sense."""

    status = 422
    kind = "invalid_request_error"
    default_code = "invalid_request"


class InvalidAPIKey(TitansError):
    """Who asks is not known (RFC 6750)."""

    status = 401
    kind = "invalid_request_error"
    default_code = "invalid_api_key"
    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": 'Bearer realm="titans"'}


class UploadStalled(TitansError):
    """A client that fell silent in the middle of its body."""

    status = 408
    kind = "invalid_request_error"
    default_code = "upload_stalled"
    headers: ClassVar[Mapping[str, str]] = {"Connection": "close"}  # RFC 9110, 15.5.9


class UnsupportedMediaType(TitansError):
    """A body of a kind that is not read."""

    status = 415
    kind = "invalid_request_error"
    default_code = "unsupported_media_type"


class DocumentTooLarge(TitansError):
    """More bytes than one document may have."""

    status = 413
    kind = "invalid_request_error"
    default_code = "document_too_large"


class BodyTooLarge(TitansError):
    """A body that is read whole, and has more bytes than that."""

    status = 413
    kind = "invalid_request_error"
    default_code = "body_too_large"


class HeadersTooLarge(TitansError):
    """More bytes than all of a request's headers may have."""

    status = 431
    kind = "invalid_request_error"
    default_code = "headers_too_large"


class SessionNotFound(TitansError):
    """No such session."""

    status = 404
    kind = "invalid_request_error"
    default_code = "session_not_found"


class VersionNotFound(TitansError):
    """No such version of the session is kept."""

    status = 404
    kind = "invalid_request_error"
    default_code = "version_not_found"


class IngestionNotFound(TitansError):
    """No such ingestion, or one that was long ago."""

    status = 404
    kind = "invalid_request_error"
    default_code = "ingestion_not_found"


class IngestionInFlight(TitansError):
    """The same document, by its Idempotency-Key, is being worked on."""

    status = 409
    kind = "invalid_request_error"
    default_code = "ingestion_in_flight"
    retry_after = 1


class IngestionCancelled(TitansError):
    """Somebody asked for the document not to be learnt."""

    status = 409
    kind = "invalid_request_error"
    default_code = "ingestion_cancelled"
    headers: ClassVar[Mapping[str, str]] = _FINAL


class KeyReused(TitansError):
    """An Idempotency-Key that stood for another document."""

    status = 422
    kind = "invalid_request_error"
    default_code = "idempotency_key_reused"


class InvalidState(TitansError):
    """A state file that is torn, of another shape, or holds what is no number."""

    status = 422
    kind = "invalid_request_error"
    default_code = "invalid_state"


class ModelNotFound(TitansError):
    """No such model is served."""

    status = 404
    kind = "invalid_request_error"
    default_code = "model_not_found"


class StreamNotFound(TitansError):
    """No such stream, or none that can be resumed."""

    status = 404
    kind = "invalid_request_error"
    default_code = "stream_not_found"


class EventsLost(TitansError):
    """A stream cannot go on where it is asked to: its ring has moved on."""

    status = 410
    kind = "invalid_request_error"
    default_code = "events_lost"


class StreamStopped(TitansError):
    """A stream was stopped before its end. Told to who reads it."""

    status = 410
    kind = "invalid_request_error"
    default_code = "stream_stopped"


class StateMismatch(TitansError):
    """The session's state was made by another model than the one that is served."""

    status = 409
    kind = "invalid_request_error"
    default_code = "state_mismatch"
    headers: ClassVar[Mapping[str, str]] = _FINAL


class VersionConflict(TitansError):
    """The session has moved on since it was read."""

    status = 412
    kind = "invalid_request_error"
    default_code = "version_conflict"
    headers: ClassVar[Mapping[str, str]] = _FINAL


class SessionBusy(TitansError):
    """One writer at a time, and enough of them wait."""

    status = 429
    kind = "rate_limit_error"
    default_code = "session_busy"
    retry_after = 1


class RateLimited(TitansError):
    """A key has had what it may have for now."""

    status = 429
    kind = "rate_limit_error"
    default_code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = max(1, math.ceil(retry_after))


class QuotaExceeded(TitansError):
    """A key has all that it may ever have: waiting gives it no more, though deleting something may."""

    status = 429
    kind = "rate_limit_error"
    default_code = "quota_exceeded"
    headers: ClassVar[Mapping[str, str]] = _FINAL


class Overloaded(TitansError):
    """The engine has all the work it takes."""

    status = 503
    default_code = "overloaded"
    retry_after = 1


class Loading(TitansError):
    """The model is being loaded."""

    status = 503
    default_code = "loading"
    retry_after = 2


class ModelFailed(TitansError):
    """The model cannot be loaded, or its thread has ended."""

    status = 503
    default_code = "model_failed"
    retry_after = 30


class ShuttingDown(TitansError):
    """The server takes no new work."""

    status = 503
    default_code = "shutting_down"
    retry_after = 5


class StoreUnavailable(TitansError):
    """The store cannot be reached, or refuses to write."""

    status = 503
    default_code = "store_unavailable"
    retry_after = 5


class StateCorrupted(TitansError):
    """The stored state is torn or altered. It is left as it is."""

    default_code = "state_corrupted"
    headers: ClassVar[Mapping[str, str]] = _FINAL
