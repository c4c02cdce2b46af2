"""Facts to plant in a text and ask for: numbers, codes, words, names, dates of made-up things. The project's suite.

Things of the training and of the test split share neither an adjective nor a noun, nor do values that are words.
"""

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from titans.evaluation.haystack import Haystack, insert, spread
from titans.evaluation.listing import LAYOUTS, Line, write_list
from titans.evaluation.task import Exam, Grade, Question, most_in
from titans.evaluation.values import KINDS, Kind, Source
from titans.evaluation.wording import (
    ADJECTIVES,
    ASKINGS,
    ENDINGS,
    FULL_ANSWER,
    LISTED_WORDS,
    NOUNS,
    STATEMENTS,
    WORDS,
    Split,
    a_statement,
    an_asking,
)

NUMBER = re.compile(r"(?<!\d)\d{7}(?!\d)")  # the form of the plain facts' values
_DECLINED = re.compile(r"(\bnot|n't) (known|stated|given|mentioned|specified)\b|\bunknown\b", re.IGNORECASE)
NOT_KNOWN = "not known"  # the value, to a reader whom nobody has told
NUM_THINGS = len(ADJECTIVES["test"]) * len(NOUNS["test"])  # that the test split has words for
_NOT_RARE = 3  # times in the texts
_SAMPLE = 16
_FAMILY = 4
_AS_LISTS = 0.3  # share of training's families that are lists
_LINES = 1, 2, 3, 4, 5, 6, 8, 10  # of one, of which each tells of another thing
_TOLD = 1, 1, 2, 4, 8  # times that a list tells of a thing, at most
_MOST_TOLD = 16  # lines, where there are such
_PLAIN = 0.2  # share of training's facts
_PLAIN_STATEMENTS = 6  # so many of the training split's, the first ones, state the plain facts

Form = Literal["question", "sentence", "beginning", "chat"]
_FORMS: dict[Split, tuple[Form, ...]] = {
    "train": ("question", "question", "question", "sentence", "sentence", "beginning", "chat", "chat"),
    "test": ("question", "sentence", "beginning"),
}
_ANSWERED: frozenset[Form] = frozenset(("question", "chat"))  # the answer's beginning is the model's own


@dataclass(frozen=True)
class Fact:
    """What is told of one thing, as the text states it and as a reader asks for it."""

    thing: str
    before: str  # what the statement says before the value
    value: str
    after: str  # and after it
    question: str
    lead: str  # how the answer begins: a full sentence, up to the value
    form: Form = "question"
    gap: str = " "  # between the two, in the text
    continues: bool = False  # a list: the fact before is a line of it, too
    holds: bool = True  # no later line of the list tells another value of the thing

    @property
    def statement(self) -> str:
        """One or more whole sentences, or lines of a list."""
        return f"{self.before}{self.gap}{self.value}{self.after}"

    @property
    def prompt(self) -> str:
        """What is put to the model; the answer follows. Of a chat it is what the user says."""
        match self.form:
            case "question":
                return prompt(self.question)
            case "sentence":
                return f"\n{self.question} {self.lead}"
            case "beginning":
                return f"\n\n{self.lead}"
            case "chat":
                return self.question

    @property
    def answer_lead(self) -> str:
        """What a full answer says before the value."""
        return self.lead if self.form in _ANSWERED else ""

    def is_answered_by(self, text: str) -> bool:
        """Exact match; see `gives`."""
        return gives(text, self.value)


def gives(answer: str, value: str) -> bool:
    """Whether an answer gives this value to the letter: a number must be its first, others stand in its first line.

    What is longer by a word, a number or a letter that is joined to it ("saffron-brown", "1,230 miles") is another one.
    """
    if value.isdigit():
        return first_number(answer) == value
    line = answer.strip().partition("\n")[0]
    return re.search(rf"(?<!\w)(?<!\w[-,.:]){re.escape(value)}(?!\w|[-,.:]\w)", line) is not None


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
    return sorted(word for word, count in counts.items() if count >= _NOT_RARE and word not in LISTED_WORDS)


def make_facts(count: int, rng: random.Random) -> list[Fact]:
    """`count` plain facts of the test split: seven-digit numbers of things that are all different.

    Their words are of the test split, their sentences are among those that the memory was trained on.
    """
    return [_plain_fact(thing, rng) for thing in _test_things(count, rng)]


def make_varied_facts(count: int, rng: random.Random) -> list[Fact]:
    """`count` facts of the test split, of all kinds: things, values and sentences are new to the memory."""
    source, facts = Source("test", WORDS["test"]), dict[str, Fact]()
    for thing in _test_things(count, rng):
        kind = rng.choice(_kinds("test"))
        while (fact := _fact(thing, kind, source, rng)).value in facts:
            pass  # two things with one value would make a wrong answer right
        facts[fact.value] = fact
    return list(facts.values())


def make_keys(count: int, rng: random.Random) -> list[str]:
    """`count` keys of the test split, an adjective and a noun each, all different.

    No word comes twice before every word has come once.
    """
    adjectives, nouns = (rng.sample(lists["test"], len(lists["test"])) for lists in (ADJECTIVES, NOUNS))
    assert count <= NUM_THINGS
    turns = ((i, (i + i // len(adjectives)) % len(nouns)) for i in range(count))
    return [f"{adjectives[i % len(adjectives)]}-{nouns[j]}" for i, j in turns]


def fewest_words(count: int) -> int:
    """How many words `make_families` needs for `count` facts, without the lists: any two of them make a thing."""
    return max(_FAMILY, math.ceil(math.sqrt(count)))


def make_families(count: int, rng: random.Random, words: Sequence[str], *, listed: bool = True) -> list[Fact]:
    """`count` facts for training, about things that are all different, in families of four that are easily confused.

    Besides these there are those that no longer hold.

    In a family all things share a word, and half of them what is told of them. Half the families are of the
    training split's lists, where `listed`; all others are of two of `words`. Values that are words are of `words`.
    Some facts are plain ones. Some families are lists (`titans.evaluation.listing`), longer or shorter.
    """
    lists = ADJECTIVES["train"], NOUNS["train"]
    num_things = len(words) ** 2 + (len(lists[0]) * len(lists[1]) if listed else 0)
    assert len(words) >= _FAMILY and count <= num_things
    source = Source("train", words)
    seen: set[tuple[str, str]] = set()
    facts: list[Fact] = []
    left = count
    while left > 0:
        first, second = lists if listed and rng.random() < 0.5 else (words, words)
        if rng.random() < _AS_LISTS:
            things = [thing for thing in _listed_things(first, second, rng) if thing not in seen]
            seen.update(things)
            facts += _list(things, source, rng)
            left -= len(things)
            continue
        if rng.random() < 0.5:
            things = list(itertools.product([rng.choice(first)], rng.sample(second, _FAMILY)))
        else:
            things = list(itertools.product(rng.sample(first, _FAMILY), [rng.choice(second)]))
        kind = rng.choice(_kinds("train"))
        common = replace(kind, attributes=(rng.choice(kind.attributes),))
        for thing in things:
            if thing not in seen:
                left -= 1
                kind = common if rng.random() < 0.5 else rng.choice(_kinds("train"))
                facts.append(_plain_fact(thing, rng) if rng.random() < _PLAIN else _fact(thing, kind, source, rng))
        seen.update(things)
    ends = [i for i, fact in enumerate(facts, 1) if fact.holds]
    known = facts[: ends[count - 1]]
    told = {fact.thing for fact in known if fact.holds}  # the last list may be cut before what replaces a line
    return [fact for fact in known if fact.thing in told]


def _kinds(split: Split) -> list[Kind]:
    """Each as often as its share says."""
    return [kind for kind in KINDS.values() for _ in range(kind.taught if split == "train" else kind.tested)]


def _test_things(count: int, rng: random.Random) -> list[tuple[str, str]]:
    things = rng.sample(sorted(itertools.product(ADJECTIVES["test"], NOUNS["test"])), count)
    rng.shuffle(things)
    return things


def _plain_fact(words: tuple[str, str], rng: random.Random) -> Fact:
    names = {"a": rng.choice(KINDS["number"].attributes), "t": " ".join(words)}
    value = str(rng.randrange(1_000_000, 10_000_000))
    asking = ASKINGS["train"][0]
    before = rng.choice(STATEMENTS["train"][:_PLAIN_STATEMENTS]).format(**names)
    return Fact(names["t"], before, value, ".", asking.question.format(**names), asking.lead.format(**names))


def _fact(words: tuple[str, str], kind: Kind, source: Source, rng: random.Random) -> Fact:
    names = {"a": rng.choice(kind.attributes), "t": rng.choice((" ", " ", "-")).join(words)}
    asking = an_asking(source.split, rng)
    fact = Fact(
        thing=names["t"],
        before=a_statement(source.split, rng).format(**names),
        value=kind.make(source, rng),
        after=rng.choice(ENDINGS[source.split]),
        question=asking.question.format(**names),
        lead=asking.lead.format(**names),
        form=rng.choice(_FORMS[source.split]),
    )
    if source.split == "train" and fact.form in _ANSWERED:
        return replace(fact, lead=FULL_ANSWER.format(**names))
    return fact


def _listed_things(first: Sequence[str], second: Sequence[str], rng: random.Random) -> list[tuple[str, str]]:
    """Things of one list: all of them share a word, or none do."""
    count = min(rng.choice(_LINES), len(first), len(second))
    firsts, seconds = rng.sample(first, count), rng.sample(second, count)
    match rng.randrange(3):
        case 0:
            firsts = firsts[:1] * count
        case 1:
            seconds = seconds[:1] * count
    return list(zip(firsts, seconds, strict=True))


def _list(things: Sequence[tuple[str, str]], source: Source, rng: random.Random) -> list[Fact]:
    """A fact of each thing, in one list; in some lists, as in logs, what is told of a thing has changed before."""
    kind, join = rng.choice(_kinds(source.split)), rng.choice((" ", " ", "-"))
    attribute = rng.choice(kind.attributes)
    most = max(1, min(rng.choice(_TOLD), _MOST_TOLD // max(1, len(things))))
    names = [join.join(thing) for thing in things for _ in range(rng.randint(1, most))]
    rng.shuffle(names)
    told = [(name, kind.make(source, rng)) for name in names]
    layouts = [
        layout for layout in LAYOUTS[source.split] if layout.spaced or all(value[0].isdigit() for _, value in told)
    ]
    lines = write_list(rng.choice(layouts), attribute, told, rng)
    return [_of_line(line, attribute, source.split, rng, first=i == 0) for i, line in enumerate(lines)]


def _of_line(line: Line, attribute: str, split: Split, rng: random.Random, *, first: bool) -> Fact:
    names, asking, form = {"a": attribute, "t": line.thing}, an_asking(split, rng), rng.choice(_FORMS[split])
    lead = FULL_ANSWER if split == "train" and form in _ANSWERED else asking.lead
    return Fact(
        thing=line.thing,
        before=line.before,
        value=line.value,
        after=line.after,
        question=asking.question.format(**names),
        lead=lead.format(**names),
        form=form,
        gap=line.gap,
        continues=not first,
        holds=line.holds,
    )


def plant(text: str, facts: list[Fact]) -> str:
    """The text with one fact after a sentence near the middle of each of `len(facts)` equal parts."""
    size = len(text) / len(facts)
    bounds = [int(i * size) for i in range(len(facts) + 1)]
    middles = [start + (stop - start) // 2 for start, stop in itertools.pairwise(bounds)]
    return insert(text, [fact.statement for fact in facts], middles)


@dataclass(frozen=True)
class FactsTask:
    """Facts of the test split: plain ones, or, `varied`, of all kinds and in sentences new to the memory."""

    haystack: Haystack
    varied: bool = False

    @property
    def name(self) -> str:
        """As the command line has it."""
        return "varied" if self.varied else "facts"

    @property
    def max_tokens(self) -> int:
        """Room for a sentence and a value."""
        return 64 if self.varied else 32

    @cached_property
    def cost(self) -> float:
        """Tokens of a statement, about."""
        facts = self._make(_SAMPLE, random.Random(0))
        return self.haystack.count(" ".join(fact.statement for fact in facts)) / len(facts)

    def most_questions(self, num_tokens: int) -> int:
        """See `Task`."""
        return min(most_in(num_tokens, self.cost, self.name), NUM_THINGS // 2)

    def make(self, num_tokens: int, num_questions: int, place: float, rng: random.Random) -> Exam:
        """See `Task`."""
        facts = self._make(2 * num_questions, rng)
        planted, absent = facts[:num_questions], facts[num_questions:]
        text = self.haystack.cut(num_tokens - num_questions * self.cost, place)
        statements = [fact.statement for fact in planted]
        document = insert(text, statements, spread(text, num_questions, place), self.haystack.end)
        depths = [document.index(statement) / len(document) for statement in statements]
        questions = (Question(f.prompt, (f.value,), (depth,)) for f, depth in zip(planted, depths, strict=True))
        return Exam(document, tuple(questions), tuple(Question(fact.prompt, ()) for fact in absent))

    def grade(self, question: Question, answer: str) -> Grade:
        """Right if the answer gives the fact's value."""
        right = gives(answer, question.values[0])
        return Grade(right, float(right))

    def claims(self, answer: str) -> bool:
        """See `Task`. A varied value may be any words: it is claimed unless the answer says that it is not known."""
        return _DECLINED.search(answer) is None if self.varied else bool(NUMBER.findall(answer))

    def repeats(self, answer: str, exam: Exam) -> bool:
        """See `Task`."""
        if self.varied:
            return any(gives(answer, value) for question in exam.questions for value in question.values)
        return not {*NUMBER.findall(answer)}.isdisjoint(NUMBER.findall(exam.document))

    def _make(self, count: int, rng: random.Random) -> list[Fact]:
        return (make_varied_facts if self.varied else make_facts)(count, rng)


@dataclass(frozen=True)
class JudgedAsFacts:
    """What a task is made of whose answers are judged as those of plain facts are."""

    facts: FactsTask

    @property
    def max_tokens(self) -> int:
        """See `Task`."""
        return self.facts.max_tokens

    def grade(self, question: Question, answer: str) -> Grade:
        """See `FactsTask`."""
        return self.facts.grade(question, answer)

    def claims(self, answer: str) -> bool:
        """See `Task`."""
        return self.facts.claims(answer)

    def repeats(self, answer: str, exam: Exam) -> bool:
        """See `Task`."""
        return self.facts.repeats(answer, exam)
