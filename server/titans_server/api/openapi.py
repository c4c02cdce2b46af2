"""The OpenAPI document: what FastAPI finds out by itself, and what it cannot know."""

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from titans_server import errors
from titans_server.errors import TitansError

Json = dict[str, Any]

_ERROR = {
    "type": "object",
    "title": "Error",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_EVENTS = {
    "text/event-stream": {
        "schema": {  # of one event
            "type": "object",
            "required": ["data", "id"],
            "properties": {
                "data": {"type": "string", "description": "JSON; of the last event [DONE]"},
                "event": {"type": "string", "description": "its name"},
                "id": {"type": "string", "description": "its number in the stream"},
            },
        }
    }
}
_TEXT = {
    "type": "object",
    "required": ["text"],
    "additionalProperties": False,
    "properties": {"text": {"type": "string", "minLength": 1}},
}
_FORM = {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}, "required": ["file"]}
_BODIES: dict[tuple[str, str], Json] = {  # that a route reads itself
    ("post", "/v1/sessions/{session_id}/documents"): {
        "text/plain": {"schema": {"type": "string", "minLength": 1}},
        "application/json": {"schema": _TEXT},
        "application/x-ndjson": {"schema": {"type": "string", "description": "an object as of JSON a line"}},
        "multipart/form-data": {"schema": _FORM},
    },
    ("put", "/v1/sessions/{session_id}/state"): {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}
_IF_MATCH = {
    "name": "If-Match",
    "in": "header",
    "description": "the session's ETag: nothing is done unless it is still so",
    "schema": {"type": "string"},
}
_ONCE = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "with the same key the same document is learnt once",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
}
_RESUMABLE = {
    "name": "Prefer",
    "in": "header",
    "description": "`resumable`: see GET /v1/streams/{stream_id}",
    "schema": {"type": "string"},
}
_RESUMABLE_OR_LATER = _RESUMABLE | {"description": f"{_RESUMABLE['description']}; `respond-async`: learnt later"}
_HEADERS: dict[tuple[str, str], list[Json]] = {  # that a route reads itself
    ("delete", "/v1/sessions/{session_id}"): [_IF_MATCH],
    ("post", "/v1/sessions/{session_id}/completions"): [_IF_MATCH, _RESUMABLE],
    ("post", "/v1/sessions/{session_id}/documents"): [_IF_MATCH, _ONCE, _RESUMABLE_OR_LATER],
    ("post", "/v1/sessions/{session_id}/restore"): [_IF_MATCH],
    ("put", "/v1/sessions/{session_id}/state"): [_IF_MATCH],
    ("post", "/v1/completions"): [_IF_MATCH, _RESUMABLE],
    ("post", "/v1/chat/completions"): [_IF_MATCH, _RESUMABLE],
    ("post", "/v1/responses"): [_IF_MATCH, _RESUMABLE],
    ("delete", "/v1/conversations/{session_id}"): [_IF_MATCH],
    ("post", "/v1/conversations/{session_id}/items"): [_IF_MATCH],
}
_METRICS = "/metrics"
_STREAMED = {  # operations that may answer with events
    "/v1/sessions/{session_id}/documents",
    "/v1/sessions/{session_id}/completions",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
}


def describe(app: FastAPI, of_openai: Sequence[APIRouter]) -> None:
    """Have the app's document name every status and kind of body that its operations answer with.

    `of_openai`: where what makes no sense is answered 400.
    """
    openai_paths = {route.path for router in of_openai for route in router.routes if isinstance(route, APIRoute)}

    def document() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(
                get_openapi(title=app.title, version=app.version, routes=app.routes), openai_paths
            )
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _completed(document: Json, openai_paths: set[str]) -> Json:
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own: our errors have another shape
        schemas.pop(name, None)
    schemas["Error"] = _ERROR
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete(operation, path, method, refused=400 if path in openai_paths else 422)
    return document


def _complete(operation: Json, path: str, method: str, refused: int) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    if (method, path) in _BODIES:
        operation["requestBody"] = {"required": True, "content": _BODIES[method, path]}
    operation.setdefault("parameters", []).extend(_HEADERS.get((method, path), []))
    if path == "/v1/sessions/{session_id}/state" and method == "get":
        responses["200"]["content"] = _BODIES["put", path]
    if path in _STREAMED:
        responses["200"]["content"] = responses["200"]["content"] | _EVENTS
    if path == "/v1/streams/{stream_id}" and method == "get":
        responses["200"]["content"] = _EVENTS
        responses["204"] = {"description": "The stream has ended there"}
    if path == _METRICS:
        responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if path.startswith("/v1/") or path == _METRICS:
        operation["security"] = [{"key": []}, {}]
    reference = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status, codes in sorted(_failures(operation, path, method, refused).items()):
        responses[str(status)] = {"description": ", ".join(codes), "content": reference}


def _failures(operation: Json, path: str, method: str, refused: int) -> dict[int, list[str]]:
    """The codes of an operation's errors, by their status."""
    found: dict[int, list[str]] = {}
    for error in _errors(operation, path, method):
        status = refused if error is errors.InvalidRequest else error.status
        found.setdefault(status, []).append(error.default_code)
    return {status: list(dict.fromkeys(codes)) for status, codes in found.items()}


def _errors(operation: Json, path: str, method: str) -> Iterator[type[TitansError]]:
    if path == "/health/ready":
        yield from (errors.Loading, errors.ModelFailed, errors.ShuttingDown, errors.StoreUnavailable)
    if path.startswith("/v1/") or path == _METRICS:
        yield from (errors.InvalidAPIKey, errors.HeadersTooLarge, errors.UnsupportedMediaType, errors.BodyTooLarge)
        yield from (errors.StoreUnavailable, TitansError)
    if not path.startswith("/v1/"):
        return
    yield from (errors.RateLimited, errors.QuotaExceeded, errors.Overloaded, errors.Loading, errors.ModelFailed)
    yield errors.ShuttingDown
    parameters = operation.get("parameters", [])
    if "requestBody" in operation or any(x["in"] != "path" for x in parameters) or path.endswith("/items"):
        yield errors.InvalidRequest
    if "requestBody" in operation:
        yield errors.UploadStalled
    yield from _errors_of_resources({parameter["name"] for parameter in parameters}, path, method)


def _errors_of_resources(names: set[str], path: str, method: str) -> Iterator[type[TitansError]]:
    if "stream_id" in names:
        yield errors.StreamNotFound
    if "Last-Event-ID" in names:
        yield errors.EventsLost
    if "model" in names or "X-Session-ID" in names:
        yield errors.ModelNotFound
    if "ingestion_id" in names:
        yield from (errors.IngestionNotFound, errors.SessionNotFound)
    if not {"session_id", "X-Session-ID", "after"} & names:
        return
    yield errors.SessionNotFound
    if method != "get":
        yield from (errors.StateMismatch, errors.VersionConflict)
    if method not in {"get", "delete"}:  # which wait for no writer
        yield errors.SessionBusy
    if path.endswith(("/fork", "/restore", "/state")):
        yield errors.VersionNotFound
    if path.endswith("/state"):
        yield from (errors.StateMismatch, errors.InvalidState, errors.DocumentTooLarge)
    if path.endswith("/documents"):
        yield from (errors.DocumentTooLarge, errors.KeyReused, errors.IngestionInFlight, errors.IngestionCancelled)
