"""Who reads the documents and answers: a model in this process (`local`), or a server (`server`)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

Report = Callable[[int], None]  # is told how many tokens have been read so far


class Reading(Protocol):
    """Documents that have been read."""

    @property
    def num_tokens(self) -> Sequence[int]:
        """Of each document."""

    def answer(self, prompts: Sequence[Sequence[str]], *, memory: bool, max_tokens: int, stop: str) -> list[list[str]]:
        """What follows each prompt about each document, greedily, up to and without `stop`.

        `memory=False`: it answers nothing.
        """


class Reader(Protocol):
    """Reads documents, each from nothing."""

    @property
    def at_once(self) -> int:
        """How many it reads best together."""

    @property
    def model(self) -> str:
        """Which weights, in words."""

    @property
    def fingerprint(self) -> str:
        """Of the weights."""

    def count(self, text: str) -> int:
        """The tokens of a text. A server learns the text for it: give it little."""

    def read(self, documents: Sequence[str], report: Report) -> AbstractContextManager[Reading]:
        """The documents, read; forgotten where the context is left."""
