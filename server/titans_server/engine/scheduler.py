"""What the next step computes. No torch here: decisions can be tested without a model.

Every running answer gets one token a step. What is left of the step goes to one block of one waiting prompt and to
chunks of documents, in turn; so a long document or prompt costs the others one block's time, never more.
"""

from collections import deque
from dataclasses import dataclass

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

    def __init__(self, *, window: int, max_running: int, ingest_budget: int, busy_ingest_budget: int) -> None:
        """`ingest_budget`: tokens of documents a step; `busy_ingest_budget`: the same while answers are running."""
        self._window = window
        self._max_running = max_running
        self._budgets = (ingest_budget, busy_ingest_budget)
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._ingesting: deque[Ingestion] = deque()

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
        return len(self._ingesting)

    def add(self, request: Generation | Ingestion) -> None:
        """Take a request in."""
        if isinstance(request, Generation):
            self._waiting.append(request)
        else:
            self._ingesting.append(request)

    def cancelled(self) -> list[Generation | Ingestion]:
        """What nobody waits for any more."""
        return [request for request in self.all_requests() if request.cancelled]

    def next_step(self) -> Step:
        """Decide."""
        prefill = []
        if self._waiting and len(self._running) < self._max_running:
            request = self._waiting[0]
            prefill.append((request, min(self._window, len(request.prompt) - request.num_read)))
        return Step(list(self._running), prefill, self._chunks(busy=bool(self._running or prefill)))

    def prompt_read(self, request: Generation) -> None:
        """A waiting request's prompt is read to the end: it runs from now on."""
        self._waiting.remove(request)
        self._running.append(request)

    def finish(self, request: Generation | Ingestion) -> None:
        """A request has ended, one way or another."""
        queues = (self._waiting, self._running) if isinstance(request, Generation) else (self._ingesting,)
        for queue in queues:
            if request in queue:
                queue.remove(request)  # type: ignore[arg-type]

    def all_requests(self) -> list[Generation | Ingestion]:
        """Everything not yet ended."""
        return [*self._waiting, *self._running, *self._ingesting]

    def _chunks(self, *, busy: bool) -> list[tuple[Ingestion, int]]:
        """The next chunks of documents, at least one where there are any; whoever had a turn goes to the back."""
        budget = self._budgets[busy]
        chosen: list[tuple[Ingestion, int]] = []
        for request in list(self._ingesting):
            size = request.next_chunk(self._window)
            if chosen and size > budget:
                break
            chosen.append((request, size))
            budget -= size
        self._ingesting.rotate(-len(chosen))
        return chosen
