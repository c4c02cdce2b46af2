"""What facts state: in training any word may be a name, and some are no words; in the test split those of its lists."""

import random
import re

import pytest
from titans.evaluation.values import KINDS, Source
from titans.evaluation.wording import FIRST_NAMES, LAST_NAMES, LISTED_WORDS, PLACES, Split
from titans.evaluation.wording import WORDS as TEST_WORDS

WORDS = ("harrow", "bellows", "quilting")
COINED = {head + tail for head in ("har", "bel", "quil") for tail in ("row", "lows", "ting")}
TESTED = Source("test", TEST_WORDS["test"])
TAUGHT = Source("train", WORDS)


def made(kind: str, source: Source) -> list[str]:
    rng = random.Random(0)
    return [KINDS[kind].make(source, rng) for _ in range(400)]


@pytest.mark.parametrize(
    ("kind", "lists", "named"), [("person", [FIRST_NAMES, LAST_NAMES], slice(2)), ("address", [PLACES], slice(1, 2))]
)
def test_names_are_of_the_lists_and_in_training_of_any_words_as_well(
    kind: str, lists: list[dict[Split, list[str]]], named: slice
) -> None:
    for source in (TAUGHT, TESTED):
        names = [value.split()[named] for value in made(kind, source)]
        for position, listed in enumerate(lists):
            others = [name[position] for name in names if name[position] not in listed[source.split]]
            assert set(others) == ({word.capitalize() for word in COINED} if source is TAUGHT else set())
            assert len(others) < 300, "half of them are of the list"


@pytest.mark.parametrize(("kind", "count"), [("word", 1), ("words", 2)])
def test_half_of_trainings_words_are_put_together_from_the_halves_of_two(kind: str, count: int) -> None:
    told = [word for value in made(kind, TAUGHT) for word in value.split()]
    assert set(told) == COINED
    assert 0.5 < sum(word in WORDS for word in told) / len(told) < 0.8, "half, and those made of one word alone"
    assert len(told) == 400 * count
    assert {word for value in made(kind, TESTED) for word in value.split()} == set(TESTED.words)


def test_no_word_that_is_put_together_is_one_that_is_tested() -> None:
    assert "lantern" in LISTED_WORDS
    assert set(made("word", Source("train", ("lanxxx", "yyytern")))) == {"lanxxx", "yyytern", "yyyxxx"}


@pytest.mark.parametrize("kind", ["number", "code"])
def test_some_of_trainings_numbers_have_two_digits_alone(kind: str) -> None:
    def monotonous(source: Source) -> float:
        digits = [re.sub(r"\D", "", value) for value in made(kind, source)]
        long = [each for each in digits if len(each) >= 5]
        return sum(len(set(each)) <= 2 for each in long) / len(long)

    assert monotonous(TESTED) < 0.05
    assert 0.08 < monotonous(TAUGHT) < 0.2
