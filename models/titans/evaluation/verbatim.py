"""Verbatim recall: go on with a passage that was read long ago, from its first words."""

import random
import re
from dataclasses import dataclass

from titans.evaluation.haystack import Haystack
from titans.evaluation.task import EvaluationError, Exam, Grade, Question, most_in

LEAD = 12  # words of the passage that are given
REST = 16  # words that are compared
ENOUGH = 5  # of them, all in order: right

_WORD = re.compile(r"[^\S\n]*(\S+)")  # on the same line
_CHARACTERS = 10  # of a word at most, on average, in a passage
_DEEPEST = 0.9  # a passage is not begun where the document may end before it


@dataclass(frozen=True)
class VerbatimTask:
    """Passages of the text as it is; nothing is planted in it."""

    haystack: Haystack
    name: str = "verbatim"
    max_tokens: int = 4 * REST

    def most_questions(self, num_tokens: int) -> int:
        """See `Task`. The text must be as long as the document: a passage that comes twice is another task."""
        if num_tokens > self.haystack.num_tokens:
            has = f"the text has about {self.haystack.num_tokens:,}"
            raise EvaluationError(f"{self.name} cannot repeat a text to fill {num_tokens:,} tokens: {has}")
        cost = (LEAD + REST) * _CHARACTERS / self.haystack.characters_per_token
        return most_in(num_tokens, cost, self.name)

    def make(self, num_tokens: int, num_questions: int, place: float, rng: random.Random) -> Exam:
        """See `Task`."""
        document = self.haystack.cut(num_tokens, place)
        size, questions, last = len(document) / num_questions, [], 0
        for i in range(num_questions):
            start, words = _passage(document, max(last, int((i + place) * _DEEPEST * size)), self.haystack.end)
            prompt, last = document[start : words[LEAD - 1].end()], words[-1].end()
            values = tuple(word[1] for word in words[LEAD:])
            questions.append(Question(f"\n\n{prompt}", values, (start / len(document),)))
        return Exam(document, tuple(questions))

    def grade(self, question: Question, answer: str) -> Grade:
        """Right if the first words are the passage's; the share is that of the words up to the first other one."""
        words, num_right = answer.split(), 0
        while num_right < min(len(words), REST) and words[num_right] == question.values[num_right]:
            num_right += 1
        return Grade(num_right >= ENOUGH, num_right / REST)

    def claims(self, answer: str) -> bool:
        """See `Task`. It asks for nothing that is not there."""
        return False

    def repeats(self, answer: str, exam: Exam) -> bool:
        """See `Task`."""
        return False


def _passage(document: str, start: int, end: str) -> tuple[int, list[re.Match[str]]]:
    """Where a passage begins at or after `start`, once round, and its words: a line's, unlike all else there."""
    for begin in (start, 0):
        while (begin := document.find(end, begin) + len(end)) >= len(end):
            words: list[re.Match[str]] = []
            while len(words) < LEAD + REST:
                word = _WORD.match(document, words[-1].end() if words else begin)
                if word is None:
                    break
                words.append(word)
            else:
                if document.count(document[begin : words[LEAD - 1].end()]) == 1:
                    return begin, words
    raise EvaluationError(f"the text has no line of {LEAD + REST} words that it has only once")
