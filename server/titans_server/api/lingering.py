"""A refusal that its client can read, though it is still sending what was refused."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = 30.0  # in all, as long as a connection that is kept discards a body
_SILENCE_SECONDS = 5.0


class Lingering:
    """Takes in what is left of a body after its answer, and throws it away, before the connection closes.

    A connection that closes while there is more to read resets, and its client may lose the answer with it (RFC 9112,
    section 9.6). One that is kept discards by itself; nginx, unless told otherwise, asks for one that is closed.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or not _closes(scope):
            await self._app(scope, receive, send)
            return
        is_read = is_answered = False

        async def watched() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = is_read or not message.get("more_body", False)
            return message

        async def send_all_but_the_end(message: Message) -> None:
            nonlocal is_answered
            is_answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send({**message, "more_body": True} if is_answered else message)

        await self._app(scope, watched, send_all_but_the_end)
        if not is_answered:
            return
        try:
            async with asyncio.timeout(_SECONDS):
                while not is_read:
                    await asyncio.wait_for(watched(), _SILENCE_SECONDS)
        except TimeoutError:
            pass  # RFC 9112 leaves it to the server how long that is
        await send({"type": "http.response.body"})


def _closes(scope: Scope) -> bool:
    """Whether the connection ends with its first answer."""
    asked = b",".join(value for name, value in scope["headers"] if name == b"connection").lower()
    return scope["http_version"] == "1.0" or b"close" in asked
