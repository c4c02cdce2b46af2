"""The client for asyncio programs. It differs from `Client` only in what it waits with."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from types import TracebackType
from typing import TypeVar, Unpack

import httpx
from httpx_sse import EventSource

from . import _calls
from ._core import POLL, STOP_TIMEOUT, Call, EventReader, Patience, Retries, StreamCall, connection_errors
from ._documents import AsyncDocumentSource, opened_async
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
from ._streams import AsyncStream

T = TypeVar("T")
M = TypeVar("M", bound=Wire)


class AsyncClient:
    """A titans server, as seen from an asyncio program. Arguments and errors are those of `Client`."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float | None = 30.0,
        work_timeout: float | None = None,
        max_retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._settings = Settings.resolve(base_url, api_key, timeout, work_timeout, max_retries)
        self._http = httpx.AsyncClient(transport=transport, **self._settings.client_arguments())

    @property
    def base_url(self) -> str:
        """Where the server is taken to be."""
        return self._settings.base_url

    @property
    def sessions(self) -> "AsyncSessions":
        """The server's sessions."""
        return AsyncSessions(self)

    async def ingest(
        self,
        session_id: str,
        document: AsyncDocumentSource,
        *,
        content_type: str = _calls.PLAIN_TEXT,
        key: str | None = None,
        if_version: int | None = None,
    ) -> Document:
        """As `Client.ingest`; the document may be an asynchronous iterator too.

        Files and plain iterators are read in a thread, so that the event loop is never held up.
        """
        return await self._send(_calls.ingest(session_id, document, content_type, key, if_version))

    def ingest_stream(
        self,
        session_id: str,
        document: AsyncDocumentSource,
        *,
        content_type: str = _calls.PLAIN_TEXT,
        key: str | None = None,
        if_version: int | None = None,
    ) -> AsyncStream[IngestEvent]:
        """As `Client.ingest_stream`."""
        return AsyncStream(self._events(_calls.ingest_stream(session_id, document, content_type, key, if_version)))

    async def ingest_later(
        self,
        session_id: str,
        document: AsyncDocumentSource,
        *,
        content_type: str = _calls.PLAIN_TEXT,
        key: str | None = None,
        if_version: int | None = None,
    ) -> Ingestion:
        """As `Client.ingest_later`."""
        return await self._send(_calls.ingest_later(session_id, document, content_type, key, if_version))

    async def ingestion(self, ingestion_id: str) -> Ingestion:
        """As `Client.ingestion`."""
        return await self._send(_calls.get_ingestion(ingestion_id))

    async def cancel_ingestion(self, ingestion_id: str) -> Ingestion:
        """As `Client.cancel_ingestion`."""
        return await self._send(_calls.cancel_ingestion(ingestion_id))

    async def complete(self, session_id: str, prompt: str, **options: Unpack[CompletionOptions]) -> Completion:
        """As `Client.complete`."""
        return await self._send(_calls.complete(session_id, prompt, options))

    def stream(
        self, session_id: str, prompt: str, **options: Unpack[CompletionOptions]
    ) -> AsyncStream[CompletionChunk]:
        """As `Client.stream`."""
        return AsyncStream(self._events(_calls.stream(session_id, prompt, options)))

    async def health(self) -> Health:
        """As `Client.health`."""
        return await self._send(_calls.health())

    async def wait_until_ready(
        self,
        timeout: float = 120.0,  # noqa: ASYNC109 — as `Client` has it, which knows no asyncio.timeout
        *,
        is_alive: Callable[[], bool] | None = None,
    ) -> Health:
        """As `Client.wait_until_ready`."""
        patience = Patience(timeout, is_alive)
        while True:
            try:
                return await self.health()
            except (APIConnectionError, ServerUnavailableError):
                if patience.has_ended():
                    raise
            await asyncio.sleep(POLL)

    async def close(self) -> None:
        """Close the connections. The client is of no use afterwards."""
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(self, call: Call[T]) -> T:
        retries = Retries(call, self._settings.max_retries)
        while True:
            try:
                return await self._exchange(call)
            except TitansError as error:
                wait = retries.wait_after(error)
                if wait is None:
                    raise
            await asyncio.sleep(wait)

    async def _exchange(self, call: Call[T]) -> T:
        async with opened_async(call.document) as body:
            with connection_errors(self.base_url):
                response = await self._http.request(**call.arguments(body, self._settings))
        return call.read(response)

    async def _events(self, call: StreamCall[M]) -> AsyncGenerator[M, None]:
        reader = EventReader(call, self._settings.max_retries)
        try:
            while not reader.has_ended:
                try:
                    async with aclosing(self._events_of_one_connection(reader)) as items:
                        async for item in items:
                            yield item
                except TitansError as error:
                    wait = reader.wait_after(error)
                    if wait is None:
                        raise
                    await asyncio.sleep(wait)
        finally:
            if reader.stop_path is not None:
                await asyncio.shield(self._stop(reader.stop_path))  # also where this task is being cancelled

    async def _events_of_one_connection(self, reader: EventReader[M]) -> AsyncGenerator[M, None]:
        call = reader.next_call
        async with opened_async(call.document) as body:
            with connection_errors(self.base_url), reader.to_the_end():
                async with self._http.stream(**call.arguments(body, self._settings)) as response:
                    if not response.is_success:
                        await response.aread()
                    reader.check(response)
                    async with aclosing(EventSource(response).aiter_sse()) as events:
                        async for event in events:
                            item = reader.read(event)
                            if item is not None:
                                yield item

    async def _stop(self, path: str) -> None:
        with suppress(httpx.HTTPError, RuntimeError):  # RuntimeError: the client is closed already
            await self._http.delete(path, timeout=STOP_TIMEOUT)


class AsyncSessions:
    """Making, looking up and deleting sessions. As `Sessions`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def create(self, metadata: Mapping[str, str] | None = None, *, ttl_seconds: int | None = None) -> Session:
        """As `Sessions.create`."""
        return await self._client._send(_calls.create_session(metadata, ttl_seconds))

    async def get(self, session_id: str) -> Session:
        """As `Sessions.get`."""
        return await self._client._send(_calls.get_session(session_id))

    async def delete(self, session_id: str) -> None:
        """As `Sessions.delete`."""
        await self._client._send(_calls.delete_session(session_id))

    async def list(self, limit: int = 20, after: str | None = None) -> SessionList:
        """As `Sessions.list`."""
        return await self._client._send(_calls.list_sessions(limit, after))

    async def versions(self, session_id: str) -> VersionList:
        """As `Sessions.versions`."""
        return await self._client._send(_calls.list_versions(session_id))

    async def restore(self, session_id: str, version: int, *, if_version: int | None = None) -> Session:
        """As `Sessions.restore`."""
        return await self._client._send(_calls.restore(session_id, version, if_version))

    async def fork(
        self,
        session_id: str,
        version: int | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        ttl_seconds: int | None = None,
    ) -> Session:
        """As `Sessions.fork`."""
        return await self._client._send(_calls.fork(session_id, version, metadata, ttl_seconds))

    async def export_state(self, session_id: str, version: int | None = None) -> bytes:
        """As `Sessions.export_state`."""
        return await self._client._send(_calls.export_state(session_id, version))

    async def import_state(
        self, session_id: str, state: AsyncDocumentSource, *, if_version: int | None = None
    ) -> Session:
        """As `Sessions.import_state`."""
        return await self._client._send(_calls.import_state(session_id, state, if_version))
