"""The measurement: cells of a task and a length, documents of a cell, questions of a document, with their controls."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from titans.evaluation.facts import FactsTask
from titans.evaluation.haystack import Haystack
from titans.evaluation.listed import ListedTask
from titans.evaluation.local import LocalReader
from titans.evaluation.niah import NOISE, NOISE_LINES, needle_tasks
from titans.evaluation.perplexity import LONGEST_IN_FULL
from titans.evaluation.reader import Reader, Reading, Report
from titans.evaluation.task import Exam, Task
from titans.evaluation.updated import UpdatedTask
from titans.evaluation.verbatim import VerbatimTask

_OWN = "facts", "updated", "corrected", "varied", "listed", "logged"
TASKS = (*_OWN, "single_1", "single_2", "single_3", "multikey_1", "multivalue", "verbatim")
_CHANGES = 4  # times that a log tells of each thing


@dataclass(frozen=True)
class Plan:
    """What is asked for, before anything is read."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]  # of documents, in tokens
    num_samples: int  # questions a cell
    questions_per_document: int  # at most; 1: RULER's tasks
    seed: int = 0
    full_attention: bool = False  # ask the body with full attention too, up to 8K tokens


@dataclass(frozen=True)
class Part:
    """One document of a cell, and how many of its questions it has."""

    task: Task
    tokens: int
    index: int
    place: float  # among the documents of its cell, 0 to 1
    num_questions: int

    @property
    def key(self) -> tuple[str, int, int]:
        """What it is called in the results."""
        return self.task.name, self.tokens, self.index


def make_tasks(book: Haystack) -> dict[str, Task]:
    """All tasks by name, on this text."""
    noise = Haystack(NOISE * NOISE_LINES, book.count, end="\n")
    facts = FactsTask(book)
    own: list[Task] = [facts, UpdatedTask(facts), UpdatedTask(facts, soon=True), FactsTask(book, varied=True)]
    lists: list[Task] = [ListedTask(facts), ListedTask(facts, changes=_CHANGES)]
    tasks = [*own, *lists, *needle_tasks(book, noise), VerbatimTask(book)]
    return {task.name: task for task in tasks}


def parts(plan: Plan, tasks: dict[str, Task]) -> list[Part]:
    """The documents of all cells, shorter ones first. Raises EvaluationError for a cell that cannot be."""
    return [
        part
        for tokens in sorted(plan.lengths)
        for name in plan.tasks
        for part in _cell_parts(tasks[name], tokens, plan)
    ]


def _cell_parts(task: Task, tokens: int, plan: Plan) -> Iterator[Part]:
    most = min(plan.questions_per_document, task.most_questions(tokens))
    count = -(-plan.num_samples // most)
    for i in range(count):
        num_questions = (i + 1) * plan.num_samples // count - i * plan.num_samples // count
        yield Part(task, tokens, i, (i + 0.5) / count, num_questions)


def examine(some: Sequence[Part], plan: Plan, reader: Reader, report: Report) -> list[dict[str, Any]]:
    """Have documents of one cell read, ask all about them, grade the answers: what a results file has of each."""
    task = some[0].task
    seeds = [f"{plan.seed}/{part.task.name}/{part.tokens}/{part.index}" for part in some]
    exams = [
        task.make(part.tokens, part.num_questions, part.place, random.Random(seed))
        for part, seed in zip(some, seeds, strict=True)
    ]
    with reader.read([exam.document for exam in exams], report) as reading:
        read = reading.num_tokens
        prompts = [[question.prompt for question in exam.questions] for exam in exams]
        answers = {name: _answers(task, reading, prompts, name == "memory") for name in ("memory", "off")}
        controls = [[question.prompt for question in exam.absent] for exam in exams]
        absent = _answers(task, reading, controls, memory=True)
    if plan.full_attention and some[0].tokens <= LONGEST_IN_FULL:
        assert isinstance(reader, LocalReader), "a server has no such thing"
        answers["full"] = []
        for exam, asked in zip(exams, prompts, strict=True):
            with reader.read_in_full(exam.document) as reading:
                answers["full"] += _answers(task, reading, [asked], memory=False)
    return [
        {
            "task": task.name,
            "tokens": part.tokens,
            "index": part.index,
            "read": read[i],
            "questions": list(_graded(task, exam, {name: given[i] for name, given in answers.items()})),
            "absent": [_controlled(task, exam, answer) for answer in absent[i]],
        }
        for i, (part, exam) in enumerate(zip(some, exams, strict=True))
    ]


def _answers(task: Task, reading: Reading, prompts: Sequence[Sequence[str]], memory: bool) -> list[list[str]]:
    if not any(prompts):
        return [[] for _ in prompts]
    return reading.answer(prompts, memory=memory, max_tokens=task.max_tokens, stop="\n")


def _graded(task: Task, exam: Exam, answers: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    for i, question in enumerate(exam.questions):
        row: dict[str, Any] = {"depths": list(question.depths), "values": list(question.values)}
        for name, given in answers.items():
            grade = task.grade(question, given[i])
            row[name] = {"answer": given[i], "right": grade.right, "share": grade.share}
        yield row


def _controlled(task: Task, exam: Exam, answer: str) -> dict[str, Any]:
    """An answer about what the document never names: does it give a value, and one that the document states?"""
    return {"answer": answer, "value": task.claims(answer), "planted": task.repeats(answer, exam)}
