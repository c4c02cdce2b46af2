"""What the engine and the service tell of their work. Who measures it inherits from `Observer`; they import no meter.

The event loop and the compute thread both tell, so an observer is called from both, and never waits.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

Work = Literal["load", "ingest", "commit"]  # a state read from the store · a stride learnt · a state made durable
Computed = Literal[
    "prefill", "decode", "ingest"
]  # a portion of a prompt · a token of every answer · portions of documents


@dataclass(frozen=True)
class Asked:
    """An answer that begins."""

    num_prompt_tokens: int
    max_tokens: int
    temperature: float
    top_p: float


class Answering:
    """An answer under way."""

    def read(self, num_tokens: int) -> None:
        """So many tokens of its prompt have been read, in all; the last time when it ends, however it does."""

    def drawn(self) -> None:
        """A token of it is there."""

    def finished(self, reason: Literal["stop", "length"]) -> None:
        """It ended by itself. One that was stopped, or failed, never hears this."""


class Observer:
    """Is told of work as it is done. This one does nothing with it."""

    @contextmanager
    def working(self, work: Work, num_tokens: int = 0) -> Iterator[None]:
        """A piece of work, from its beginning to its end or to the exception that it ends with."""
        yield

    @contextmanager
    def answering(self, asked: Asked) -> Iterator[Answering]:
        """An answer, from its prompt to its end; tells nobody where it is closed, which may be another task."""
        yield Answering()

    def computed(self, kind: Computed, seconds: float) -> None:
        """The compute thread has done a part of a step."""

    def surprised(self, by: float) -> None:
        """A stride has moved its session's memories by so much a token; see `Runner.surprise`."""

    def put_off(self, code: str) -> None:
        """An accepted document cannot be learnt now, for an error of this code, and is tried again."""


class Observers(Observer):
    """Tells several."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    @contextmanager
    def working(self, work: Work, num_tokens: int = 0) -> Iterator[None]:
        """See Observer."""
        with ExitStack() as stack:
            for observer in self._observers:
                stack.enter_context(observer.working(work, num_tokens))
            yield

    @contextmanager
    def answering(self, asked: Asked) -> Iterator[Answering]:
        """See Observer."""
        with ExitStack() as stack:
            yield _All([stack.enter_context(observer.answering(asked)) for observer in self._observers])

    def computed(self, kind: Computed, seconds: float) -> None:
        """See Observer."""
        for observer in self._observers:
            observer.computed(kind, seconds)

    def surprised(self, by: float) -> None:
        """See Observer."""
        for observer in self._observers:
            observer.surprised(by)

    def put_off(self, code: str) -> None:
        """See Observer."""
        for observer in self._observers:
            observer.put_off(code)


class _All(Answering):
    def __init__(self, answers: Sequence[Answering]) -> None:
        self._answers = answers

    def read(self, num_tokens: int) -> None:
        for answer in self._answers:
            answer.read(num_tokens)

    def drawn(self) -> None:
        for answer in self._answers:
            answer.drawn()

    def finished(self, reason: Literal["stop", "length"]) -> None:
        for answer in self._answers:
            answer.finished(reason)
