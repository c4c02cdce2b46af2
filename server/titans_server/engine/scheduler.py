"""What the next step computes. No torch here: decisions can be tested without a model.

Answers come first: every running one gets a token a step. Beside them a step does one thing more, and for no longer
than they may be held up, as far as that can be foretold from how long the last ones took:

- read a portion of a waiting prompt and, where that is all of it, those behind it that fit as well, or open its
  session; or
- read a portion of a document, but only when answers have had as much time since as documents last took. So a document
  takes half of an answer's speed, however long it is and however many there are; and documents have the other half.

While no answer is made, documents get whole windows, several documents at once; few of them get several windows each,
where that is faster.

Whoever had a portion of a document goes to the back of the line; what an answer waits for goes before all others.
Portions end on the boundaries of the memory's chunks, or with the document: a chunk is never split.
"""

import itertools
import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from titans_server.engine.request import Generation, Ingestion
from titans_server.observer import Computed

_LEAST_OF_PROMPT = 16  # tokens


@dataclass(frozen=True)
class Step:
    """The work of one step."""

    decode: list[Generation]  # one token each
    prefill: list[tuple[Generation, int]]  # and how many tokens of its prompt; several only where it is all of each
    ingest: list[tuple[Ingestion, int]]  # and how many tokens of its document
    seconds: float  # that prefill may take, where it has a choice

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill or self.ingest)


class Portion:
    """How many tokens are read at once where others wait: as many as the time allows, going by the last ones."""

    def __init__(self, size: int, least: int, most: int, seconds: float) -> None:
        """`size`: to begin with; `least` and `most`: tokens, whatever they take; `seconds`: the aim."""
        self.size = size
        self._least, self._most, self._seconds = least, most, seconds

    def took(self, num_tokens: int, seconds: float) -> None:
        """So many tokens took so long. A few tell nothing of many: a call has its own price."""
        if num_tokens >= self.size // 2 and seconds > 0:
            fitting = int(num_tokens * self._seconds / seconds)
            self.size = max(self._least, min((self.size + fitting + 1) // 2, self._most))


class Scheduler:
    """Holds every request from submission to its end. Owned by the compute thread."""

    def __init__(
        self,
        *,
        window: int,
        chunk: int,
        max_running: int,
        largest_block: int,
        ingest_budget: int,
        portion_seconds: float,
    ) -> None:
        """`window` and `chunk`: the most tokens of a portion, and what one of a document is a multiple of.

        `largest_block`: tokens of each document a step while no answer is made, if that fits for all; else a window.
        `ingest_budget`: tokens of documents a step, padding counted, while no answer is made; a window or more.
        `portion_seconds`: how long a portion is to take at most where answers wait for their next tokens meanwhile.
        """
        self._window = window
        self._chunk = chunk
        self._max_running = max_running
        self._largest_block = largest_block
        self._ingest_budget = ingest_budget
        self._portion_seconds = portion_seconds
        self._of_prompt = Portion(chunk, min(_LEAST_OF_PROMPT, chunk), window, portion_seconds)
        self._of_document = Portion(chunk, chunk, window, portion_seconds)
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._ingesting: tuple[deque[Ingestion], deque[Ingestion]] = (deque(), deque())  # urgent ones, others
        self._owed = 0.0  # seconds that documents had and answers have not had since

    def __len__(self) -> int:
        return self.num_waiting + self.num_running + self.num_ingesting

    @property
    def num_waiting(self) -> int:
        """Answers whose prompt is not read yet. Like the other two, any thread may ask."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Answers being made."""
        return len(self._running)

    @property
    def num_ingesting(self) -> int:
        """Pieces of documents under way."""
        return sum(map(len, self._ingesting))

    def add(self, request: Generation | Ingestion) -> None:
        """Take a request in."""
        if isinstance(request, Generation):
            self._waiting.append(request)
        else:
            self._line(request).append(request)

    def cancelled(self) -> list[Generation | Ingestion]:
        """What nobody waits for any more."""
        return [request for request in self.all_requests() if request.cancelled]

    def next_step(self) -> Step:
        """Decide."""
        if not self._running and not self._waiting:
            self._owed = 0.0
            fits = self.num_ingesting * self._largest_block <= self._ingest_budget
            size = self._largest_block if fits else self._window
            return Step([], [], self._blocks(size, self._ingest_budget), math.inf)
        if self.num_ingesting and self._owed <= 0:
            size = self._of_document.size // self._chunk * self._chunk
            return Step(list(self._running), [], self._blocks(size, size), self._portion_seconds)
        size, seconds = (self._of_prompt.size, self._portion_seconds) if self._running else (self._window, math.inf)
        return Step(list(self._running), self._prompts(size), [], seconds)

    def spent(self, kind: Computed, num_tokens: int, seconds: float) -> None:
        """A part of the step has taken this long, and read or made so many tokens, padding counted."""
        self._owed = max(self._owed + (seconds if kind == "ingest" else -seconds), 0.0)
        if kind != "decode":
            (self._of_document if kind == "ingest" else self._of_prompt).took(num_tokens, seconds)

    def prompt_read(self, request: Generation) -> None:
        """A waiting request's prompt is read to the end: it runs from now on."""
        self._waiting.remove(request)
        self._running.append(request)

    def finish(self, request: Generation | Ingestion) -> bool:
        """A request has ended, one way or another. False: it had before."""
        lines: list[Any] = [self._line(request)] if isinstance(request, Ingestion) else [self._waiting, self._running]
        for line in lines:
            if request in line:
                line.remove(request)
                return True
        return False

    def all_requests(self) -> list[Generation | Ingestion]:
        """Everything not yet ended."""
        return [*self._waiting, *self._running, *self._ingesting[0], *self._ingesting[1]]

    def _line(self, request: Ingestion) -> deque[Ingestion]:
        return self._ingesting[0 if request.urgent else 1]

    def _prompts(self, size: int) -> list[tuple[Generation, int]]:
        """A portion of the first prompt in line; where that is all of it, the next ones too, while they fit whole.

        They are read side by side, so each takes as many tokens as the longest.
        """
        chosen: list[tuple[Generation, int]] = []
        longest = 0
        for request in itertools.islice(self._waiting, self._max_running - len(self._running)):
            left = len(request.prompt) - request.num_read
            longest = max(longest, left)
            if chosen and longest * (len(chosen) + 1) > size:
                break
            chosen.append((request, min(left, size)))
        return chosen

    def _blocks(self, size: int, budget: int) -> list[tuple[Ingestion, int]]:
        """The next block of one document or more, as many as fit in the budget side by side."""
        chosen: list[tuple[Ingestion, int]] = []
        longest = 0
        for line in self._ingesting:
            num_before = len(chosen)
            for request in line:
                tokens = request.next_block(size, min(size, self._window))
                longest = max(longest, tokens)
                if chosen and longest * (len(chosen) + 1) > budget:
                    break
                chosen.append((request, tokens))
            line.rotate(num_before - len(chosen))
            if len(chosen) - num_before < len(line):
                break
        return chosen
