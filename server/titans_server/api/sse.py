"""Server-sent events: one framing for every stream, errors by the same names as outside."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from titans_server.api.streams.registry import StreamLimits
from titans_server.api.streams.ring import Frame
from titans_server.api.streams.stream import Reader
from titans_server.errors import InvalidRequest, StreamStopped, TitansError
from titans_server.events import CompletionChunk, DocumentLearnt, Progress
from titans_server.telemetry import request

log = logging.getLogger(__name__)

Event = Progress | DocumentLearnt | CompletionChunk | dict[str, Any]  # a dict is JSON already
DONE = Frame("[DONE]")


class Ping(ServerSentEvent):
    """A comment, which no empty line follows.

    OpenAI's clients would take that for the end of an event, and an event without data for a fault.
    """

    def encode(self) -> bytes:
        """As it goes over the wire."""
        return b": ping\r\n"


class EventStream(EventSourceResponse):
    """A response that is what a reader takes of a stream."""

    def __init__(self, reader: Reader, limits: StreamLimits, body_read: asyncio.Event | None = None) -> None:
        """`body_read`: set when the request's body, which the stream reads, has been read."""
        headers = {"X-Stream-ID": reader.stream.id}
        if reader.stream.is_resumable:
            headers["Preference-Applied"] = "resumable"
        super().__init__(
            reader.events() if body_read is None else self._events_of_document(body_read),
            headers=headers,
            ping=limits.ping_seconds,
            ping_message_factory=Ping,
            data_sender_callable=self._leave_who_only_sends,
        )
        self._stall_seconds = limits.stall_seconds
        self._reader = reader
        self._body_read = body_read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as ASGI wants it."""

        async def after_body() -> Message:
            """The watch for a client that leaves must not swallow the body."""
            if self._body_read is not None:
                await self._body_read.wait()
            return await receive()

        try:
            await super().__call__(scope, after_body, send)
        except SendTimeoutError:
            log.info("a reader that took nothing for too long was left")
        finally:
            if self._reader.told is not None:  # it was told to this request, whichever the stream was made for
                request.failed(self._reader.told)
            self._reader.leave()

    async def _events_of_document(self, body_read: asyncio.Event) -> AsyncGenerator[bytes, None]:
        """What the reader takes; then no end before the body's: of a request that is answered no more is read.

        Whoever sends a document is not cut off by another who looks at how far it has come.
        """
        async for event in self._reader.events():
            yield event
        reading = asyncio.create_task(body_read.wait())
        try:
            await asyncio.wait({reading, self._reader.stream.task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            reading.cancel()

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """Send, however long it takes.

        The library's own makes a cancel scope for each event, which takes a fifth of the event loop's time.
        """
        await send(message)

    async def _leave_who_only_sends(self) -> None:
        """Raises SendTimeoutError, which ends the response, where the end of an ended stream is not taken in time.

        That is for one that goes on sending a document which is read no further. All others the connection watches
        (`serving.py`), and who has yet to send what is read may take nothing meanwhile.
        """
        if self._body_read is None:
            return
        await asyncio.wait([self._reader.stream.task])
        await asyncio.sleep(self._stall_seconds)
        if not self._body_read.is_set():
            raise SendTimeoutError


class Framing:
    """How events look on the wire: JSON, some under a name."""

    def event(self, event: Event) -> Frame:
        """An event."""
        as_sent = event if isinstance(event, dict) else asdict(event)
        return Frame(as_json(as_sent), _name(event), is_passing=isinstance(event, Progress))

    def failure(self, error: TitansError) -> Frame:
        """What a stream that has failed ends with."""
        return Frame(as_json(error.body()), name="error", error=error)

    async def frames(self, events: AsyncGenerator[Any, None]) -> AsyncGenerator[Frame, None]:
        """Events to frames, ended by [DONE]; what goes wrong is one of them."""
        async with aclosing(events) as source:
            try:
                async for event in source:
                    yield self.event(event)
            except ClientDisconnect:
                log.info("the client left before its document was read")
                yield self._failed(InvalidRequest("the document broke off before its end"))
            except TitansError as error:
                yield self._failed(error)
            except Exception:
                log.exception("a stream failed")
                yield self._failed(TitansError("internal error"))
        yield DONE

    def farewell(self) -> list[Frame]:
        """What a stream that is stopped ends with."""
        return [self.failure(StreamStopped("the stream was stopped")), DONE]

    def _failed(self, error: TitansError) -> Frame:
        request.failed(error)
        return self.failure(error)


def as_json(value: Any) -> str:
    """JSON on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _name(event: Event) -> str | None:
    match event:
        case Progress():
            return "progress"
        case DocumentLearnt():
            return "done"
        case _:
            return None  # plain data, as OpenAI's clients expect
