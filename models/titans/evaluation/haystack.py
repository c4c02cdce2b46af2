"""Plain text of any length in tokens, from a text file, and needles put between its sentences."""

from collections.abc import Callable, Sequence
from functools import cached_property

from titans.evaluation.task import EvaluationError

Count = Callable[[str], int]  # the tokens of a text

_SAMPLES = 16
_SAMPLE_SIZE = 2_000  # characters
_FEWEST_SENTENCES = 20


class Haystack:
    """A text that documents are cut from.

    Tokens are estimated from a sample of the text: a server that is to count them has to learn them.
    """

    def __init__(self, text: str, count: Count, end: str = ". ") -> None:
        """`end`: what a sentence ends with; needles stand right after one. Raises EvaluationError."""
        if text.count(end) < _FEWEST_SENTENCES:
            raise EvaluationError(f"the text is too short: {len(text):,} characters, {text.count(end)} sentences")
        self.text, self.count, self.end = text, count, end

    @cached_property
    def characters_per_token(self) -> float:
        """From slices all over the text."""
        starts = [i * len(self.text) // _SAMPLES for i in range(_SAMPLES)]
        size = min(_SAMPLE_SIZE, len(self.text) // _SAMPLES)
        sample = "".join(self._whole(self.text[start : start + size]) for start in starts)
        return len(sample) / self.count(sample)

    @property
    def num_tokens(self) -> int:
        """Of the whole text, about."""
        return int(len(self.text) / self.characters_per_token)

    def cut(self, num_tokens: float, place: float) -> str:
        """About `num_tokens` tokens in whole sentences, from the `place` (0 to 1) in the text; a short one repeats."""
        size = int(num_tokens * self.characters_per_token)
        start = int(place * (len(self.text) - size if size < len(self.text) else len(self.text)))
        source = self.text * ((start + size) // len(self.text) + 2)
        start = source.find(self.end, start) + len(self.end) if start else 0
        before = source.rfind(self.end, start, start + size) + len(self.end)
        after = source.find(self.end, start + size) + len(self.end)
        nearer = before if start < before and start + size - before < after - start - size else after
        return source[start:nearer]

    def _whole(self, piece: str) -> str:
        """The sentences of a piece that are whole."""
        start, stop = (find(self.end) + len(self.end) for find in (piece.find, piece.rfind))
        return piece[start:stop] if start < stop else piece


def insert(text: str, statements: Sequence[str], offsets: Sequence[int], end: str = ". ") -> str:
    """The text with each statement after the first sentence that ends past its offset; offsets ascend.

    A statement that no sentence's end follows stands at the end of the text.
    """
    pieces, done = [], 0
    for statement, offset in zip(statements, offsets, strict=True):
        found = text.find(end, max(done, offset))
        cut = len(text) if found < 0 else found + len(end)
        pieces += [text[done:cut], end[-1] if found < 0 else "", statement, end[-1]]
        done = cut
    return "".join([*pieces, text[done:]])


def spread(text: str, count: int, place: float) -> list[int]:
    """`count` offsets at equal distances; over places from 0 to 1 they pass over the whole text."""
    return [int((i + place) / count * len(text)) for i in range(count)]
