"""Server-sent events: one framing for every stream, errors by the same names as outside."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from titans_server.errors import TitansError
from titans_server.events import CompletionChunk, DocumentLearnt, Progress
from titans_server.telemetry import request

log = logging.getLogger(__name__)

Event = Progress | DocumentLearnt | CompletionChunk | dict[str, Any]  # a dict is JSON already
DONE = ServerSentEvent("[DONE]")
PING_SECONDS = 15


class EventStream(EventSourceResponse):
    """A stream of a service's events, ended by [DONE]."""

    def __init__(self, events: AsyncGenerator[Event, None], body_read: asyncio.Event | None = None) -> None:
        """`body_read`: set when the request's body, which `events` reads, has been read."""
        super().__init__(_framed(events), ping=PING_SECONDS)
        self._body_read = body_read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as ASGI wants it."""

        async def after_body() -> Message:
            """The watch for a client that leaves must not swallow the body."""
            if self._body_read is not None:
                await self._body_read.wait()
            return await receive()

        await super().__call__(scope, after_body, send)


async def _framed(events: AsyncGenerator[Event, None]) -> AsyncGenerator[ServerSentEvent, None]:
    async with aclosing(events) as source:
        try:
            async for event in source:
                yield ServerSentEvent(_json(event if isinstance(event, dict) else asdict(event)), event=_name(event))
        except TitansError as error:
            yield _error(error)
        except ClientDisconnect:
            log.info("the client left before its document was read")
            return
        except Exception:
            log.exception("a stream failed")
            yield _error(TitansError("internal error"))
    yield DONE


def _error(error: TitansError) -> ServerSentEvent:
    request.failed(error.code)
    return ServerSentEvent(_json(error.body()), event="error")


def _name(event: Event) -> str | None:
    match event:
        case Progress():
            return "progress"
        case DocumentLearnt():
            return "done"
        case _:
            return None  # plain data, as OpenAI's clients expect


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
