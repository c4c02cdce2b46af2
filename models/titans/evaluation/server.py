"""A reader behind HTTP: the running server, asked as any program asks it. The only file here that knows the client."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from titans_client import Client, Memory

from titans.evaluation.reader import Report

_AT_ONCE = 8  # questions: the server makes their answers together


@dataclass(frozen=True)
class ServerReading:
    """See `Reading`."""

    client: Client
    sessions: list[str]
    num_tokens: list[int]

    def answer(self, prompts: Sequence[Sequence[str]], *, memory: bool, max_tokens: int, stop: str) -> list[list[str]]:
        """See `Reading`."""

        def ask(session: str, prompt: str) -> str:
            way: Memory = "read" if memory else "off"
            answer = self.client.complete(session, prompt, temperature=0, max_tokens=max_tokens, stop=stop, memory=way)
            return answer.text

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            asked = zip(self.sessions, prompts, strict=True)
            answers = [[pool.submit(ask, session, prompt) for prompt in some] for session, some in asked]
            return [[answer.result() for answer in some] for some in answers]


class ServerReader:
    """A session for every document, deleted where its context is left. Raises the client's TitansErrors."""

    at_once = 1

    def __init__(self, url: str | None = None) -> None:
        """`url`: as for `Client`. Raises ValueError for one that is none, TitansError if the server is not ready."""
        self._client = Client(url)
        health = self._client.health()
        self.model, self.fingerprint = health.model, health.fingerprint

    def count(self, text: str) -> int:
        """See `Reader`."""
        with self._session() as session:
            return self._client.ingest(session, text).tokens

    @contextmanager
    def read(self, documents: Sequence[str], report: Report) -> Iterator[ServerReading]:
        """See `Reader`."""
        with ExitStack() as stack:
            sessions = [stack.enter_context(self._session()) for _ in documents]
            num_tokens = list[int]()
            for session, document in zip(sessions, documents, strict=True):
                with self._client.ingest_stream(session, document) as events:
                    for event in events:
                        report(sum(num_tokens) + event.tokens)
                num_tokens.append(event.tokens)
            yield ServerReading(self._client, sessions, num_tokens)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    @contextmanager
    def _session(self) -> Iterator[str]:
        session = self._client.sessions.create().id
        try:
            yield session
        finally:
            self._client.sessions.delete(session)
