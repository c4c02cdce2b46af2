"""What is planted, asked, and counted: the tasks and the numbers, without a model."""

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from titans.evaluation import facts, table
from titans.evaluation.__main__ import LENGTHS, QUICK_LENGTHS, QUICK_SAMPLES, SAMPLES, add_arguments, length, run
from titans.evaluation.facts import first_number, gives, make_keys
from titans.evaluation.haystack import Haystack, insert, spread
from titans.evaluation.names import met_again
from titans.evaluation.niah import NeedleTask
from titans.evaluation.perplexity import Perplexity
from titans.evaluation.plot import by_depth, plot
from titans.evaluation.results import Results, read_documents
from titans.evaluation.scoring import cells, wilson
from titans.evaluation.suite import TASKS, Part, Plan, examine, make_tasks, parts
from titans.evaluation.task import EvaluationError, Question, Task
from titans.evaluation.wording import ADJECTIVES, MONTHS, NOUNS, STREETS, UNITS
from titans.tokenizer import Tokenizer

TEXT = (Path(__file__).parents[2] / "examples" / "sherlock-holmes.txt").read_text(encoding="utf-8")
PLANTED = [name for name in TASKS if name != "verbatim"]
NUM_VALUES = {"multivalue": 4}
NUM_STATEMENTS = {"multivalue": 4, "updated": 2}
PLAN = Plan(tasks=TASKS, lengths=(2_048,), num_samples=10, questions_per_document=10)


@pytest.fixture(scope="module")
def book(tokenizer: Tokenizer) -> Haystack:
    return Haystack(TEXT, lambda text: len(tokenizer.encode(text)))


@pytest.fixture(scope="module")
def tasks(book: Haystack) -> dict[str, Task]:
    return make_tasks(book)


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("num_questions", [1, 5])
def test_a_document_states_every_value_once_where_it_says(
    tasks: dict[str, Task], name: str, num_questions: int
) -> None:
    exam = tasks[name].make(4_096, num_questions, 0.5, random.Random(3))
    assert len({question.prompt for question in exam.questions + exam.absent}) == 2 * num_questions
    for question in exam.questions:
        assert len(question.values) == len(question.depths) == NUM_VALUES.get(name, 1)
        for value, depth in zip(question.values, question.depths, strict=True):
            assert exam.document.count(value) == 1
            assert 0 <= exam.document.index(value) / len(exam.document) - depth < 0.02, "its sentence begins there"


@pytest.mark.parametrize("name", [name for name in PLANTED if name != "varied"])
def test_a_key_is_in_the_document_if_it_is_asked_for_and_not_absent(tasks: dict[str, Task], name: str) -> None:
    exam = tasks[name].make(4_096, 5, 0.5, random.Random(3))

    def times(question: Question) -> int:
        key = re.search(r" of the (\w+ \w+)\?| for (\S+) mentioned", question.prompt)
        assert key is not None
        return exam.document.count(f" {key[1] or key[2]} ")

    assert [times(question) for question in exam.questions] == [NUM_STATEMENTS.get(name, 1)] * 5
    assert [times(question) for question in exam.absent] == [0] * 5


def test_varied_facts_are_of_all_kinds_and_share_no_sentence_or_listed_word_with_training() -> None:
    asked = facts.make_varied_facts(300, random.Random(0))
    taught = facts.make_families(300, random.Random(0), ["lake", "horse", "evening", "water", "night", "paper"])
    assert {fact.form for fact in asked} == {"question", "sentence", "beginning"}
    assert sum(fact.value.isdigit() for fact in asked) in range(60, 180)
    assert any(re.fullmatch(r"[0-9a-f-]{36}", fact.value) for fact in asked)
    assert len({fact.value for fact in asked}) == len(asked)
    begun = [{fact.before.replace(fact.thing, "") for fact in some} for some in (asked, taught)]
    assert not begun[0] & begun[1]
    words = [
        {word for fact in some for word in re.findall("[a-zA-Z]+", f"{fact.thing} {fact.value}")}
        for some in (asked, taught)
    ]
    common = {word for word in words[0] & words[1] if len(word) > 3} - {*STREETS, *MONTHS, *UNITS}
    assert not common


def test_an_answer_gives_a_value_to_the_letter() -> None:
    assert gives(" The code of it is 1234567.", "1234567")
    assert not gives(" 7654321, not 1234567.", "1234567"), "the first number counts"
    assert gives(" It is called amber lake.\nYes", "amber lake")
    assert not gives(" It is called amber lakes.", "amber lake")
    assert not gives(" Nothing.\namber lake", "amber lake"), "only the first line counts"


def test_with_four_keys_a_question_three_are_only_there_to_distract(tasks: dict[str, Task]) -> None:
    exam = tasks["multikey_1"].make(4_096, 2, 0.5, random.Random(3))
    assert exam.document.count("One of the special magic numbers for ") == 8
    assert tasks["single_2"].make(4_096, 2, 0.5, random.Random(3)).document.count("One of the special") == 2


def test_with_one_question_the_words_are_rulers(tasks: dict[str, Task]) -> None:
    exam = tasks["single_1"].make(2_048, 1, 0.5, random.Random(3))
    key = exam.questions[0].prompt.partition(" for ")[2].split()[0]
    opening = "A special magic number is hidden within the following text. Make sure to memorize it. "
    assert exam.document.startswith(opening + "I will quiz you about the number afterwards.\n")
    lines = exam.document.splitlines()
    assert f"One of the special magic numbers for {key} is: {exam.questions[0].values[0]}." in lines
    assert lines.count("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.") > 50
    asked, answer = exam.questions[0].prompt.split("? ")
    assert asked == f"\nWhat is the special magic number for {key} mentioned in the provided text"
    assert answer == f"The special magic number for {key} mentioned in the provided text is"


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(("tokens", "tolerance"), [(2_048, 0.1), (16_384, 0.04)])
def test_a_document_is_about_as_long_as_it_should_be(
    tasks: dict[str, Task], book: Haystack, name: str, tokens: int, tolerance: float
) -> None:
    num_questions = min(10, tasks[name].most_questions(tokens))
    for place in (0.05, 0.5, 0.95):
        document = tasks[name].make(tokens, num_questions, place, random.Random(0)).document
        assert book.count(document) == pytest.approx(tokens, rel=tolerance)


def test_a_text_that_is_too_short_is_repeated(book: Haystack) -> None:
    short = Haystack(TEXT[:20_000], book.count)
    assert book.count(short.cut(16_384, 0.5)) == pytest.approx(16_384, rel=0.025)
    with pytest.raises(EvaluationError, match="too short"):
        Haystack("One sentence. Another.", book.count)


@pytest.mark.parametrize("name", ["facts", "single_1", "single_2", "single_3"])
def test_depths_are_spread_evenly_within_and_over_documents(tasks: dict[str, Task], name: str) -> None:
    def depths(num_questions: int, place: float) -> list[float]:
        exam = tasks[name].make(16_384, num_questions, place, random.Random(1))
        return sorted(depth for question in exam.questions for depth in question.depths)

    assert depths(5, 0.5) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=0.03)
    assert [depths(1, place)[0] for place in (0.1, 0.5, 0.9)] == pytest.approx([0.1, 0.5, 0.9], abs=0.03)


def test_the_four_needles_of_a_key_are_spread_over_the_document(tasks: dict[str, Task]) -> None:
    exam = tasks["multivalue"].make(16_384, 1, 0.5, random.Random(1))
    assert sorted(exam.questions[0].depths) == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8], abs=0.03)


def test_verbatim_asks_for_what_the_document_goes_on_with(tasks: dict[str, Task], book: Haystack) -> None:
    exam = tasks["verbatim"].make(4_096, 10, 0.5, random.Random(0))
    for question in exam.questions:
        lead = question.prompt.removeprefix("\n\n")
        assert len(lead.split()) == 12
        before, found, after = exam.document.partition(lead)
        assert found
        assert lead not in after, "it is there once"
        assert tuple(after.split()[:16]) == question.values
        assert len(before) / len(exam.document) == pytest.approx(question.depths[0])
    assert len({question.prompt for question in exam.questions}) == 10
    with pytest.raises(EvaluationError, match="cannot repeat a text"):
        tasks["verbatim"].most_questions(2 * book.num_tokens)


def test_what_is_stated_anew_is_asked_for_and_stands_after_what_was_stated_first(tasks: dict[str, Task]) -> None:
    exam = tasks["updated"].make(4_096, 6, 0.5, random.Random(0))
    numbers = re.findall(r"\b\d{7}\b", exam.document)
    assert len({*numbers}) == 12
    assert {question.values[0] for question in exam.questions} == {*numbers[6:]}
    assert not tasks["updated"].grade(exam.questions[0], f" It is {numbers[0]}.").right


def test_keys_are_held_out_words_and_share_none_while_there_are_enough() -> None:
    keys = [key.split("-") for key in make_keys(20, random.Random(0))]
    for words, lists in zip(zip(*keys, strict=True), (ADJECTIVES, NOUNS), strict=True):
        assert set(words) == set(lists["test"])
        assert set(words).isdisjoint(lists["train"])
    assert len(set(make_keys(400, random.Random(0)))) == 400


def test_statements_stand_after_the_first_sentence_past_their_offset() -> None:
    text = "One. Two. Three"
    assert spread(text, 3, 0.5) == [2, 7, 12]
    assert insert(text, ["A.", "B.", "C."], [0, 3, 12]) == "One. A. Two. B. Three C. "
    assert insert("a\nb\nc\n", ["A", "B"], [0, 0], end="\n") == "a\nA\nb\nB\nc\n"


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


def graded(task: str, tokens: int, index: int, rights: Sequence[bool], *, depth: float = 0.1) -> dict[str, Any]:
    def answer(right: bool) -> dict[str, Any]:
        return {"answer": "", "right": right, "share": float(right)}

    questions = [
        {"depths": [depth], "values": ["1"], "memory": answer(right), "off": answer(False)} for right in rights
    ]
    absent = [{"answer": "", "value": right, "planted": False} for right in rights]
    return {
        "task": task, "tokens": tokens, "index": index, "read": tokens, "questions": questions, "absent": absent
    }  # fmt: skip


def test_cells_count_over_their_documents() -> None:
    first, second = cells(
        [graded("facts", 100, 0, [True, False]), graded("facts", 200, 0, [True]), graded("facts", 100, 1, [True])]
    )
    assert (first.task, first.tokens, first.num_documents) == ("facts", 100, 2)
    assert (first.tallies["memory"].asked, first.tallies["memory"].right) == (3, 2)
    assert first.tallies["memory"].share == pytest.approx(2 / 3)
    assert first.absent == (3, 2, 0)
    assert "full" not in first.tallies
    assert second.tokens == 200


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilsons_interval(right: int, asked: int, low: float, high: float) -> None:
    assert wilson(right, asked) == pytest.approx((low, high), abs=5e-5)


def test_results_go_on_where_they_ended(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first = Results(path, {"model": "tiny", "seed": 0})
    first.add([graded("facts", 100, 0, [True])])
    nats = Perplexity({"memory": 3.5, "off": 3.75}, {"memory": 1.0, "off": 2.0}, 7)
    first.add_perplexity(100, nats)
    second = Results(path, {"model": "tiny", "seed": 0})
    assert second.documents == first.documents
    assert second.perplexity == {100: nats}
    second.add([graded("facts", 100, 1, [False])])
    (row,) = json.loads(path.read_text())["cells"]
    assert (row["task"], row["memory"]["asked"], row["memory"]["right"], row["off"]["right"]) == ("facts", 2, 1, 0)
    assert [cell.num_documents for cell in second.cells([("facts", 100, 1), ("facts", 100, 7)])] == [1]
    assert list(tmp_path.iterdir()) == [path]


def test_results_of_other_settings_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Results(path, {"model": "tiny", "seed": 0}).add([graded("facts", 100, 0, [True])])
    before = path.read_bytes()
    with pytest.raises(EvaluationError, match=r"results of another seed \(0, not 1\)"):
        Results(path, {"model": "tiny", "seed": 1})
    assert path.read_bytes() == before
    path.write_text("[1, 2]")
    with pytest.raises(EvaluationError, match="not a file of results"):
        Results(path, {"seed": 1})


def results_file(path: Path, *documents: dict[str, Any], **settings: object) -> Path:
    Results(path, {"fingerprint": "f", "text": "t"} | settings).add(documents)
    return path


def test_several_files_are_shown_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = results_file(tmp_path / "short.json", graded("facts", 100, 0, [True, False]), samples=2)
    long = results_file(tmp_path / "long.json", graded("facts", 200, 0, [True]), graded("varied", 100, 0, [False]))
    assert [x["task"] for x in read_documents([short, long])] == ["facts", "facts", "varied"]
    picture = tmp_path / "recall.png"
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args(["--results", str(short), str(long), "--plot", str(picture)])) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == table.HEAD
    assert [row.split()[:4] for row in rows] == [
        ["facts", "100", "2", "1"],
        ["varied", "100", "1", "0"],
        ["facts", "200", "1", "1"],
    ]
    assert picture.exists()


def test_files_that_do_not_belong_together_are_not_shown_as_one(tmp_path: Path) -> None:
    ours = results_file(tmp_path / "ours.json", graded("facts", 100, 0, [True]))
    same = results_file(tmp_path / "same.json", graded("facts", 100, 1, [True]))
    other = results_file(tmp_path / "other.json", graded("facts", 200, 0, [True]), fingerprint="g")
    with pytest.raises(EvaluationError, match=r"both have facts at 100 tokens"):
        read_documents([ours, same])
    with pytest.raises(EvaluationError, match=r"both have facts at 100 tokens"):
        read_documents([ours, ours])
    with pytest.raises(EvaluationError, match=r"results of another fingerprint than"):
        read_documents([ours, other])
    with pytest.raises(EvaluationError, match=r"missing.json cannot be read: No such file"):
        read_documents([tmp_path / "missing.json"])


def test_the_table_is_aligned() -> None:
    (cell,) = cells([graded("multikey_1", 1_048_576, 0, [True] * 99 + [False])])
    row = table.row(cell)
    assert len(row) == len(table.HEAD)
    assert row.split() == [
        *("multikey_1", "1,048,576", "100", "99", "94.6%", "-", "99.8%", "99.0%"),
        *("0", "of", "100", "-", "99", "of", "100", "0", "of", "100"),
    ]
    found = Perplexity({"memory": 3.0, "off": 4.0}, {"memory": 1.0, "off": 2.0, "full": 0.5}, 1_234)
    every, names = table.perplexity_rows(1_048_576, found).splitlines()
    assert len(every) == len(names) == len(table.perplexity_head())
    assert every.split() == ["all", "1,048,576", "3.000", "4.000", "-"]
    assert names.split() == ["1,234", "of", "names", "1,048,576", "1.000", "2.000", "0.500"]
    assert table.perplexity_rows(8, Perplexity({"memory": 3.0, "off": 4.0}, {}, 0)).count("\n") == 0


def test_a_name_is_met_again_past_the_window(tokenizer: Tokenizer) -> None:
    far = " and so on" * 12  # 36 tokens
    text = f"Then Irene came.{far} Irene and Irene went. Then Adler came,{far} then Mrs Adler, the Then of it."
    tokens = tokenizer.encode(text)
    assert [tokenizer.decode([tokens[i]]) for i in met_again(tokens, tokenizer, 30)] == [" Ire", "ne", " Adler"]
    assert met_again(tokens, tokenizer, 60) == []


def test_recall_by_depth_counts_fifths_and_is_drawn(tmp_path: Path) -> None:
    documents = [graded("facts", 100, 0, [True, False], depth=1.0), graded("facts", 200, 0, [True], depth=0.2)]
    assert by_depth(documents) == {100: [(0, 0)] * 4 + [(1, 2)], 200: [(0, 0), (1, 1), (0, 0), (0, 0), (0, 0)]}
    plot(cells(documents), documents, tmp_path / "recall.png")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_lengths_are_written_as_people_write_them() -> None:
    assert [length(text) for text in ("16000", "2k", "16K", "1M")] == [16_000, 2_048, 16_384, 1_048_576]


def test_a_task_knows_its_own_form(tasks: dict[str, Task]) -> None:
    assert tasks["single_1"].values_in("12 1234567, 12345678 and 7654321") == ["1234567", "7654321"]
    assert isinstance(tasks["single_3"], NeedleTask)
    assert tasks["single_3"].values_in("0F0E0D0C-0B0A-4908-8706-050403020100 x") == [
        "0f0e0d0c-0b0a-4908-8706-050403020100"
    ]
