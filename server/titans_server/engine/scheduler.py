"""What the next step computes. No torch here: decisions can be tested without a model.

Answers come first. Every running one gets a token a step, and one waiting prompt a block. Documents take what is left:

- While answers are made, one small block a step, and only when answers have had as much time since as documents last
  took. So a document costs an answer no more than a block between two tokens and half of its speed, however long the
  document is and however many there are; and the documents have the other half.
- While none is made, whole windows of several documents at once.

Whoever had a block goes to the back of the line; what an answer waits for goes before all other documents. Blocks end
on the boundaries of the memory's chunks, or with the document: a chunk is never split.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

from titans_server.engine.request import Generation, Ingestion


@dataclass(frozen=True)
class Step:
    """The work of one step."""

    decode: list[Generation]  # one token each
    prefill: list[tuple[Generation, int]]  # and how many tokens of its prompt
    ingest: list[tuple[Ingestion, int]]  # and how many tokens of its document

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill or self.ingest)


class Scheduler:
    """Holds every request from submission to its end. Owned by the compute thread."""

    def __init__(self, *, window: int, chunk: int, max_running: int, ingest_budget: int) -> None:
        """`window` and `chunk`: tokens of a block where nobody waits for it and where somebody does.

        `ingest_budget`: tokens of documents a step, padding counted, while no answer is made; a window or more.
        """
        self._window = window
        self._chunk = chunk
        self._max_running = max_running
        self._ingest_budget = ingest_budget
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
        block = self._chunk if self._running else self._window
        prefill = []
        if self._waiting and len(self._running) < self._max_running:
            request = self._waiting[0]
            prefill.append((request, min(block, len(request.prompt) - request.num_read)))
        if not self._running and not prefill:
            self._owed = 0.0
            return Step([], [], self._blocks(self._window, self._ingest_budget))
        ingest = self._blocks(self._chunk, self._chunk) if self._owed <= 0 else []
        return Step(list(self._running), prefill, ingest)

    def spent(self, *, on_documents: bool, seconds: float) -> None:
        """A part of the step has taken this long."""
        self._owed = max(self._owed + (seconds if on_documents else -seconds), 0.0)

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

    def _blocks(self, size: int, budget: int) -> list[tuple[Ingestion, int]]:
        """The next block of one document or more, as many as fit in the budget side by side."""
        chosen: list[tuple[Ingestion, int]] = []
        longest = 0
        for line in self._ingesting:
            num_before = len(chosen)
            for request in line:
                tokens = request.next_block(size)
                longest = max(longest, tokens)
                if chosen and longest * (len(chosen) + 1) > budget:
                    break
                chosen.append((request, tokens))
            line.rotate(num_before - len(chosen))
            if len(chosen) - num_before < len(line):
                break
        return chosen
