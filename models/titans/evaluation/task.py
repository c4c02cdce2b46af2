"""What a task is: documents in which something is stated, questions about it, and how an answer is judged."""

import random
from dataclasses import dataclass
from typing import NamedTuple, Protocol

SHARE = 4  # of a document at most one part in so many is what is asked for; the rest is haystack


class EvaluationError(Exception):
    """What a user can cause: a text too short, a length too small, a file of other settings. One line."""


@dataclass(frozen=True)
class Question:
    """What is put to the model, and what it should say."""

    prompt: str
    values: tuple[str, ...]  # what a right answer gives; none where the document says nothing of it
    depths: tuple[float, ...] = ()  # where the document states each: 0 its beginning, 1 its end


@dataclass(frozen=True)
class Exam:
    """One document and all that is asked about it."""

    document: str
    questions: tuple[Question, ...]
    absent: tuple[Question, ...] = ()  # about things that the document never names: the control


class Grade(NamedTuple):
    """How good an answer is."""

    right: bool
    share: float  # of what was to be given, 0 to 1


class Task(Protocol):
    """A kind of exam."""

    @property
    def name(self) -> str:
        """As the command line has it."""

    @property
    def max_tokens(self) -> int:
        """How long an answer may be."""

    def most_questions(self, num_tokens: int) -> int:
        """That a document of so many tokens has room for, one or more. Raises EvaluationError if it has for none."""

    def make(self, num_tokens: int, num_questions: int, place: float, rng: random.Random) -> Exam:
        """A document of about `num_tokens` tokens, and questions about it.

        place: of this document among those of its cell, in the order of the text, 0 to 1.
        """

    def grade(self, question: Question, answer: str) -> Grade:
        """The answer, generated after the question's prompt, judged."""

    def claims(self, answer: str) -> bool:
        """Whether an answer about what the document never names gives a value all the same."""

    def repeats(self, answer: str, exam: Exam) -> bool:
        """Whether such an answer gives a value that the document states of something else."""


def most_in(num_tokens: int, cost: float, name: str) -> int:
    """How many questions of `cost` tokens each a document takes. Raises EvaluationError if none."""
    most = int(num_tokens / SHARE / cost)
    if most < 1:
        raise EvaluationError(f"{num_tokens:,} tokens are too few for {name}: it needs {int(SHARE * cost) + 1:,}")
    return most
