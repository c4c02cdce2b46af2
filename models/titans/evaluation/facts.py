"""Facts to plant in a text and ask for: seven-digit numbers of made-up things.

The things of the training and of the test split share neither an adjective nor a noun.
"""

import itertools
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
        digits = "".join(c if c.isdigit() else " " for c in text).split()
        return bool(digits) and digits[0] == self.value


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
    pieces, size = [], len(text) / len(facts)
    for i, fact in enumerate(facts):
        part = text[int(i * size) : int((i + 1) * size)]
        cut = part.find(". ", len(part) // 2)
        cut = len(part) if cut < 0 else cut + 2
        pieces += [part[:cut].rstrip(), " ", fact.statement, " ", part[cut:]]
    return "".join(pieces)
