"""What facts state: in training any word may be a name, in the test split those of its lists alone."""

import random

import pytest
from titans.evaluation.values import KINDS, Source
from titans.evaluation.wording import FIRST_NAMES, LAST_NAMES, PLACES, Split

WORDS = ("harrow", "bellows", "quill")


@pytest.mark.parametrize(
    ("kind", "lists", "named"), [("person", [FIRST_NAMES, LAST_NAMES], slice(2)), ("address", [PLACES], slice(1, 2))]
)
def test_names_are_of_the_lists_and_in_training_of_any_words_as_well(
    kind: str, lists: list[dict[Split, list[str]]], named: slice
) -> None:
    rng = random.Random(0)
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        names = [KINDS[kind].make(Source(split, WORDS), rng).split()[named] for _ in range(400)]
        for position, listed in enumerate(lists):
            others = [name[position] for name in names if name[position] not in listed[split]]
            assert set(others) == ({word.capitalize() for word in WORDS} if split == "train" else set())
            assert len(others) < 300, "half of them are of the list"
