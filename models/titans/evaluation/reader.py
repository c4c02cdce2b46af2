"""Who reads the documents and answers: a model in this process (`local`), or a server (`server`)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

Report = Callable[[int], None]  # is told how many tokens of a document have been read so far


class Reading(Protocol):
    """A document that has been read."""

    @property
    def num_tokens(self) -> int:
        """Of the document."""

    def answer(self, prompts: Sequence[str], *, memory: bool, max_tokens: int, stop: str) -> list[str]:
        """What follows each prompt, greedily, up to and without `stop`. `memory=False`: it answers nothing."""


class Reader(Protocol):
    """Reads one document after the other, each from nothing."""

    @property
    def model(self) -> str:
        """Which weights, in words."""

    @property
    def fingerprint(self) -> str:
        """Of the weights."""

    def count(self, text: str) -> int:
        """The tokens of a text. A server learns the text for it: give it little."""

    def read(self, document: str, report: Report) -> AbstractContextManager[Reading]:
        """The document, read; forgotten where the context is left."""
