"""A client for titans-server: sessions whose memory learns what they read.

    from pathlib import Path
    from titans_client import Client

    with Client() as titans:
        session = titans.sessions.create()
        titans.ingest(session.id, Path("book.txt"))
        answer = titans.complete(session.id, "\\n\\nQuestion: Who did it?\\nAnswer:", stop="\\n", temperature=0)
        print(answer.text)

`AsyncClient` is the same for asyncio. All errors are `TitansError`s.
"""

from ._async_client import AsyncClient, AsyncSessions
from ._client import Client, Sessions
from ._documents import AsyncDocumentSource, DocumentSource
from ._errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    DocumentTooLargeError,
    EventsLostError,
    IdempotencyKeyReusedError,
    IngestionCancelledError,
    IngestionInFlightError,
    IngestionNotFoundError,
    InternalServerError,
    InvalidRequestError,
    InvalidStateError,
    ModelNotFoundError,
    RateLimitError,
    ServerUnavailableError,
    SessionBusyError,
    SessionNotFoundError,
    StateCorruptedError,
    StateMismatchError,
    StreamNotFoundError,
    StreamStoppedError,
    TitansError,
    UnsupportedMediaTypeError,
    UploadStalledError,
    VersionConflictError,
    VersionNotFoundError,
)
from ._models import (
    Completion,
    CompletionChunk,
    CompletionOptions,
    Document,
    FinishReason,
    ForkedFrom,
    Health,
    IngestEvent,
    Ingestion,
    Memory,
    Progress,
    Session,
    SessionList,
    Usage,
    Version,
    VersionList,
)
from ._streams import AsyncStream, Stream

__all__ = [
    "APIConnectionError",
    "APIResponseError",
    "APIStatusError",
    "APITimeoutError",
    "AsyncClient",
    "AsyncDocumentSource",
    "AsyncSessions",
    "AsyncStream",
    "AuthenticationError",
    "Client",
    "Completion",
    "CompletionChunk",
    "CompletionOptions",
    "Document",
    "DocumentSource",
    "DocumentTooLargeError",
    "EventsLostError",
    "FinishReason",
    "ForkedFrom",
    "Health",
    "IdempotencyKeyReusedError",
    "IngestEvent",
    "Ingestion",
    "IngestionCancelledError",
    "IngestionInFlightError",
    "IngestionNotFoundError",
    "InternalServerError",
    "InvalidRequestError",
    "InvalidStateError",
    "Memory",
    "ModelNotFoundError",
    "Progress",
    "RateLimitError",
    "ServerUnavailableError",
    "Session",
    "SessionBusyError",
    "SessionList",
    "SessionNotFoundError",
    "Sessions",
    "StateCorruptedError",
    "StateMismatchError",
    "Stream",
    "StreamNotFoundError",
    "StreamStoppedError",
    "TitansError",
    "UnsupportedMediaTypeError",
    "UploadStalledError",
    "Usage",
    "Version",
    "VersionConflictError",
    "VersionList",
    "VersionNotFoundError",
]
