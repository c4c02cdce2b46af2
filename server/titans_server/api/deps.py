"""What routes are given."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, Request
from starlette.requests import ClientDisconnect

from titans_server.api.beginning import Beginning
from titans_server.api.documents import DocumentReader
from titans_server.api.preconditions import IfMatch, prefers
from titans_server.api.sse import EventStream, Framing
from titans_server.api.streams.registry import Streams
from titans_server.api.streams.stream import Reader
from titans_server.errors import DocumentTooLarge, InvalidRequest, QuotaExceeded, StateCorrupted
from titans_server.lifecycle import Lifecycle
from titans_server.service import SessionService
from titans_server.sessions.record import not_found
from titans_server.settings import Settings
from titans_server.telemetry import request as request_info
from titans_server.tenants.gatekeeper import Caller

T = TypeVar("T")

_BEGIN_SECONDS = 5.0  # that a stream's head waits for its answer to begin: long enough to load a state, short of a ping
_PIECE = 16_384  # bytes: a document is passed on in pieces no larger, so that each step stays short


@dataclass(frozen=True)
class AppContext:
    """What lives as long as the app; made in `app.py`."""

    service: SessionService
    streams: Streams
    settings: Settings
    device: str
    store_name: str


def get_context(request: Request) -> AppContext:
    """The app's context. Raises Loading, ModelFailed."""
    return cast(Lifecycle[AppContext], request.state.lifecycle).served


def get_service(request: Request) -> SessionService:
    """The use cases."""
    return get_context(request).service


def get_caller(request: Request) -> Caller:
    """Whom the request is from; `api/gate.py` has found out."""
    return cast(Caller, request.state.caller)


Context = Annotated[AppContext, Depends(get_context)]
Service = Annotated[SessionService, Depends(get_service)]
From = Annotated[Caller, Depends(get_caller)]


async def own_session(session_id: str, caller: From, service: Service) -> str:
    """The id of a session of the caller's. Raises SessionNotFound for another's, as for none.

    Raises StateCorrupted where its record cannot be read, and it is the caller's by the store's list.
    """
    try:
        is_own = (await service.get(session_id)).owner == caller.owner
    except StateCorrupted:
        if await service.is_listed(session_id, caller.owner):
            request_info.about_session(session_id)
            raise
        is_own = False
    if not is_own:
        raise not_found(session_id)
    request_info.about_session(session_id)
    return session_id


async def own_session_to_delete(session_id: str, caller: From, service: Service) -> str:
    """`own_session`, also where its record cannot be read."""
    with suppress(StateCorrupted):
        await own_session(session_id, caller, service)
    return session_id


async def room(caller: From, service: Service) -> None:
    """Raises QuotaExceeded where the caller's sessions may take no more bytes."""
    await _check_room(caller, service, num_new=0)


async def room_for_another(caller: From, service: Service) -> None:
    """Raises QuotaExceeded where the caller may have no more sessions, or no more bytes in them."""
    await _check_room(caller, service, num_new=1)


async def _check_room(caller: Caller, service: SessionService, num_new: int) -> None:
    max_sessions, max_bytes = caller.quotas.sessions, caller.quotas.bytes
    if max_sessions is None and max_bytes is None:
        return
    used = await service.usage(caller.owner)
    if max_sessions is not None and num_new and used.sessions + num_new > max_sessions:
        raise QuotaExceeded(f"this key may have {max_sessions} sessions: delete some")
    if max_bytes is not None and used.num_bytes >= max_bytes:
        raise QuotaExceeded(f"this key's sessions take {used.num_bytes} of {max_bytes} bytes: delete some")


Room = Depends(room)  # of every route that has a session learn
RoomForAnother = Depends(room_for_another)  # of every route that makes one
OwnSession = Annotated[str, Depends(own_session)]  # what every route takes that has {session_id} in its path
OwnSessionToDelete = Annotated[str, Depends(own_session_to_delete)]  # but for those that delete it


class Replying:
    """The two ways to answer a request that costs work: with a stream of events, or with one value at the end.

    Either way the work stops when the client leaves; but for a stream that the request prefers to be resumable.
    """

    def __init__(self, request: Request, caller: From, context: Context, if_match: IfMatch) -> None:
        self._request = request
        self.caller = caller
        self.if_match = if_match
        self._streams = context.streams
        self._resumable = prefers(request, "resumable")

    def stream(
        self, events: AsyncGenerator[Any, None], body_read: asyncio.Event | None = None, framing: Framing | None = None
    ) -> EventStream:
        """The response. `body_read`: see `EventStream`. Raises Overloaded."""
        return EventStream(self._open(events, framing or Framing()), self._streams.limits, body_read)

    async def stream_answer(
        self,
        pieces: AsyncGenerator[T, None],
        events: Callable[[AsyncGenerator[T, None]], AsyncGenerator[Any, None]] = lambda pieces: pieces,
        framing: Framing | None = None,
    ) -> EventStream:
        """The response that tells the events of an answer's pieces, of which none may come before the first piece.

        The reader comes with that piece, and events that fill the ring before would wait for the reader.
        Raises Overloaded, and what the answer fails with before its first piece, so that it is answered with a status.
        """
        beginning = Beginning()
        reader = self._open(events(beginning.of(pieces)), framing or Framing())
        try:
            await unless_disconnected(self._request, beginning.wait(_BEGIN_SECONDS))
        except BaseException:  # the client does not know of it, and could neither resume nor stop it
            await self._streams.drop(reader.stream)
            raise
        return EventStream(reader, self._streams.limits)

    def _open(self, events: AsyncGenerator[Any, None], framing: Framing) -> Reader:
        owner = self.caller.owner
        return self._streams.open(framing.frames(events), framing.farewell, owner=owner, resumable=self._resumable)

    async def whole(self, work: Coroutine[Any, Any, T], body_read: asyncio.Event | None = None) -> T:
        """The result of `work`. Raises ClientDisconnect where the client leaves before: the work is then cancelled."""
        return await unless_disconnected(self._request, work, body_read)


Reply = Annotated[Replying, Depends()]


class Upload:
    """A document's body as text, piece by piece; `read` is set when all of it has arrived that will."""

    def __init__(self, request: Request, reader: DocumentReader, max_bytes: int | None) -> None:
        self._request = request
        self._reader = reader
        self._max_bytes = max_bytes
        self.read = asyncio.Event()
        self._check_size(int(request.headers.get("content-length", 0)))  # refuse at once what says that it is too large

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text. Raises what a document is refused with, and ClientDisconnect where the client leaves."""
        num_bytes = 0
        try:
            async for data in self._request.stream():
                num_bytes += len(data)
                self._check_size(num_bytes)
                for start in range(0, len(data), _PIECE):
                    yield self._reader.feed(data[start : start + _PIECE])
        except ClientDisconnect:
            self.read.set()  # whoever waits for its turn with this document need not
            raise
        self.read.set()
        if not num_bytes:
            raise InvalidRequest("the document is empty", code="empty_document")
        yield self._reader.finish()

    def _check_size(self, num_bytes: int) -> None:
        if self._max_bytes is not None and num_bytes > self._max_bytes:
            raise DocumentTooLarge(f"a document may have {self._max_bytes} bytes")


async def unless_disconnected(
    request: Request, work: Coroutine[Any, Any, T], body_read: asyncio.Event | None = None
) -> T:
    """The result of `work`. Raises ClientDisconnect where the client leaves before: the work is then cancelled."""

    async def wait_for_disconnect() -> None:
        if body_read is not None:
            await body_read.wait()
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
