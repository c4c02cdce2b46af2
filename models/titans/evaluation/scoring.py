"""From graded answers to the numbers of a cell: counts, intervals, controls."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

CONDITIONS = ("memory", "off", "full")  # the memory on; off, in the same session; full attention instead


@dataclass(frozen=True)
class Tally:
    """Answers under one condition."""

    asked: int
    right: int
    share: float  # mean share of what was to be given

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, of the share of right answers."""
        return wilson(self.right, self.asked)


@dataclass(frozen=True)
class Cell:
    """A task at a length."""

    task: str
    tokens: int
    num_documents: int
    read: float  # tokens of a document, mean
    tallies: dict[str, Tally]  # by condition
    absent: tuple[int, int, int]  # questions about what is not there; answered with a value; with a planted one

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        row: dict[str, Any] = {"task": self.task, "tokens": self.tokens, "documents": self.num_documents}
        row["tokens_read"] = self.read
        for name, tally in self.tallies.items():
            low, high = tally.interval
            row[name] = {"asked": tally.asked, "right": tally.right, "share": tally.share, "low": low, "high": high}
        return row | {"absent": dict(zip(("asked", "value", "planted"), self.absent, strict=True))}


def cells(documents: Iterable[dict[str, Any]]) -> list[Cell]:
    """The cells that graded documents (`suite.examine`) make up, in the order in which they come first."""
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for document in documents:
        grouped.setdefault((document["task"], document["tokens"]), []).append(document)
    return [_cell(*key, group) for key, group in grouped.items()]


def _cell(task: str, tokens: int, documents: Sequence[dict[str, Any]]) -> Cell:
    questions = [question for document in documents for question in document["questions"]]
    absent = [question for document in documents for question in document["absent"]]
    tallies = {}
    for name in CONDITIONS:
        answers = [question[name] for question in questions if name in question]
        if answers:
            share = sum(answer["share"] for answer in answers) / len(answers)
            tallies[name] = Tally(len(answers), sum(answer["right"] for answer in answers), share)
    return Cell(
        task,
        tokens,
        len(documents),
        sum(document["read"] for document in documents) / len(documents),
        tallies,
        (len(absent), sum(a["value"] for a in absent), sum(a["planted"] for a in absent)),
    )


def wilson(right: int, asked: int) -> tuple[float, float]:
    """Wilson's 95 % score interval (1927) of a share."""
    z, share = 1.959964, right / asked
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    reach = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked)) / (1 + z * z / asked)
    return max(0.0, middle - reach), min(1.0, middle + reach)
