"""Counts what survived which fault, at which moment, on which store."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from support.life import LostError

_HEAD = ("store", "fault", "moment", "times", "survived", "lost")


@dataclass
class _Counts:
    times: int = 0
    survived: int = 0
    lost: int = 0


@dataclass
class Attempt:
    """One attempt. It does not count where the fault turned out to have nothing to befall."""

    was_made: bool = True


class Table:
    """Rows in the order of their first attempts."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str, str], _Counts] = {}

    @contextmanager
    def attempt(self, store: str, fault: str, moment: str) -> Iterator[Attempt]:
        """Around one attempt: what does not raise has survived, and LostError is a loss."""
        counts, attempt = self._rows.setdefault((store, fault, moment), _Counts()), Attempt()
        counts.times += 1
        try:
            yield attempt
        except LostError:
            counts.lost += 1
            raise
        counts.times -= not attempt.was_made
        counts.survived += attempt.was_made

    def lines(self) -> list[str]:
        """The table as text; nothing where nothing was attempted."""
        rows = [(*names, *map(str, vars(counts).values())) for names, counts in self._rows.items()]
        widths = [max(len(row[i]) for row in [_HEAD, *rows]) for i in range(len(_HEAD))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [_HEAD, *rows]
        ]
        return lines if rows else []
