"""Whom a request is from."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from titans_server.errors import InvalidAPIKey
from titans_server.tenants import keys
from titans_server.tenants.keys import Key
from titans_server.tenants.quotas import Quotas
from titans_server.tenants.store import KeyStore

T = TypeVar("T")

_FRESH_SECONDS = 1.0  # for which an answer of the store is believed: a revoked key works no longer than that
_MAX_LOOKUPS = 10_000


@dataclass(frozen=True)
class Caller:
    """Whom a request is from, and what they may have."""

    owner: str  # of the sessions; "": the operator, who has TITANS_API_KEY, or whoever comes where no key is needed
    quotas: Quotas


class Gatekeeper:
    """Turns what a request shows into a caller. Lives on the event loop."""

    def __init__(
        self, store: KeyStore, *, static_key: str | None, needs_key: bool | None, quotas: Quotas | None = None
    ) -> None:
        """`static_key`: one that is in no store. `needs_key`: whether one has to be shown; None: once there is one."""
        self._store = store
        self._static_key = static_key
        self._needs_key = needs_key
        self._operator = Caller("", Quotas())
        self._anyone = Caller("", quotas or Quotas())
        self._quotas = quotas or Quotas()
        self._records = Lookups[Key | None](store.get)
        self._emptiness = Lookups[bool](lambda _: store.is_empty())

    async def has_keys(self) -> bool:
        """Whether there is a key to show."""
        return self._static_key is not None or not await self._emptiness("")

    async def admit(self, authorization: str | None, stranger: str | None = None) -> Caller:
        """The caller behind an Authorization header. `stranger`: a name that the server was asked by, if it may not be
        its own; where no key is needed for being on this machine alone, one is for that.

        Raises InvalidAPIKey, StoreUnavailable.
        """
        scheme, _, token = (authorization or "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            return await self._without_key(stranger)
        if self._static_key is not None and keys.same(token, self._static_key):
            return self._operator
        parts = keys.split(token)
        if parts is None:
            return await self._with_no_key_of_ours(stranger)
        key = await self._records(parts[0])
        if not keys.is_open(key, parts[1]):
            raise InvalidAPIKey("this API key is not known, or was revoked")
        assert key is not None
        return Caller(key.owner, key.quotas.over(self._quotas))

    async def _without_key(self, stranger: str | None) -> Caller:
        if self._needs_key or (self._needs_key is None and await self.has_keys()):
            raise InvalidAPIKey("an API key is needed: send the header Authorization: Bearer <key>")
        return self._whoever_is_here(stranger)

    async def _with_no_key_of_ours(self, stranger: str | None) -> Caller:
        """Clients that insist on a key send anything where none is needed; a wrong one must not pass for none."""
        if self._needs_key or await self.has_keys():
            raise InvalidAPIKey("this is no API key of this server")
        return self._whoever_is_here(stranger)

    def _whoever_is_here(self, stranger: str | None) -> Caller:
        """Without a key: a page of the web that is open on this machine is not."""
        if stranger is not None and self._needs_key is None:
            raise InvalidAPIKey(
                f"without an API key only this machine is answered, and this request is from or to {stranger}: make a "
                "key, or set TITANS_ALLOW_ANONYMOUS=true where something in front of the server asks who people are"
            )
        return self._anyone


class Lookups(Generic[T]):
    """Answers that are asked for once a second, however many want them."""

    def __init__(self, ask: Callable[[str], Coroutine[Any, Any, T]]) -> None:
        self._ask = ask
        self._asked: dict[str, tuple[float, asyncio.Task[T]]] = {}

    async def __call__(self, name: str) -> T:
        """The answer, at most _FRESH_SECONDS old. An error is told to all who wait for it, and to nobody later."""
        now = time.monotonic()
        at, task = self._asked.get(name, (0.0, None))
        if task is None or now - at > _FRESH_SECONDS or (task.done() and task.exception() is not None):
            if len(self._asked) >= _MAX_LOOKUPS:
                self._asked.clear()
            task = asyncio.create_task(self._ask(name))
            task.add_done_callback(_retrieve)
            self._asked[name] = (now, task)
        return await asyncio.shield(task)


def _retrieve(task: asyncio.Task[Any]) -> None:
    """So that asyncio does not complain where all who waited for an error have left."""
    if not task.cancelled():
        task.exception()
