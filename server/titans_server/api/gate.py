"""The second layer of the app: who asks, and whether they may. No request reaches a route without passing here."""

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from titans_server.api.handlers import answer
from titans_server.api.names import foreign_name
from titans_server.api.preconditions import field
from titans_server.errors import (
    BodyTooLarge,
    HeadersTooLarge,
    InvalidAPIKey,
    StoreUnavailable,
    TitansError,
    UnsupportedMediaType,
    UploadStalled,
)
from titans_server.lifecycle import Lifecycle
from titans_server.tenants.gatekeeper import Caller, Gatekeeper
from titans_server.tenants.limiter import Allowance, Limiter

_STREAMED = ("/documents", "/state")  # bodies that are never held whole; the routes have limits of their own
_OLD_WORK = "/v1/streams/"  # what is asked of these began before a drain, which waits for it
_KEYS_SECONDS = 3.0  # to wait for the keys' store where whoever asks was let in before; less than Prometheus waits
_MAX_WATCHERS = 16


@dataclass(frozen=True)
class RequestLimits:
    """Bounds that an operator sets."""

    max_header_bytes: int
    max_body_bytes: int
    upload_idle_seconds: float  # to wait for the next bytes of a body


class Gate:
    """Pure ASGI, like `Observed`. What it refuses is answered as by a route."""

    def __init__(
        self,
        app: ASGIApp,
        lifecycle: Lifecycle[Any],
        limits: RequestLimits,
        always: frozenset[str],
        everybody: frozenset[str],
    ) -> None:
        """`always`: paths that are answered at any rate, and while the server loads and drains.

        `everybody`: those that need no key, either.
        """
        self._app = app
        self._lifecycle = lifecycle
        self._limits = limits
        self._always = always
        self._everybody = everybody
        self._limiter = Limiter()
        self._watchers: dict[str | None, Caller] = {}  # who looked at the metrics, by the header that they showed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let in, or refuse."""
        if scope["type"] != "http" or scope["path"] in self._everybody:
            await self._app(scope, receive, send)
            return
        with ExitStack() as stack:
            try:
                is_bounded = scope["path"] not in self._always
                if is_bounded:
                    to_old_work = scope["path"].startswith(_OLD_WORK)
                    stack.enter_context(self._lifecycle.in_flight(to_old_work=to_old_work))
                caller = await self._caller(scope)
                send = _telling(self._limiter.allowance(caller), send)  # from here on, refusals too
                self._check_body(scope, int(Headers(scope=scope).get("Content-Length", 0)))
                works, ends = (scope["method"] == method for method in ("POST", "DELETE"))
                if is_bounded:
                    stack.enter_context(self._limiter.admit(caller, costs_tokens=works, only_ends=ends))
            except TitansError as error:
                await answer(error)(scope, receive, send)
                return
            await self._app(scope, self._bounded(scope, receive), send)

    async def _caller(self, scope: Scope) -> Caller:
        if sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > self._limits.max_header_bytes:
            raise HeadersTooLarge(f"the headers may have {self._limits.max_header_bytes} bytes")
        headers = Headers(scope=scope)
        if field(headers, "Content-Encoding", "identity").lower() != "identity":
            raise UnsupportedMediaType("a body is read as it is: send it without Content-Encoding")
        shown = headers.getlist("Authorization")
        if len(shown) > 1:
            raise InvalidAPIKey("one header Authorization, not several")
        caller = await self._admitted(scope, shown[0] if shown else None)
        scope["state"]["caller"] = caller
        return caller

    async def _admitted(self, scope: Scope, shown: str | None) -> Caller:
        """Whom the request is from. While the keys' store is away: as it was when they looked at the metrics last."""
        gatekeeper: Gatekeeper = scope["state"]["gatekeeper"]
        stranger = foreign_name(Headers(scope=scope))
        if scope["path"] not in self._always:
            return await gatekeeper.admit(shown, stranger)
        try:
            async with asyncio.timeout(_KEYS_SECONDS if shown in self._watchers else None):
                caller = await gatekeeper.admit(shown, stranger)
        except (StoreUnavailable, TimeoutError):
            if shown not in self._watchers:
                raise
            return self._watchers[shown]
        except InvalidAPIKey:
            self._watchers.pop(shown, None)
            raise
        if len(self._watchers) >= _MAX_WATCHERS:
            self._watchers.clear()
        self._watchers[shown] = caller
        return caller

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """`receive`, until it has given more than one body may have, or been waited for long enough."""
        num_bytes, is_read = 0, False

        async def bounded() -> Message:
            nonlocal num_bytes, is_read
            if is_read:
                return await receive()
            with self._lifecycle.reading():
                message = await self._soon(receive)
            is_read = not message.get("more_body", False)
            num_bytes += len(message.get("body", b""))
            self._check_body(scope, num_bytes)
            return message

        return bounded

    async def _soon(self, receive: Receive) -> Message:
        """The next bytes of a body; a client that is silent must not hold its session and its key for good."""
        try:
            async with asyncio.timeout(self._limits.upload_idle_seconds):
                return await receive()
        except TimeoutError:
            raise UploadStalled(f"nothing more of the body came in {self._limits.upload_idle_seconds:g} s") from None

    def _check_body(self, scope: Scope, num_bytes: int) -> None:
        if num_bytes > self._limits.max_body_bytes and not scope["path"].endswith(_STREAMED):
            raise BodyTooLarge(f"the body may have {self._limits.max_body_bytes} bytes: post long texts as documents")


def _telling(allowance: Allowance, send: Send) -> Send:
    """`send`, with what is left of the rates in the answer's headers."""

    async def telling(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(allowance.headers())
        await send(message)

    return telling
