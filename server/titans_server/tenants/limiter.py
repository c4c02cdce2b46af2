"""Rates: how often a tenant may ask, and for how many tokens. Each server counts for itself, in its own memory.

A request is let in while there is something left, and its tokens are taken out as they are computed, so that the
last one may leave a debt, for which its owner then waits.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Literal

from titans_server.errors import QuotaExceeded, RateLimited
from titans_server.observer import Answering, Asked, Observer, Work
from titans_server.tenants.gatekeeper import Caller
from titans_server.tenants.quotas import Bucket

_Kind = Literal["requests", "tokens"]
_current: ContextVar["Allowance | None"] = ContextVar("titans_allowance", default=None)
_place: ContextVar["Place | None"] = ContextVar("titans_place", default=None)


class Place:
    """A request's place among its owner's, for what goes on of it after it has ended."""

    def __init__(self, leave: Callable[[], None]) -> None:
        """The request is the first who holds it. `leave`: called once, when nobody does any more."""
        self._leave = leave
        self._num_holding = 1

    def hold(self) -> Callable[[], None]:
        """One more, who lets go by calling what is returned. Where nobody holds it any more it stays free."""
        if not self._num_holding:
            return lambda: None
        self._num_holding += 1
        return self.release

    def release(self) -> None:
        """One less."""
        self._num_holding -= 1
        if not self._num_holding:
            self._leave()


def hold_place() -> Callable[[], None]:
    """Let the request that runs count among those at once until what is returned is called (once), past its end."""
    place = _place.get()
    return (lambda: None) if place is None else place.hold()


class Limiter:
    """All owners' buckets. Lives on the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, _Kind, int], Bucket] = {}  # as many as there are keys
        self._at_once: Counter[str] = Counter()  # requests
        self._going_on: Counter[str] = Counter()  # the same, and those of which something goes on after their end

    @contextmanager
    def admit(self, caller: Caller, *, costs_tokens: bool, only_ends: bool = False) -> Iterator["Allowance"]:
        """Let a request in until it has ended; it is charged from here on. Raises RateLimited, QuotaExceeded.

        What goes on of requests that have ended keeps out new work alone: it can still be looked for. `only_ends`: it
        makes room, so that none is needed for it.
        """
        quotas, owner = caller.quotas, caller.owner
        under_way = (self._going_on if costs_tokens else self._at_once)[owner]
        if quotas.requests_at_once is not None and under_way >= quotas.requests_at_once and not only_ends:
            if not quotas.requests_at_once:  # kept from when keys could be made so
                raise QuotaExceeded("this key may have no request at all: it needs another quota")
            raise RateLimited(f"{quotas.requests_at_once} requests of this key are under way already", 1.0)
        allowance = self.allowance(caller)
        allowance.enter(costs_tokens=costs_tokens)
        _current.set(allowance)
        place = Place(partial(_one_less, self._going_on, owner))
        _place.set(place)
        for counts in (self._at_once, self._going_on):
            counts[owner] += 1
        try:
            yield allowance
        finally:
            _one_less(self._at_once, owner)
            place.release()

    def allowance(self, caller: Caller) -> "Allowance":
        """What a caller may take. Nothing is taken by looking."""
        quotas, owner = caller.quotas, caller.owner
        requests = self._bucket(owner, "requests", quotas.requests_per_minute)
        return Allowance(requests, self._bucket(owner, "tokens", quotas.tokens_per_minute), self._clock)

    def _bucket(self, owner: str, kind: _Kind, per_minute: int | None) -> Bucket | None:
        if per_minute is None:
            return None
        key = (owner, kind, per_minute)
        if key not in self._buckets:
            self._buckets[key] = Bucket(per_minute, self._clock())
        return self._buckets[key]


class Allowance:
    """What one request may take. The request's tasks share it."""

    def __init__(self, requests: Bucket | None, tokens: Bucket | None, clock: Callable[[], float]) -> None:
        self._buckets: dict[_Kind, Bucket | None] = {"requests": requests, "tokens": tokens}
        self._clock = clock

    def enter(self, *, costs_tokens: bool) -> None:
        """Take one request. Takes nothing where there is none left or no token, and raises RateLimited.

        Raises QuotaExceeded where there never is one: a kept key may have a rate of 0, which no key is made with now.
        """
        now = self._clock()
        for kind, bucket in self._buckets.items():
            if bucket is not None and (kind == "requests" or costs_tokens) and (wait := bucket.seconds_until(1, now)):
                message = f"this key may have {bucket.per_minute} {kind} a minute"
                if wait == math.inf:
                    raise QuotaExceeded(f"{message}: it needs another quota")
                raise RateLimited(f"{message}; try again in {math.ceil(wait)} s", wait)
        if (requests := self._buckets["requests"]) is not None:
            requests.take(1, now)

    def charge(self, num_tokens: int) -> None:
        """Take tokens that were computed."""
        if (tokens := self._buckets["tokens"]) is not None:
            tokens.take(num_tokens, self._clock())

    def headers(self) -> Mapping[str, str]:
        """What is left, in OpenAI's headers."""
        now, headers = self._clock(), {}
        for kind, bucket in self._buckets.items():
            if bucket is not None:
                headers[f"X-RateLimit-Limit-{kind.title()}"] = str(bucket.per_minute)
                headers[f"X-RateLimit-Remaining-{kind.title()}"] = str(bucket.remaining(now))
                headers[f"X-RateLimit-Reset-{kind.title()}"] = _duration(bucket.seconds_until_full(now))
        return headers


class Meter(Observer):
    """Charges whoever the running code works for with the tokens that it computes."""

    @contextmanager
    def working(self, work: Work, num_tokens: int = 0) -> Iterator[None]:
        """See Observer."""
        yield
        if work == "ingest" and (allowance := _current.get()) is not None:
            allowance.charge(num_tokens)

    @contextmanager
    def answering(self, asked: Asked) -> Iterator[Answering]:
        """See Observer."""
        allowance = _current.get()
        yield Answering() if allowance is None else _Charged(allowance)


class _Charged(Answering):
    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._num_read = 0  # and charged

    def read(self, num_tokens: int) -> None:
        """See Answering."""
        self._allowance.charge(num_tokens - self._num_read)
        self._num_read = num_tokens

    def drawn(self) -> None:
        """See Answering."""
        self._allowance.charge(1)


def _one_less(counts: Counter[str], owner: str) -> None:
    """Owners who have nothing under way are not kept."""
    counts[owner] -= 1
    if not counts[owner]:
        del counts[owner]


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 1m30.5s."""
    minutes, rest = divmod(round(seconds, 3), 60)
    return (f"{minutes:.0f}m" if minutes else "") + f"{round(rest, 3):g}s"
