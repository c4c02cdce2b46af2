"""What is said to the server: a call for each thing it can be asked for."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast
from urllib.parse import quote

from ._core import EVENT_STREAM, Call, StreamCall, parse_as
from ._documents import AsyncDocumentSource
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

PLAIN_TEXT = "text/plain; charset=utf-8"

_KEY = re.compile(r"[\x21-\x7e]{1,255}")

M = TypeVar("M", bound=Wire)


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


def check_key(key: str) -> str:
    """An Idempotency-Key, as it is. Raises ValueError for one that the server would refuse, or httpx not send."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"a key has 1 to 255 printable ASCII characters, and no space, unlike {key!r}")
    return key


def _headers(key: str | None = None, if_version: int | None = None) -> dict[str, str]:
    if key is not None:
        check_key(key)
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
