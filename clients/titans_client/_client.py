"""The client for synchronous programs."""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TypeVar, Unpack

import httpx
from httpx_sse import EventSource

from . import _calls
from ._core import POLL, STOP_TIMEOUT, Call, EventReader, Patience, Retries, StreamCall, connection_errors
from ._documents import DocumentSource, opened
from ._errors import APIConnectionError, ServerUnavailableError, TitansError
from ._models import (
    Completion,
    CompletionChunk,
    CompletionOptions,
    Document,
    Health,
    IngestEvent,
    Ingestion,
    Session,
    SessionList,
    VersionList,
    Wire,
)
from ._settings import Settings
from ._streams import Stream

T = TypeVar("T")
M = TypeVar("M", bound=Wire)


class Client:
    """A titans server, as seen from a synchronous program. Safe to share between threads.

    base_url: of the server; else TITANS_BASE_URL; else http://127.0.0.1:8000.
    api_key: sent as a bearer token; else TITANS_API_KEY; else none is sent.
    timeout: seconds to connect, and for answers that cost no work (sessions, health). None: for ever.
    work_timeout: seconds of silence to bear while a document is learnt or an answer made.
    max_retries: how often a GET or DELETE is repeated when the connection fails or the server says 429 or 503.
        A POST is never repeated: it may have been done. A stream that is cut is resumed where it was, as often as that
        between two of its events.
    transport: what carries the requests; for tests, an `httpx.MockTransport`.

    Every method raises `TitansError`s, ValueError for an id that is none. The constructor raises ValueError for an
    address that is none.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float | None = 30.0,
        work_timeout: float | None = None,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._settings = Settings.resolve(base_url, api_key, timeout, work_timeout, max_retries)
        self._http = httpx.Client(transport=transport, **self._settings.client_arguments())

    @property
    def base_url(self) -> str:
        """Where the server is taken to be."""
        return self._settings.base_url

    @property
    def sessions(self) -> "Sessions":
        """The server's sessions."""
        return Sessions(self)

    def ingest(
        self,
        session_id: str,
        document: DocumentSource,
        *,
        content_type: str = _calls.PLAIN_TEXT,
        key: str | None = None,
        if_version: int | None = None,
    ) -> Document:
        """Have the session learn a document; return when its new state is durable.

        The document is text (a `str` is the text itself, not a path), its bytes, or where to read them: a `Path`,
        an open binary file, an iterator of bytes; these are sent as they are read, in pieces.
        On an error the session stays as it was; only after an APIConnectionError the document may have been learnt
        (its version tells). With a `key`, sent as Idempotency-Key, it may be sent again: it is learnt once, and goes on
        from what was durable. `if_version`: the version that the session has to be at, else VersionConflictError.
        Raises also OSError for a path that cannot be read, TypeError for what is not bytes.
        """
        return self._send(_calls.ingest(session_id, document, content_type, key, if_version))

    def ingest_stream(
        self,
        session_id: str,
        document: DocumentSource,
        *,
        content_type: str = _calls.PLAIN_TEXT,
        key: str | None = None,
        if_version: int | None = None,
    ) -> Stream[IngestEvent]:
        """As `ingest`, told as it goes: any number of `Progress`, then one `Document`.

        The document is sent before the first progress is read. Giving the stream up before its end leaves the
        session as it was.
        """
        return Stream(self._events(_calls.ingest_stream(session_id, document, content_type, key, if_version)))

    def ingest_later(
        self,
        session_id: str,
        document: DocumentSource,
        *,
        content_type: str = _calls.PLAIN_TEXT,
        key: str | None = None,
        if_version: int | None = None,
    ) -> Ingestion:
        """As `ingest`, but return when all of the document is durable: it is learnt afterwards, whatever happens."""
        return self._send(_calls.ingest_later(session_id, document, content_type, key, if_version))

    def ingestion(self, ingestion_id: str) -> Ingestion:
        """How far a document has come. Raises IngestionNotFoundError."""
        return self._send(_calls.get_ingestion(ingestion_id))

    def cancel_ingestion(self, ingestion_id: str) -> Ingestion:
        """Stop a document before it is learnt; one that is done stays. Raises IngestionNotFoundError."""
        return self._send(_calls.cancel_ingestion(ingestion_id))

    def complete(self, session_id: str, prompt: str, **options: Unpack[CompletionOptions]) -> Completion:
        """What follows the prompt, after all that the session has read. `CompletionOptions` says how."""
        return self._send(_calls.complete(session_id, prompt, options))

    def stream(self, session_id: str, prompt: str, **options: Unpack[CompletionOptions]) -> Stream[CompletionChunk]:
        """As `complete`, in pieces, as they come."""
        return Stream(self._events(_calls.stream(session_id, prompt, options)))

    def health(self) -> Health:
        """The server, if it takes work now; raises APIStatusError if it does not. Never retried."""
        return self._send(_calls.health())

    def wait_until_ready(self, timeout: float = 120.0, *, is_alive: Callable[[], bool] | None = None) -> Health:
        """Ask until the server takes work; what `health` then says.

        Raises the last APIConnectionError or ServerUnavailableError when `timeout` seconds have passed, or as soon as
        `is_alive` says no: whether there is a process still to wait for. Any other error at once.
        """
        patience = Patience(timeout, is_alive)
        while True:
            try:
                return self.health()
            except (APIConnectionError, ServerUnavailableError):
                if patience.has_ended():
                    raise
            time.sleep(POLL)

    def close(self) -> None:
        """Close the connections. The client is of no use afterwards."""
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, call: Call[T]) -> T:
        retries = Retries(call, self._settings.max_retries)
        while True:
            try:
                return self._exchange(call)
            except TitansError as error:
                wait = retries.wait_after(error)
                if wait is None:
                    raise
            time.sleep(wait)

    def _exchange(self, call: Call[T]) -> T:
        with opened(call.document) as body, connection_errors(self.base_url):
            response = self._http.request(**call.arguments(body, self._settings))
        return call.read(response)

    def _events(self, call: StreamCall[M]) -> Generator[M, None, None]:
        reader = EventReader(call, self._settings.max_retries)
        try:
            while not reader.has_ended:
                try:
                    yield from self._events_of_one_connection(reader)
                except TitansError as error:
                    wait = reader.wait_after(error)
                    if wait is None:
                        raise
                    time.sleep(wait)
        finally:
            if reader.stop_path is not None:
                with suppress(httpx.HTTPError, RuntimeError):  # RuntimeError: the client is closed already
                    self._http.delete(reader.stop_path, timeout=STOP_TIMEOUT)

    def _events_of_one_connection(self, reader: EventReader[M]) -> Generator[M, None, None]:
        call = reader.next_call
        with (
            opened(call.document) as body,
            connection_errors(self.base_url),
            reader.to_the_end(),
            self._http.stream(**call.arguments(body, self._settings)) as response,
        ):
            if not response.is_success:
                response.read()
            reader.check(response)
            for event in EventSource(response).iter_sse():
                item = reader.read(event)
                if item is not None:
                    yield item


class Sessions:
    """Making, looking up and deleting sessions."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(self, metadata: Mapping[str, str] | None = None, *, ttl_seconds: int | None = None) -> Session:
        """A new session, which has read nothing. The metadata is kept and given back, never looked at."""
        return self._client._send(_calls.create_session(metadata, ttl_seconds))

    def get(self, session_id: str) -> Session:
        """The session as it is now. Raises SessionNotFoundError."""
        return self._client._send(_calls.get_session(session_id))

    def delete(self, session_id: str) -> None:
        """Forget all that the session has learnt. Raises SessionNotFoundError.

        Also when the first try has done it but its answer was lost.
        """
        self._client._send(_calls.delete_session(session_id))

    def list(self, limit: int = 20, after: str | None = None) -> SessionList:
        """Your sessions, newest first: at most `limit`, those that come after the session `after`."""
        return self._client._send(_calls.list_sessions(limit, after))

    def versions(self, session_id: str) -> VersionList:
        """The versions that are kept, newest first."""
        return self._client._send(_calls.list_versions(session_id))

    def restore(self, session_id: str, version: int, *, if_version: int | None = None) -> Session:
        """Make what an older version was the newest, after what was accepted before.

        Raises VersionNotFoundError, VersionConflictError, SessionBusyError.
        """
        return self._client._send(_calls.restore(session_id, version, if_version))

    def fork(
        self,
        session_id: str,
        version: int | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        ttl_seconds: int | None = None,
    ) -> Session:
        """A new session that goes on from a version of another one. Raises VersionNotFoundError."""
        return self._client._send(_calls.fork(session_id, version, metadata, ttl_seconds))

    def export_state(self, session_id: str, version: int | None = None) -> bytes:
        """A version as a safetensors file, which `import_state` reads."""
        return self._client._send(_calls.export_state(session_id, version))

    def import_state(self, session_id: str, state: DocumentSource, *, if_version: int | None = None) -> Session:
        """Make an exported state the newest version. Raises StateMismatchError, InvalidStateError."""
        return self._client._send(_calls.import_state(session_id, state, if_version))
