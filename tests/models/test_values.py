"""What facts state: in training any word may be a name, in the test split those of its lists alone."""

import random

import pytest
from titans.evaluation.values import KINDS, Source
from titans.evaluation.wording import FIRST_NAMES, LAST_NAMES, PLACES

WORDS = ("harrow", "bellows", "quill")


@pytest.mark.parametrize(("kind", "parts"), [("person", 2), ("address", 1)])
def test_names_are_of_the_lists_and_in_training_of_any_words_as_well(kind: str, parts: int) -> None:
    lists = [FIRST_NAMES, LAST_NAMES] if kind == "person" else [PLACES]
    rng = random.Random(0)
    for split in ("train", "test"):
        values = [KINDS[kind].make(Source(split, WORDS), rng).split() for _ in range(400)]
        names = [value[:parts] if kind == "person" else value[1:2] for value in values]
        for position, listed in enumerate(lists):
            others = [name[position] for name in names if name[position] not in listed[split]]
            assert set(others) == ({word.capitalize() for word in WORDS} if split == "train" else set())
            assert len(others) < 300, "half of them are of the list"
