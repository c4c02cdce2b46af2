"""The first layer of the app that looks at a request: each has an id, a line in the log and a place in the metrics."""

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from titans_server.api.handlers import answer
from titans_server.errors import TitansError
from titans_server.telemetry import request
from titans_server.telemetry.metrics import Metrics

if TYPE_CHECKING:  # needs an extra
    from titans_server.telemetry.traces import RequestSpan, Tracing

log = logging.getLogger(__name__)
access = logging.getLogger("titans_server.access")

REQUEST_ID = "X-Request-ID"
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_QUIET = ("/health/", "/metrics")  # asked every few seconds: not worth a line


class Observed:
    """Pure ASGI, so that streams and disconnects pass through untouched."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: "Tracing | None") -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve, and tell."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        info = request.begin(Headers(scope=scope).get(REQUEST_ID))
        started = time.perf_counter()
        status = 499  # nginx's number for a client that left before it was answered

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = info.id
            await send(message)

        with self._metrics.in_flight.track_inprogress(), self._traced(scope) as span:
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:  # nobody foresaw it; caught here, so that the answer has the id and is counted
                failure = answer(TitansError("internal error"))
                if status != 499:
                    raise  # the answer has begun: all that is left is to cut it off
                log.exception("a request failed")
                await failure(scope, receive, send_with_id)
            finally:
                self._tell(scope, status, time.perf_counter() - started, info, span)

    def _traced(self, scope: Scope) -> AbstractContextManager["RequestSpan | None"]:
        if self._tracing is None or scope["path"].startswith(_QUIET):
            return nullcontext()
        return self._tracing.request(scope["method"], scope["path"], Headers(scope=scope))

    def _tell(
        self, scope: Scope, status: int, seconds: float, info: request.RequestInfo, span: "RequestSpan | None"
    ) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.answered(method, route, status, seconds, info.error_code)
        if span is not None:
            span.ended(method, route, status, info)
        if not scope["path"].startswith(_QUIET):
            path = quote(scope["path"])  # what was written as %0A must not begin a line of the log
            fields = {"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 3)}
            access.info("answered", extra=fields | {"code": info.error_code})
