"""A response that is too large to be handed to its connection at once."""

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_PIECE = 256 << 10  # bytes


class LargeResponse(Response):
    """Bytes that are sent piece by piece: of a client that takes its time, one piece waits in memory a second time.

    Who takes nothing is cut off by the connection (`serving.py`), which ends the response.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as ASGI wants it."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = memoryview(self.body)
        for end in range(_PIECE, len(body) + _PIECE, _PIECE):
            await send({"type": "http.response.body", "body": body[end - _PIECE : end], "more_body": end < len(body)})
