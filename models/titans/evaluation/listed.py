"""Facts that stand together in one layout, a line each: lists, tables, records; and logs, in which they change."""

import random
from dataclasses import dataclass
from functools import cached_property

from titans.evaluation.facts import JudgedAsFacts, make_facts, prompt
from titans.evaluation.haystack import insert, spread
from titans.evaluation.listing import LAYOUTS, Layout, write_list
from titans.evaluation.task import Exam, Question, most_in
from titans.evaluation.values import KINDS
from titans.evaluation.wording import ASKINGS

_SAMPLE = 4  # things of a list


@dataclass(frozen=True)
class ListedTask(JudgedAsFacts):
    """One list in a book, in a layout of the test split: what a number is told of is asked for in plain words.

    `changes`: how often each thing's number is told; the last one holds.
    """

    changes: int = 1

    @property
    def name(self) -> str:
        """See `Task`."""
        return "logged" if self.changes > 1 else "listed"

    @cached_property
    def cost(self) -> float:
        """Tokens of a question's lines, about."""
        rng = random.Random(0)
        lists = [self._write(layout, _SAMPLE, rng)[0] for layout in LAYOUTS["test"]]
        return self.facts.haystack.count("".join(lists)) / len(lists) / _SAMPLE

    def most_questions(self, num_tokens: int) -> int:
        """See `Task`."""
        return min(most_in(num_tokens, self.cost, self.name), self.facts.most_questions(num_tokens))

    def make(self, num_tokens: int, num_questions: int, place: float, rng: random.Random) -> Exam:
        """See `Task`. Documents of a cell take the layouts in turn; the list is anywhere."""
        text = self.facts.haystack.cut(num_tokens - num_questions * self.cost, place)
        written, told, absent = self._write(LAYOUTS["test"][int(place * len(LAYOUTS["test"]))], num_questions, rng)
        document = insert(text, [written], spread(text, 1, rng.random()), self.facts.haystack.end)
        questions = (
            Question(asked, (value,), (document.index(value) / len(document),)) for asked, value in told.items()
        )
        return Exam(document, tuple(questions), tuple(Question(asked, ()) for asked in absent))

    def _write(self, layout: Layout, count: int, rng: random.Random) -> tuple[str, dict[str, str], list[str]]:
        """A list of `count` things; what is asked, and the number that is right; and what is asked of others."""
        attribute = rng.choice(KINDS["number"].attributes)
        things = [fact.thing for fact in make_facts(2 * count, rng)]
        told = things[:count] * self.changes
        rng.shuffle(told)
        numbers = map(str, rng.sample(range(1_000_000, 10_000_000), len(told)))
        lines = write_list(layout, attribute, list(zip(told, numbers, strict=True)), rng)
        asked = {thing: prompt(ASKINGS["train"][0].question.format(a=attribute, t=thing)) for thing in things}
        written = "".join(f"{line.before}{line.gap}{line.value}{line.after}" for line in lines)
        right = {asked[line.thing]: line.value for line in lines if line.holds}
        return written, right, [asked[thing] for thing in things[count:]]
