"""Needles in a haystack: the S-NIAH tasks, multi-key and multi-value, of RULER (Hsieh et al. 2024, arXiv 2404.06654).

The needle, the questions and the answers' beginnings are worded as there; keys are an adjective and a noun, numbers
have seven digits, uuids are of version 4. docs/evaluation.md says where this departs from RULER.
"""

import random
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from titans.evaluation.facts import NUM_THINGS, NUMBER, first_number, make_keys
from titans.evaluation.haystack import Haystack, insert, spread
from titans.evaluation.task import Exam, Grade, Question, most_in

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NOISE_LINES = 40

_NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
_OPENING = {
    False: "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
    True: "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind}s afterwards.\n",
}
_QUESTION = {
    False: "\nWhat is the special magic {kind} for {key} mentioned in the provided text?"
    " The special magic {kind} for {key} mentioned in the provided text is",
    True: "\nWhat are all the special magic {kind}s for {key} mentioned in the provided text?"
    " The special magic {kind}s for {key} mentioned in the provided text are",
}
_UUID = re.compile(r"(?<![\w-])[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?!\w|-\w)", re.IGNORECASE)
_FORM = {"number": NUMBER, "uuid": _UUID}
_MADE: dict[str, Callable[[random.Random], str]] = {
    "number": lambda rng: str(rng.randrange(1_000_000, 10_000_000)),
    "uuid": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
}
_NUM_EXAMPLES = 8


@dataclass(frozen=True)
class NeedleTask:
    """A question brings its own needles: `num_keys` keys, of which one is asked for, with `num_values` values each."""

    name: str
    haystack: Haystack
    kind: str = "number"
    num_keys: int = 1
    num_values: int = 1

    @property
    def max_tokens(self) -> int:
        """Room for the values and a few words."""
        return 16 + self.num_values * (16 if self.kind == "number" else 48)

    @cached_property
    def cost(self) -> float:
        """Tokens of a question's needles, about."""
        rng = random.Random(0)
        needles = [self._needle(key, _MADE[self.kind](rng)) for key in make_keys(_NUM_EXAMPLES, rng)]
        return self.num_keys * self.num_values * self.haystack.count(" ".join(needles)) / _NUM_EXAMPLES

    def most_questions(self, num_tokens: int) -> int:
        """See `Task`."""
        return min(most_in(num_tokens, self.cost, self.name), NUM_THINGS // (self.num_keys + 1))

    def make(self, num_tokens: int, num_questions: int, place: float, rng: random.Random) -> Exam:
        """See `Task`. With one question this is RULER's task."""
        keys = make_keys(num_questions * (self.num_keys + 1), rng)
        planted, absent = keys[: num_questions * self.num_keys], keys[num_questions * self.num_keys :]
        values = self._values(len(planted) * self.num_values, rng)
        pairs = [(key, values.pop()) for key in planted for _ in range(self.num_values)]
        rng.shuffle(pairs)
        needles = [self._needle(key, value) for key, value in pairs]
        text = self.haystack.cut(num_tokens - num_questions * self.cost, place)
        document = _OPENING[num_questions * self.num_values > 1].format(kind=self.kind)
        document += insert(text, needles, spread(text, len(needles), place), self.haystack.end)
        at = {needle: document.index(needle) / len(document) for needle in needles}

        def ask(key: str) -> Question:
            given = [value for other, value in pairs if other == key]
            depths = tuple(at[self._needle(key, value)] for value in given)
            prompt = _QUESTION[self.num_values > 1].format(kind=self.kind, key=key)
            return Question(prompt, tuple(given), depths)

        return Exam(document, tuple(map(ask, planted[:: self.num_keys])), tuple(map(ask, absent)))

    def grade(self, question: Question, answer: str) -> Grade:
        """Of one value: right if it is the answer's first number (uuid). Of several: right if all are given."""
        if self.num_values == 1:
            first = first_number(answer) if self.kind == "number" else next(iter(self.values_in(answer)), None)
            right = first == question.values[0]
            return Grade(right, float(right))
        share = len({*self.values_in(answer)} & {*question.values}) / len(question.values)
        return Grade(share == 1, share)

    def claims(self, answer: str) -> bool:
        """See `Task`."""
        return bool(self.values_in(answer))

    def repeats(self, answer: str, exam: Exam) -> bool:
        """See `Task`."""
        return not {*self.values_in(answer)}.isdisjoint(self.values_in(exam.document))

    def values_in(self, text: str) -> list[str]:
        """All in a text that has the form of a value, in order."""
        return [value.lower() for value in _FORM[self.kind].findall(text)]

    def _needle(self, key: str, value: str) -> str:
        return _NEEDLE.format(kind=self.kind, key=key, value=value)

    def _values(self, count: int, rng: random.Random) -> list[str]:
        values: dict[str, None] = {}  # a set that keeps its order
        while len(values) < count:
            values[_MADE[self.kind](rng)] = None
        return list(values)


def needle_tasks(book: Haystack, noise: Haystack) -> list[NeedleTask]:
    """RULER's names and numbers."""
    return [
        NeedleTask("single_1", noise),
        NeedleTask("single_2", book),
        NeedleTask("single_3", book, kind="uuid"),
        NeedleTask("multikey_1", book, num_keys=4),
        NeedleTask("multivalue", book, num_values=4),
    ]
