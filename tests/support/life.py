"""What a session goes through, whatever happens to its server meanwhile."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

FIRST = "The keeper of the lighthouse kept a key under the third stone. " * 4
SECOND = "Years later nobody remembered the stone, nor the key. " * 5
ASK = {"prompt": "where is the key", "max_tokens": 12, "temperature": 0}


class LostError(AssertionError):
    """What was acknowledged is not there, or is there twice."""


@dataclass(frozen=True)
class Outcome:
    """All that can be seen of a session."""

    version: int
    tokens_seen: int
    answer: str


class Life:
    """One session's life: each step is asked for until it is acknowledged, and checked against what was before."""

    def __init__(self, http: httpx.Client, recover: Callable[[], None]) -> None:
        self._http = http
        self._recover = recover
        self._path = ""
        self._version = 0
        self._tokens_seen = 0
        self.num_troubles = 0  # requests without an answer

    def run(self) -> Outcome:
        """From its creation to a last look at it. Raises LostError."""
        self._path = "/v1/sessions/" + self._surely("POST", "/v1/sessions")["id"]
        self._check()
        self._learn(FIRST)
        self._answer_and_learn()
        self._learn(SECOND)
        answer = self._surely("POST", self._path + "/completions", json=ASK)
        self._check()
        return Outcome(self._version, self._tokens_seen, answer["text"])

    def _learn(self, text: str) -> None:
        self._write("documents", json={"text": text})

    def _answer_and_learn(self) -> None:
        self._write("completions", json=ASK | {"memory": "write"})

    def _write(self, what: str, **content: Any) -> None:
        """Ask until the session has moved on by one version; not again where it has and nobody said so."""
        expected = self._version + 1
        while self._version < expected:
            answer = self._try("POST", f"{self._path}/{what}", **content)
            shown = self._surely("GET", self._path)
            if answer is None and shown["version"] == self._version:
                continue  # it was not done
            if shown["version"] != expected or (answer and answer["version"] != expected):
                raise LostError(f"at {shown['version']} after {self._version}, answered {answer}")
            self._version, self._tokens_seen = expected, shown["tokens_seen"]

    def _check(self) -> None:
        shown = self._surely("GET", self._path)
        if (shown["version"], shown["tokens_seen"]) != (self._version, self._tokens_seen):
            raise LostError(f"shown is {shown}; acknowledged are {self._version} and {self._tokens_seen} tokens")

    def _surely(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        for _ in range(10):
            if (answer := self._try(method, path, **content)) is not None:
                return answer
        raise AssertionError(f"no answer to {method} {path}")

    def _try(self, method: str, path: str, **content: Any) -> dict[str, Any] | None:
        """What is answered; None where nothing is, or that it cannot be done now: what was killed is back then."""
        try:
            response = self._http.request(method, path, **content)
        except httpx.TransportError:
            response = None
        if response is None or response.status_code == 503:
            self.num_troubles += 1
            self._recover()
            return None
        if not response.is_success:
            raise LostError(f"{method} {path}: {response.status_code} {response.text}")
        answer: dict[str, Any] = response.json()
        return answer
