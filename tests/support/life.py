"""What a session goes through, whatever happens to its server meanwhile."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx

FIRST = "The keeper of the lighthouse kept a key under the third stone. " * 4
SECOND = "Years later nobody remembered the stone, nor the key. " * 5
THIRD = "Somebody did. "
ASK = {"prompt": "where is the key", "max_tokens": 12, "temperature": 0}
SECONDS = 180.0  # within which what is asked for again and again is answered, whatever else the machine has to do
NOT_NOW = {429, 503}


class LostError(AssertionError):
    """What was acknowledged is not there, or is there twice."""


@dataclass(frozen=True)
class Outcome:
    """All that can be seen of a session."""

    version: int
    tokens_seen: int
    answer: str


class Life:
    """A session's life, and that of a fork of it: each step is asked for until it is acknowledged, and then checked.

    recover: called where there was no answer, or none that helps; returns when the server can be asked again.
    between: called after each step, with the number of steps so far.
    """

    def __init__(
        self, http: httpx.Client, recover: Callable[[], None], between: Callable[[int], None] = lambda _: None
    ) -> None:
        self._http = http
        self._recover = recover
        self._between = between
        self.session = ""  # its id, once it is created
        self.num_steps = 0
        self.num_troubles = 0  # requests without an answer

    def run(self) -> list[Outcome]:
        """From its creation to a last look at it and its fork. Raises LostError."""
        self.session = self._surely("POST", "/v1/sessions")["id"]
        session = _Session(self.session)
        self._check(session)
        self._learn(session, FIRST)
        self._write(session, "completions", json=ASK | {"memory": "write"})
        self._learn(session, Slowly(SECOND))
        self._write(session, "restore", json={"version": 1})
        forked = self._surely("POST", session.path + "/fork", json={"version": 2})
        fork = _Session(forked["id"], forked["version"], forked["tokens_seen"])
        self._check(fork)
        self._learn(session, THIRD)
        self._learn(fork, THIRD)
        return [self._look(session), self._look(fork)]

    def _learn(self, session: "_Session", text: "str | Slowly") -> None:
        """Under a key, so that it may be asked for again without a thought."""
        headers = {"Idempotency-Key": uuid4().hex, "Content-Type": "text/plain"}
        answer = self._surely("POST", session.path + "/documents", content=text, headers=headers)
        self._advance(session, answer["version"])

    def _write(self, session: "_Session", what: str, **content: Any) -> None:
        """Without a key: not again where the session has moved on and nobody said so."""
        while True:
            answer = self._try("POST", f"{session.path}/{what}", **content)
            shown = self._surely("GET", session.path)
            if answer is not None or shown["version"] != session.version:
                self._advance(session, shown["version"] if answer is None else answer["version"])
                return

    def _advance(self, session: "_Session", version: int) -> None:
        shown = self._surely("GET", session.path)
        if not version == shown["version"] == session.version + 1:
            raise LostError(f"answered is version {version}, shown {shown['version']}, after {session.version}")
        session.version, session.tokens_seen = version, shown["tokens_seen"]
        self.num_steps += 1
        self._between(self.num_steps)

    def _check(self, session: "_Session") -> None:
        shown = self._surely("GET", session.path)
        if (shown["version"], shown["tokens_seen"]) != (session.version, session.tokens_seen):
            raise LostError(f"shown is {shown}; acknowledged was {session}")

    def _look(self, session: "_Session") -> Outcome:
        self._check(session)
        answer = self._surely("POST", session.path + "/completions", json=ASK)
        return Outcome(session.version, session.tokens_seen, answer["text"])

    def _surely(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while (answer := self._try(method, path, **content)) is None:
            assert time.monotonic() < deadline, f"no answer to {method} {path}"
        return answer

    def _try(self, method: str, path: str, **content: Any) -> dict[str, Any] | None:
        """What is answered; None where nothing is, or nothing that stays so. Raises LostError for any other error."""
        try:
            response = self._http.request(method, path, **content)
        except httpx.TransportError:
            response = None
        if response is None or response.status_code in NOT_NOW or _code(response) == "ingestion_in_flight":
            self.num_troubles += 1
            time.sleep(0.02)
            self._recover()
            return None
        if not response.is_success:
            raise LostError(f"{method} {path}: {response.status_code} {response.text}")
        answer: dict[str, Any] = response.json()
        return answer


class Slowly:
    """A body that is sent a few words at a time, so that its portions are appended one by one."""

    def __init__(self, text: str) -> None:
        self._text = text.encode()

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self._text), 80):
            yield self._text[start : start + 80]
            time.sleep(0.02)


@dataclass
class _Session:
    """What was acknowledged of it."""

    id: str
    version: int = 0
    tokens_seen: int = 0

    @property
    def path(self) -> str:
        return f"/v1/sessions/{self.id}"


def _code(response: httpx.Response) -> str:
    return "" if response.is_success else str(response.json()["error"]["code"])
