"""Kinds of values that a text may state, and what is told by them. The words in them are split as `wording` splits."""

import random
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from titans.evaluation.wording import FIRST_NAMES, LAST_NAMES, LISTED_WORDS, MONTHS, PLACES, STREETS, UNITS, Split

NUMBERS = """access code, account number, badge number, catalogue number, code, docket number, entry code, file number,
locker number, magic number, number, permit number, pin code, record number, registry number, secret number,
serial number, ticket number, vault number"""
_LISTED = 0.5  # of training's names those that a list has
_COINED = 0.5  # of training's other words those that are no words
_MONOTONOUS = 0.125  # of training's numbers and codes those with the same digits again and again


@dataclass(frozen=True)
class Source:
    """What values are drawn from: a split's lists, and words."""

    split: Split
    words: Sequence[str]


@dataclass(frozen=True)
class Kind:
    """A kind of value."""

    attributes: tuple[str, ...]  # what is told by it
    make: Callable[[Source, random.Random], str]
    taught: int  # its share of training's facts, in parts: more of what is harder
    tested: int  # and of the test's


def _number(source: Source, rng: random.Random) -> str:
    size = rng.choice((7, 7, 7, 7, 4, 5, 6, 8, 9))
    if (digits := _monotonous(source, size, rng)) is not None:
        return digits
    return str(rng.randrange(10 ** (size - 1), 10**size))


def _uuid(_: Source, rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _code(source: Source, rng: random.Random) -> str:
    letters = "".join(rng.choices(string.ascii_uppercase, k=rng.choice((1, 2, 3))))
    size = rng.choice((2, 3, 4, 5))
    digits = _monotonous(source, size, rng) or "".join(rng.choices(string.digits, k=size))
    return rng.choice((f"{letters}-{digits}", f"{letters}{digits}", f"{digits}-{letters}"))


def _monotonous(source: Source, size: int, rng: random.Random) -> str | None:
    """Some of training's: digits that only their place tells from each other."""
    if source.split == "test" or rng.random() >= _MONOTONOUS:
        return None
    few = rng.sample(string.digits[1:], 2)
    return "".join(rng.choices(few, k=size))


def _word(source: Source, rng: random.Random) -> str:
    return _spelt(rng.choice(source.words), source, rng)


def _two_words(source: Source, rng: random.Random) -> str:
    return " ".join(_spelt(word, source, rng) for word in rng.sample(source.words, 2))


def _spelt(word: str, source: Source, rng: random.Random) -> str:
    """The word; in training as often its first half and another's second: what no text has is told by its letters."""
    if source.split == "test" or rng.random() >= _COINED:
        return word
    other = rng.choice(source.words)
    coined = word[: len(word) // 2] + other[len(other) // 2 :]
    return word if coined in LISTED_WORDS else coined


def _person(source: Source, rng: random.Random) -> str:
    return f"{_name(FIRST_NAMES[source.split], source, rng)} {_name(LAST_NAMES[source.split], source, rng)}"


def _name(listed: Sequence[str], source: Source, rng: random.Random) -> str:
    """Of the list; in training as often any word, known or not, for a name is to be told from others by its letters."""
    if source.split == "test" or rng.random() < _LISTED:
        return rng.choice(listed)
    return _word(source, rng).capitalize()


def _date(_: Source, rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1700, 2030)}"


def _quantity(_: Source, rng: random.Random) -> str:
    return f"{rng.randint(2, rng.choice((30, 300, 3_000)))} {rng.choice(UNITS)}"


def _address(source: Source, rng: random.Random) -> str:
    return f"{rng.randint(1, 250)} {_name(PLACES[source.split], source, rng)} {rng.choice(STREETS)}"


def _split(attributes: str) -> tuple[str, ...]:
    return tuple(" ".join(attributes.split()).split(", "))


KINDS: dict[str, Kind] = {
    "number": Kind(_split(NUMBERS), _number, 6, 8),
    "uuid": Kind(_split("device id, magic uuid, tracking id, transaction id, uuid, order id"), _uuid, 3, 2),
    "code": Kind(_split("call sign, licence plate, locker code, model code, part code, serial code"), _code, 3, 2),
    "word": Kind(_split("password, code word, secret word, nickname, magic word, favourite word"), _word, 4, 2),
    "words": Kind(_split("passphrase, code name, stage name, project name, old name"), _two_words, 4, 2),
    "person": Kind(_split("owner, keeper, builder, inventor, first buyer, painter, guardian"), _person, 3, 1),
    "date": Kind(_split("opening date, birthday, founding date, date of sale, due date, launch date"), _date, 1, 1),
    "quantity": Kind(_split("weight, price, height, length, age, worth, size"), _quantity, 2, 1),
    "address": Kind(_split("address, old address, postal address, place of delivery"), _address, 2, 1),
}
