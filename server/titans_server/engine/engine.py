"""The engine: a worker on each device, and the asyncio side's way to them. Asyncio submits and waits."""

import asyncio
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from titans.sampling import Drawn, SamplingParams
from titans.state import State

from titans_server.engine.mailbox import Answer, Mailbox
from titans_server.engine.request import Finish, Generation, Ingestion, Read
from titans_server.engine.runner import Runner
from titans_server.engine.worker import Worker
from titans_server.errors import Overloaded
from titans_server.observer import Answering, Observer


class Engine:
    """States in, states and tokens out, for many sessions at once."""

    def __init__(
        self,
        runners: Sequence[Runner],
        *,
        ends: Collection[int],
        max_running: int = 64,
        max_requests: int = 256,
        portion_seconds: float = 0.1,
        observer: Observer | None = None,
    ) -> None:
        """`runners`: one a device, all of one model. A session stays on the device where its state is.

        `ends`: the end-of-text tokens, any of which ends an answer.
        `max_running`: answers decoded together, on each; `max_requests`: admitted at once, others are refused, and so
        many places for work of several requests, each of which has at most one under way.
        `portion_seconds`: how long reading is to hold up the answers under way, as far as it comes in portions.
        """
        self._runners = runners
        self._mailbox: Mailbox | None = None  # of the event loop that asked last
        self._max_requests = max_requests
        self._num_places = 0  # that are taken
        self._workers = [
            Worker(
                runner,
                ends=ends,
                max_running=max_running,
                portion_seconds=portion_seconds,
                observer=observer or Observer(),
            )
            for runner in runners
        ]

    def start(self) -> None:
        """Start to compute."""
        for worker in self._workers:
            worker.start()

    async def close(self) -> None:
        """Refuse new work, end what is left with ShuttingDown, and wait for the workers."""
        for worker in self._workers:
            worker.close()
        for worker in self._workers:
            await asyncio.to_thread(worker.join)

    def is_alive(self) -> bool:
        """Whether work is still being done, on every device."""
        return all(worker.is_alive() for worker in self._workers)

    @property
    def max_requests(self) -> int:
        """Admitted at once."""
        return self._max_requests

    @property
    def num_requests(self) -> int:
        """Everything admitted and not yet ended."""
        return sum(worker.num_requests for worker in self._workers)

    @property
    def num_running(self) -> int:
        """Answers being made."""
        return sum(worker.num_running for worker in self._workers)

    @property
    def num_waiting(self) -> int:
        """Answers whose prompt is not read yet."""
        return sum(worker.num_waiting for worker in self._workers)

    @property
    def num_ingesting(self) -> int:
        """Strides of documents under way."""
        return sum(worker.num_ingesting for worker in self._workers)

    @property
    def window(self) -> int:
        """Tokens of one chunk of a document."""
        return self._runners[0].window

    @property
    def largest_block(self) -> int:
        """Tokens of a document that it reads at once at most: whole windows."""
        return self._runners[0].largest_block

    def new_state(self) -> State:
        """A session that has read nothing. Where there are several devices it is on none of them."""
        state = self._runners[0].new_state()
        return state if len(self._runners) == 1 else state.to("cpu")

    async def place(self, state: State) -> State:
        """A state that is on none of the devices, on one of them; any other as it is."""
        worker = self._worker_for(state)
        return state if state.position.device == worker.device else await asyncio.to_thread(state.to, worker.device)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place for a document, or an answer that is learnt: what it asks for inside, `admitted`, is not refused.

        It does not count among others' requests while it asks for nothing: its client may be slow. Raises Overloaded.
        """
        self._check(max(self._num_places, self.num_requests))
        self._num_places += 1
        try:
            yield
        finally:
            self._num_places -= 1

    async def ingest(self, state: State, tokens: list[int], *, urgent: bool = False, admitted: bool = False) -> State:
        """The state after reading `tokens`. Cancelling stops it at the next block; `state` is never changed.

        `urgent`: an answer waits for it, so that it goes before documents. Raises Overloaded, unless `admitted`, and
        ShuttingDown.
        """
        request = Ingestion(state, tokens, int(state.position), urgent=urgent)
        self._submit(request, admitted=admitted)
        return await asyncio.wrap_future(request.done)

    async def generate(
        self,
        state: State,
        prompt: list[int],
        *,
        max_tokens: int,
        sampling: SamplingParams,
        recall: bool = True,
        echo: bool = False,
        admitted: bool = False,
        telling: Answering | None = None,
    ) -> AsyncGenerator[Read | Drawn | Finish, None]:
        """Tokens that follow `prompt`, then how it ended. Closing the iterator stops it within a step.

        The end-of-text token is not among them. `echo`: the prompt's tokens come before, and
        the end-of-text token as one of them at the end. `telling` hears how much of the prompt was read, closed or not.
        Raises Overloaded, unless `admitted`, and ShuttingDown.
        """
        telling = telling or Answering()
        loop, answers = asyncio.get_running_loop(), asyncio.Queue[Answer]()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        request = Generation(state, prompt, max_tokens, sampling, recall, partial(self._mailbox.send, answers), echo)
        self._submit(request, admitted=admitted)
        try:
            while True:
                answer = await answers.get()
                telling.read(request.num_read)
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
                if isinstance(answer, str):
                    return
        finally:
            request.cancelled = True
            telling.read(request.num_read)

    def _check(self, num_taken: int) -> None:
        if num_taken >= self._max_requests:
            raise Overloaded(f"{self._max_requests} requests are under way already")

    def _submit(self, request: Generation | Ingestion, *, admitted: bool) -> None:
        if not admitted:
            self._check(self.num_requests)
        self._worker_for(request.state).submit(request)

    def _worker_for(self, state: State) -> Worker:
        """The one with least to do, of those on the state's device; of all where it is on none."""
        there = [worker for worker in self._workers if worker.device == state.position.device]
        chosen = min(there or self._workers, key=lambda worker: (worker.num_requests, worker.num_chosen))
        chosen.num_chosen += 1
        return chosen
