"""Facts to plant in a text and ask for: seven-digit numbers of made-up things. The project's own suite.

The things of the training and of the test split share neither an adjective nor a noun.
"""

import itertools
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from titans.evaluation.haystack import Haystack, insert, spread
from titans.evaluation.task import Exam, Grade, Question, most_in

NUMBER = re.compile(r"(?<!\d)\d{7}(?!\d)")  # the form of every value here

Split = Literal["train", "test"]

_ADJECTIVES: dict[Split, list[str]] = {
    "train": """amber ancient arctic azure blue bold brass brave bright broken bronze calm carved clever copper coral
    cosmic crimson crystal curious dark distant dusty eager early eastern elegant emerald empty faded fallen famous
    floating forgotten frozen gentle giant gilded glass golden gray green hidden hollow humble icy iron ivory jade
    jolly lively lonely lost lucky lunar marble mellow merry misty modern narrow noble northern old orange painted pale
    patient pink plain polished proud purple quiet rapid rare red restless royal rugged rustic sacred secret shining
    silent silver simple sleepy smooth solar southern spare steady stone strange sunny swift tall thirsty tiny twisted
    velvet vivid wandering warm western white wild windy winter wise wooden yellow young""".split(),
    "test": """scarlet cobalt weathered tranquil ornate crooked slender violet sturdy radiant mossy brittle gloomy
    speckled sapphire drowsy foggy graceful hasty luminous""".split(),
}
_NOUNS: dict[Split, list[str]] = {
    "train": """anchor archive arrow balcony barge barrel basket beacon bell bicycle bottle bridge cabin cable camera
    candle canoe canyon carriage cart castle cavern chapel chest chimney clock coach compass cottage cradle crane
    crown cupboard dagger desk door dragon drum engine falcon farm fence ferry flag forge fountain fox galley garden
    gate glacier glider guitar hammer harbor hat helmet hotel island jacket jar kettle key kite ladder lake lamp
    lantern ledger library lion lock locomotive mill mine mirror monument mountain museum needle oven owl painting
    palace parcel pearl piano pigeon pillar pipe planet plow pond printer quarry raft razor reservoir ring river
    robot rocket rope sailor saddle school ship shovel sled statue station stove sword table telescope temple tent
    theater ticket tiger tower tractor train trumpet trunk tunnel turtle umbrella valley vase vault violin wagon
    wallet warehouse watch well whistle wolf workshop""".split(),
    "test": """lighthouse orchard windmill locket schooner greenhouse sundial accordion granary tapestry trellis obelisk
    gondola furnace pavilion sextant turret anvil caravan chalice""".split(),
}
NUM_THINGS = len(_ADJECTIVES["test"]) * len(_NOUNS["test"])  # that the test split has words for
_NUMBERS = """access code, account number, badge number, catalogue number, code, docket number, entry code, file number,
locker number, magic number, number, permit number, pin code, record number, registry number, secret number,
serial number, ticket number, vault number"""
_NOT_RARE = 3  # times in the texts
_FAMILY = 4
ATTRIBUTES = " ".join(_NUMBERS.split()).split(", ")

_STATEMENTS = (
    "The {attribute} of the {thing} is {value}.",
    "The {attribute} for the {thing} is {value}.",
    "Remember that the {attribute} of the {thing} is {value}.",
    "As everybody there knew, the {attribute} of the {thing} was {value}.",
    "It was written there that the {attribute} of the {thing} is {value}.",
    "One of the special {attribute}s for the {thing} is: {value}.",
)


@dataclass(frozen=True)
class Fact:
    """One thing's number, as the text states it and as a reader asks for it."""

    statement: str
    question: str
    lead: str  # how the answer begins: a full sentence, up to the number
    value: str

    @property
    def prompt(self) -> str:
        """What is put to the model; the answer follows."""
        return prompt(self.question)

    def is_answered_by(self, text: str) -> bool:
        """Exact match: the first number in the generated text is the fact's."""
        return first_number(text) == self.value


def first_number(text: str) -> str | None:
    """Digits that stand together, the first in a text."""
    found = re.search(r"\d+", text)
    return found[0] if found else None


def prompt(question: str) -> str:
    """The form in which questions are asked of the shipped memory."""
    return f"\n\nQuestion: {question}\nAnswer:"


def words_of(texts: list[str]) -> list[str]:
    """The words of some texts that are neither rare nor of the lists here."""
    counts = Counter(re.findall(r"\b[a-z]{4,10}\b", " ".join(texts)))
    listed = {word for lists in (_ADJECTIVES, _NOUNS) for words in lists.values() for word in words}
    return sorted(word for word, count in counts.items() if count >= _NOT_RARE and word not in listed)


def make_facts(count: int, rng: random.Random) -> list[Fact]:
    """`count` facts of the test split, about things that are all different."""
    things = rng.sample(sorted({(a, n) for a in _ADJECTIVES["test"] for n in _NOUNS["test"]}), count)
    rng.shuffle(things)
    return [_fact(thing, rng.choice(ATTRIBUTES), rng) for thing in things]


def make_keys(count: int, rng: random.Random) -> list[str]:
    """`count` keys of the test split, an adjective and a noun each, all different.

    No word comes twice before every word has come once.
    """
    adjectives, nouns = (rng.sample(lists["test"], len(lists["test"])) for lists in (_ADJECTIVES, _NOUNS))
    assert count <= NUM_THINGS
    turns = ((i, (i + i // len(adjectives)) % len(nouns)) for i in range(count))
    return [f"{adjectives[i % len(adjectives)]}-{nouns[j]}" for i, j in turns]


def make_families(count: int, rng: random.Random, words: Sequence[str], *, listed: bool = True) -> list[Fact]:
    """`count` facts for training, about things that are all different, in families of four that are easily confused.

    In a family all things share a word, and half of them what is told of them. Half the families are of the
    training split's lists, where `listed`; all others are of two of `words`.
    """
    lists = _ADJECTIVES["train"], _NOUNS["train"]
    seen: set[tuple[str, str]] = set()
    facts: list[Fact] = []
    while len(facts) < count:
        first, second = lists if listed and rng.random() < 0.5 else (words, words)
        if rng.random() < 0.5:
            things = list(itertools.product([rng.choice(first)], rng.sample(second, _FAMILY)))
        else:
            things = list(itertools.product(rng.sample(first, _FAMILY), [rng.choice(second)]))
        common = rng.choice(ATTRIBUTES)
        for thing in things:
            if thing not in seen:
                attribute = common if rng.random() < 0.5 else rng.choice(ATTRIBUTES)
                facts.append(_fact(thing, attribute, rng))
        seen.update(things)
    return facts[:count]


def _fact(words: tuple[str, str], attribute: str, rng: random.Random) -> Fact:
    thing, value = " ".join(words), str(rng.randrange(1_000_000, 10_000_000))
    statement = rng.choice(_STATEMENTS).format(attribute=attribute, thing=thing, value=value)
    question = f"What is the {attribute} of the {thing}?"
    return Fact(statement, question, f"The {attribute} of the {thing} is", value)


def plant(text: str, facts: list[Fact]) -> str:
    """The text with one fact after a sentence near the middle of each of `len(facts)` equal parts."""
    size = len(text) / len(facts)
    bounds = [int(i * size) for i in range(len(facts) + 1)]
    middles = [start + (stop - start) // 2 for start, stop in itertools.pairwise(bounds)]
    return insert(text, [fact.statement for fact in facts], middles)


@dataclass(frozen=True)
class FactsTask:
    """Facts of the test split, asked for in the form that the shipped memory was trained on."""

    haystack: Haystack
    name: str = "facts"
    max_tokens: int = 32

    @cached_property
    def cost(self) -> float:
        """Tokens of a statement, about."""
        facts = make_facts(len(_STATEMENTS), random.Random(0))
        return self.haystack.count(" ".join(fact.statement for fact in facts)) / len(facts)

    def most_questions(self, num_tokens: int) -> int:
        """See `Task`."""
        return min(most_in(num_tokens, self.cost, self.name), NUM_THINGS // 2)

    def make(self, num_tokens: int, num_questions: int, place: float, rng: random.Random) -> Exam:
        """See `Task`."""
        facts = make_facts(2 * num_questions, rng)
        planted, absent = facts[:num_questions], facts[num_questions:]
        text = self.haystack.cut(num_tokens - num_questions * self.cost, place)
        statements = [fact.statement for fact in planted]
        document = insert(text, statements, spread(text, num_questions, place), self.haystack.end)
        depths = [document.index(statement) / len(document) for statement in statements]
        questions = (Question(f.prompt, (f.value,), (depth,)) for f, depth in zip(planted, depths, strict=True))
        return Exam(document, tuple(questions), tuple(Question(fact.prompt, ()) for fact in absent))

    def grade(self, question: Question, answer: str) -> Grade:
        """Right if the first number in the answer is the fact's."""
        right = first_number(answer) == question.values[0]
        return Grade(right, float(right))

    def values_in(self, text: str) -> list[str]:
        """See `Task`."""
        return NUMBER.findall(text)
