"""How many questions a document is asked, and which answers to them are right, without a model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from titans.evaluation.__main__ import LENGTHS, QUICK_LENGTHS, QUICK_SAMPLES, SAMPLES, length
from titans.evaluation.facts import first_number, gives
from titans.evaluation.niah import NeedleTask
from titans.evaluation.scoring import cells
from titans.evaluation.suite import TASKS, Part, Plan, examine, parts
from titans.evaluation.task import EvaluationError, Exam, Question, Task

PLAN = Plan(tasks=TASKS, lengths=(2_048,), num_samples=10, questions_per_document=10)


def test_an_answer_gives_a_value_to_the_letter() -> None:
    assert gives(" The code of it is 1234567.", "1234567")
    assert not gives(" 7654321, not 1234567.", "1234567"), "the first number counts"
    assert gives(" It is called amber lake.\nYes", "amber lake")
    assert not gives(" It is called amber lakes.", "amber lake")
    assert not gives(" Nothing.\namber lake", "amber lake"), "only the first line counts"


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (" It weighs 1,230 miles.", "230 miles"),
        (" The part code is 123-45-AB.", "45-AB"),
        (" APY-994-994-0B02", "APY-994"),
        (" saffron-brown.", "saffron"),
        (" fiddle-fiddle", "fiddle"),
    ],
)
def test_what_is_longer_than_a_value_is_another(answer: str, value: str) -> None:
    assert not gives(answer, value)
    for right in (f" It is {value}.", f' "{value}", they say', f" {value}: so it was", value):
        assert gives(right, value)


@pytest.mark.parametrize(
    ("name", "answer", "right", "share"),
    [
        ("facts", " The code of the mossy turret is 1234567.", True, 1.0),
        ("facts", " 1234567, not 7654321", True, 1.0),
        ("facts", " 7654321, not 1234567", False, 0.0),
        ("facts", " 12345678", False, 0.0),
        ("facts", "", False, 0.0),
        ("single_2", " 1234567.", True, 1.0),
        ("single_2", " 3, 1234567.", False, 0.0),
        ("single_2", " 123456.", False, 0.0),
        ("single_3", " 0F0E0D0C-0B0A-4908-8706-050403020100.", True, 1.0),
        ("single_3", " 0f0e0d0c-0b0a-4908-8706-050403020101.", False, 0.0),
        ("single_3", " 0f0e0d0c", False, 0.0),
        ("multivalue", " 1111111, 2222222, 3333333, and 4444444.", True, 1.0),
        ("multivalue", " 4444444, 2222222, 9999999, 1111111", False, 0.75),
        ("multivalue", " 11111112222222", False, 0.0),
        ("verbatim", " a b c d e f g h i j k l m n o p q", True, 1.0),
        ("verbatim", " a b c d e X g h i j k l m n o p", True, 5 / 16),
        ("verbatim", " a b c d X f g h i j k l m n o p", False, 4 / 16),
        ("verbatim", " b c d e f", False, 0.0),
    ],
)
def test_answers_are_graded(tasks: dict[str, Task], name: str, answer: str, right: bool, share: float) -> None:
    values = {
        "single_3": ("0f0e0d0c-0b0a-4908-8706-050403020100",),
        "multivalue": ("1111111", "2222222", "3333333", "4444444"),
        "verbatim": tuple("abcdefghijklmnop"),
    }.get(name, ("1234567",))
    assert tasks[name].grade(Question("", values), answer) == (right, share)


def test_a_run_takes_as_many_tokens_and_answers_as_the_guide_says(tasks: dict[str, Task]) -> None:
    guide = " ".join((Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8").split())
    sizes = []
    for lengths, samples in ((LENGTHS, SAMPLES), (QUICK_LENGTHS, QUICK_SAMPLES)):
        documents = parts(Plan(TASKS, tuple(lengths), samples, 10), tasks)
        answers = sum(part.num_questions * (2 if part.task.name == "verbatim" else 3) for part in documents)
        sizes.append((sum(part.tokens for part in documents), answers))
    (tokens, answers), (quick_tokens, quick_answers) = sizes
    assert f"the whole run is {tokens / 1e6:.1f} million tokens and {answers:,} answers" in guide
    assert f"`--quick` {quick_tokens // 1_000},000 tokens and {quick_answers} answers" in guide


def test_the_first_number_is_taken() -> None:
    assert [first_number(text) for text in ("a12b34", "none", "")] == ["12", None, None]


def test_questions_share_documents_as_far_as_they_have_room(tasks: dict[str, Task]) -> None:
    def sizes(name: str, **changes: Any) -> list[int]:
        plan = replace(PLAN, **{"tasks": (name,)} | changes)
        return [part.num_questions for part in parts(plan, tasks)]

    assert sizes("single_2") == [10]
    assert sizes("single_2", questions_per_document=1) == [1] * 10
    assert sizes("single_2", num_samples=25) == [8, 8, 9]
    assert sizes("multivalue", lengths=(2_048, 16_384)) == [5, 5, 10], "at most a quarter is needles"
    million: dict[str, Any] = {"lengths": (1 << 20,), "num_samples": 400, "questions_per_document": 400}
    assert [sizes(name, **million) for name in ("facts", "multikey_1")] == [[200] * 2, [80] * 5], "there are 400 keys"
    with pytest.raises(EvaluationError, match="256 tokens are too few for multivalue: it needs"):
        sizes("multivalue", lengths=(256,))


class Scholar:
    """A reader that knows what it has read by heart, if its memory is on."""

    model, fingerprint, at_once = "scholar", "f00d", 2

    def __init__(self, task: Task) -> None:
        self._task, self.asked = task, list[bool]()

    def count(self, text: str) -> int:
        return len(text) // 4

    @contextmanager
    def read(self, documents: Sequence[str], report: Any) -> Iterator[Any]:
        def answer(prompts: Sequence[Sequence[str]], *, memory: bool, max_tokens: int, stop: str) -> list[list[str]]:
            self.asked += [memory for some in prompts for _ in some]
            about = zip(documents, prompts, strict=True)
            return [[self._find(text, p) if memory else " 0000000" for p in some] for text, some in about]

        report(sum(map(len, documents)))
        yield SimpleNamespace(num_tokens=[*map(len, documents)], answer=answer)

    def _find(self, document: str, prompt: str) -> str:
        key = prompt.partition(" for ")[2].split()[0]
        lines = [line for line in document.split("One of the special") if f" for {key} " in line]
        return " ".join(line.split(": ")[1].split(".")[0] for line in lines) or " 1000000"


@pytest.mark.parametrize("name", ["single_1", "multikey_1", "multivalue"])
def test_a_document_is_read_asked_about_and_graded_with_its_controls(tasks: dict[str, Task], name: str) -> None:
    reader, task = Scholar(tasks[name]), tasks[name]
    asked = Part(task, 2_048, 3, 0.5, 4)
    (found,) = examine([asked], PLAN, reader, lambda tokens: None)
    assert (found["task"], found["tokens"], found["index"]) == (name, 2_048, 3)
    assert reader.asked == [True] * 4 + [False] * 4 + [True] * 4
    (cell,) = cells([found])
    assert (cell.tallies["memory"].right, cell.tallies["off"].right) == (4, 0)
    assert cell.absent == (4, 4, 0), "a number of the right form, which the document does not state"
    again, next_to_it = examine([asked, replace(asked, index=4)], PLAN, reader, lambda tokens: None)
    assert again == found
    (seeded,) = examine([asked], replace(PLAN, seed=1), reader, lambda tokens: None)
    for other in (next_to_it, seeded):
        assert other["questions"][0]["values"] != found["questions"][0]["values"]


def test_lengths_are_written_as_people_write_them() -> None:
    assert [length(text) for text in ("16000", "2k", "16K", "1M")] == [16_000, 2_048, 16_384, 1_048_576]


def test_a_task_knows_its_own_form(tasks: dict[str, Task]) -> None:
    numbers, uuids = tasks["single_1"], tasks["single_3"]
    assert isinstance(numbers, NeedleTask) and isinstance(uuids, NeedleTask)
    assert numbers.values_in("12 1234567, 12345678 and 7654321") == ["1234567", "7654321"]
    assert uuids.values_in("0F0E0D0C-0B0A-4908-8706-050403020100 x") == ["0f0e0d0c-0b0a-4908-8706-050403020100"]
    for longer in ("9a{}", "{}7", "{}-55", "a-{}"):
        assert not uuids.values_in(longer.format("0f0e0d0c-0b0a-4908-8706-050403020100"))


def test_of_what_is_not_there_whatever_is_said_is_a_claim_but_that_it_is_not_known(tasks: dict[str, Task]) -> None:
    exam = Exam("", (Question("", ("amber lake",)), Question("", ("235 Quarry Road",))))
    for answer in (" not known.", " The owner of the mossy turret is not known.", " Unknown.", " It isn't stated."):
        assert not tasks["varied"].claims(answer)
    for answer, is_stated in ((" Ann Webb.", False), (" 235 Quarry Road.", True), (" The name is amber lake.", True)):
        assert tasks["varied"].claims(answer)
        assert tasks["varied"].repeats(answer, exam) == is_stated
    assert not tasks["facts"].claims(" amber lake") and tasks["facts"].claims(" 1234567")
