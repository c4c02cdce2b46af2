"""What is stated anew, later or at once: all facts are in the document twice, and the newer value is asked for."""

import random
from dataclasses import dataclass, replace

from titans.evaluation.facts import JudgedAsFacts, make_facts
from titans.evaluation.haystack import insert, spread
from titans.evaluation.task import Exam, Question, most_in

SOON = 10, 150  # tokens, and to the end of the sentence


@dataclass(frozen=True)
class UpdatedTask(JudgedAsFacts):
    """Plain facts: all of them in the first half of a document, and in its second half again, in another order.

    Or, where it is `soon`, each again before the next one, within what attention sees.
    """

    soon: bool = False

    @property
    def name(self) -> str:
        """See `Task`."""
        return "corrected" if self.soon else "updated"

    def most_questions(self, num_tokens: int) -> int:
        """See `Task`."""
        return min(most_in(num_tokens, 2 * self.facts.cost, self.name), self.facts.most_questions(num_tokens))

    def make(self, num_tokens: int, num_questions: int, place: float, rng: random.Random) -> Exam:
        """See `Task`."""
        made = make_facts(2 * num_questions, rng)
        old, absent = made[:num_questions], made[num_questions:]
        values = rng.sample(range(1_000_000, 10_000_000), num_questions)
        new = [replace(fact, value=str(value)) for fact, value in zip(old, values, strict=True)]
        text = self.facts.haystack.cut(num_tokens - 2 * num_questions * self.facts.cost, place)
        if self.soon:
            stated = [fact for both in zip(old, new, strict=True) for fact in both]
            offsets = self._pairs(text, num_questions, place, rng)
        else:
            stated = [*old, *rng.sample(new, len(new))]
            offsets = spread(text, len(stated), place)
        document = insert(text, [fact.statement for fact in stated], offsets, self.facts.haystack.end)
        depths = [document.index(fact.statement) / len(document) for fact in new]
        questions = (Question(f.prompt, (f.value,), (depth,)) for f, depth in zip(new, depths, strict=True))
        return Exam(document, tuple(questions), tuple(Question(fact.prompt, ()) for fact in absent))

    def _pairs(self, text: str, count: int, place: float, rng: random.Random) -> list[int]:
        """Where each fact is stated, and where again: SOON tokens later, or halfway to the next one."""
        halfway = len(text) // (2 * count)
        later = [int(rng.randint(*SOON) * self.facts.haystack.characters_per_token) for _ in range(count)]
        first = spread(text, count, place)
        return [offset for i in range(count) for offset in (first[i], first[i] + min(later[i], halfway))]
