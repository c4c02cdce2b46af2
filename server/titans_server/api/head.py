"""HEAD, wherever there is GET (RFC 9110, section 9.3.2): uptime probes and caches ask so."""

from starlette.types import ASGIApp, Receive, Scope, Send

_STREAMS = "/v1/streams/"  # not of these: to GET one takes it from its reader, and lasts until its end


class HeadAsGet:
    """Pure ASGI, the innermost layer: what comes after it knows only GET. The body is left out by the HTTP server."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as ASGI wants it."""
        if scope["type"] != "http" or scope["method"] != "HEAD" or scope["path"].startswith(_STREAMS):
            await self._app(scope, receive, send)
            return
        as_get = {**scope, "method": "GET"}
        try:
            await self._app(as_get, receive, send)
        finally:
            scope["route"] = as_get.get("route")  # the outer layers tell of it


def with_head(methods: list[str], path: str) -> list[str]:
    """The methods of a route's path, HEAD among them where it is answered."""
    return [*methods, "HEAD"] if "GET" in methods and not path.startswith(_STREAMS) else methods
