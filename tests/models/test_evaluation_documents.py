"""What the documents of the tasks state, where in them, and how long they are."""

import random
import re
from pathlib import Path

import pytest
from titans.evaluation import facts
from titans.evaluation.facts import make_keys
from titans.evaluation.haystack import Haystack, insert, spread
from titans.evaluation.listing import LAYOUTS, write_list
from titans.evaluation.suite import TASKS
from titans.evaluation.task import EvaluationError, Question, Task
from titans.evaluation.wording import ADJECTIVES, MONTHS, NOUNS, STREETS, UNITS

TEXT = (Path(__file__).parents[2] / "examples" / "sherlock-holmes.txt").read_text(encoding="utf-8")
PLANTED = [name for name in TASKS if name != "verbatim"]
NUM_VALUES = {"multivalue": 4}
NUM_STATEMENTS = {"multivalue": 4, "updated": 2, "corrected": 2, "logged": 4}


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
        return len(re.findall(rf"\b{key[1] or key[2]}\b", exam.document))

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


def test_what_is_corrected_is_within_sight_of_what_it_corrects(tasks: dict[str, Task], book: Haystack) -> None:
    for tokens in (2_048, 16_384):
        exam = tasks["corrected"].make(tokens, 10, 0.5, random.Random(0))
        numbers = [*re.finditer(r"\b\d{7}\b", exam.document)]
        assert len({number[0] for number in numbers}) == 20
        assert [question.values[0] for question in exam.questions] == [number[0] for number in numbers[1::2]]
        for old, new in zip(numbers[::2], numbers[1::2], strict=True):
            assert 10 < book.count(exam.document[old.end() : new.start()]) < 250
        assert not tasks["corrected"].grade(exam.questions[0], f" It is {numbers[0][0]}.").right


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


@pytest.mark.parametrize("index", range(len(LAYOUTS["test"])))
def test_a_list_has_a_line_of_every_thing_and_a_log_the_newest_last(tasks: dict[str, Task], index: int) -> None:
    place = (index + 0.5) / len(LAYOUTS["test"])
    for name, times in (("listed", 1), ("logged", 4)):
        exam = tasks[name].make(4_096, 5, place, random.Random(index))
        lines = [line for line in exam.document.splitlines() if re.search(r"\b\d{7}\b", line)]
        assert len(lines) == 5 * times
        for question in exam.questions:
            thing = re.search(r" of the (\w+ \w+)\?", question.prompt)
            assert thing is not None
            told = re.findall(rf"{thing[1]}\b(?s:.)*?\b(\d{{7}})\b", exam.document)
            assert len(told) == times and told[-1] == question.values[0]
            assert times == 1 or not tasks[name].grade(question, f" It is {told[0]}.").right


def test_lists_look_unlike_those_of_training() -> None:
    assert {layout.line for layout in LAYOUTS["train"]}.isdisjoint(layout.line for layout in LAYOUTS["test"])
    for split, layouts in LAYOUTS.items():
        for layout in layouts:
            told = [("red lamp", "12"), ("old door", "34"), ("red lamp", "56")]
            lines = write_list(layout, "entry code", told, random.Random(0))
            assert [(line.thing, line.value) for line in lines] == told, split
            assert [line.holds for line in lines] == [False, True, True]
            written = "".join(f"{line.before}{line.gap}{line.value}{line.after}" for line in lines)
            assert not re.search(r"<\w>", written), "all is filled in"
            assert re.search(r"red lamp(?s:.)*12(?s:.)*old door(?s:.)*34(?s:.)*red lamp(?s:.)*56", written)
            times = re.findall(r"\d{4}(?:-\d\d){2} \d\d(?::\d\d){2}", written)
            assert times == sorted(times) and len(times) == (3 if "<d>" in layout.line else 0)
