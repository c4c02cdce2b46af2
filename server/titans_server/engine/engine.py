"""The engine: a compute thread that owns torch, and the asyncio side's way to it.

asyncio submits and waits; the thread loops over decide (scheduler), compute (runner), record (here). The inbox is
the only thing both write, under `_wake`. The thread ends when `close` is called and the work at hand is done.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial

from titans.sampling import Drawn, SamplingParams
from titans.state import State

from titans_server.engine.request import Finish, Generation, Ingestion, Read
from titans_server.engine.runner import Runner
from titans_server.engine.scheduler import Scheduler
from titans_server.errors import Overloaded, ShuttingDown, TitansError
from titans_server.observer import Computed, Observer

log = logging.getLogger(__name__)


class Engine:
    """States in, states and tokens out, for many sessions at once."""

    def __init__(
        self,
        runner: Runner,
        *,
        eos_token: int,
        max_running: int = 64,
        max_requests: int = 256,
        portion_seconds: float = 0.1,
        observer: Observer | None = None,
    ) -> None:
        """`max_running`: answers decoded together; `max_requests`: admitted at once, others are refused.

        `portion_seconds`: how long reading is to hold up the answers under way, as far as it comes in portions.
        """
        self._runner = runner
        self._observer = observer or Observer()
        self._eos_token = eos_token
        self._max_requests = max_requests
        self._scheduler = Scheduler(
            window=runner.window,
            chunk=runner.chunk,
            max_running=max_running,
            ingest_budget=runner.ingest_budget,
            portion_seconds=portion_seconds,
        )
        self._inbox: list[Generation | Ingestion] = []
        self._num_admitted = 0
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="compute")

    def start(self) -> None:
        """Start the compute thread."""
        self._thread.start()

    async def close(self) -> None:
        """Refuse new work, end what is left with ShuttingDown, and wait for the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def is_alive(self) -> bool:
        """Whether work is still being done."""
        return self._thread.is_alive()

    @property
    def num_requests(self) -> int:
        """Everything admitted and not yet ended."""
        return self._num_admitted

    @property
    def num_running(self) -> int:
        """Answers being made."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Answers whose prompt is not read yet."""
        return self._scheduler.num_waiting

    @property
    def num_ingesting(self) -> int:
        """Strides of documents under way."""
        return self._scheduler.num_ingesting

    @property
    def window(self) -> int:
        """Tokens of one chunk of a document."""
        return self._runner.window

    def new_state(self) -> State:
        """A session that has read nothing."""
        return self._runner.new_state()

    async def ingest(self, state: State, tokens: list[int], *, urgent: bool = False) -> State:
        """The state after reading `tokens`. Cancelling stops it at the next block; `state` is never changed.

        `urgent`: an answer waits for it, so that it goes before documents. Raises Overloaded, ShuttingDown.
        """
        request = Ingestion(state, tokens, int(state.position), urgent=urgent)
        self._submit(request)
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
    ) -> AsyncGenerator[Read | Drawn | Finish, None]:
        """Tokens that follow `prompt`, then how it ended. Closing the iterator stops it within a step.

        The end-of-text token is not among them. `echo`: the prompt's tokens come before, and
        the end-of-text token as one of them at the end. Raises Overloaded, ShuttingDown.
        """
        loop = asyncio.get_running_loop()
        answers: asyncio.Queue[Read | Drawn | Finish | BaseException] = asyncio.Queue()

        def emit(answer: Read | Drawn | Finish | BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(answers.put_nowait, answer)

        request = Generation(state, prompt, max_tokens, sampling, recall, emit, echo)
        self._submit(request)
        try:
            while True:
                answer = await answers.get()
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
                if isinstance(answer, str):
                    return
        finally:
            request.cancelled = True

    def _submit(self, request: Generation | Ingestion) -> None:
        with self._wake:
            if self._closing:
                raise ShuttingDown("the server is shutting down")
            if self._num_admitted >= self._max_requests:
                raise Overloaded(f"{self._max_requests} requests are under way already")
            self._num_admitted += 1
            self._inbox.append(request)
            self._wake.notify()

    def _run(self) -> None:
        while self._take_in():
            for request in self._scheduler.cancelled():
                self._end(request)
            step = self._scheduler.next_step()
            self._guard("decode", step.decode, partial(self._decode, step.decode))
            for request, size in step.prefill:
                self._guard("prefill", [request], partial(self._prefill, request, size, step.seconds))
            self._guard("ingest", [request for request, _ in step.ingest], partial(self._ingest, step.ingest))
        for request in self._scheduler.all_requests():
            self._fail(request, ShuttingDown("the server is shutting down"))

    def _take_in(self) -> bool:
        """Wait for work; False when the engine is closing."""
        with self._wake:
            while not (self._inbox or len(self._scheduler) or self._closing):
                self._wake.wait()
            for request in self._inbox:
                self._scheduler.add(request)
            self._inbox.clear()
            return not self._closing

    def _guard(self, kind: Computed, requests: Sequence[Ingestion | Generation], compute: Callable[[], int]) -> None:
        """A fault in a batch ends the batch's requests, not the engine. `compute` returns how many tokens it was."""
        if not requests:
            return
        started = time.perf_counter()
        try:
            num_tokens = compute()
            seconds = time.perf_counter() - started
            self._scheduler.spent(kind, num_tokens, seconds)
            self._observer.computed(kind, seconds)
        except Exception:
            log.exception("a step failed")
            for request in requests:
                self._fail(request, TitansError("the model failed on this request"))

    def _ingest(self, chunks: list[tuple[Ingestion, int]]) -> int:
        self._runner.ingest(chunks)
        for request, _ in chunks:
            if request.num_done == len(request.tokens):
                self._observer.surprised(self._runner.surprise(request))
                self._end(request)
                if request.done.set_running_or_notify_cancel():
                    request.done.set_result(request.state)
        return len(chunks) * max(size for _, size in chunks)

    def _prefill(self, request: Generation, size: int, seconds: float) -> int:
        before = request.num_read
        read, drawn = self._runner.prefill(request, size, seconds)
        for token in read:
            request.emit(Read(token))
        if drawn is not None:
            self._scheduler.prompt_read(request)
            if request.max_tokens:
                self._record(request, drawn)
            else:
                self._finish(request, "length")
        return request.num_read - before

    def _decode(self, requests: list[Generation]) -> int:
        for request, drawn in self._runner.decode(requests).items():
            self._record(request, drawn)
        return len(requests)

    def _record(self, request: Generation, drawn: Drawn) -> None:
        request.num_generated += 1
        if drawn.token == self._eos_token:
            if request.echo:
                request.emit(Read(drawn))
            self._finish(request, "stop")
            return
        request.emit(drawn)
        if request.num_generated == request.max_tokens:
            self._finish(request, "length")

    def _finish(self, request: Generation, answer: Finish | BaseException) -> None:
        if self._end(request):
            request.emit(answer)

    def _fail(self, request: Generation | Ingestion, error: TitansError) -> None:
        if isinstance(request, Generation):
            self._finish(request, error)
        elif self._end(request) and request.done.set_running_or_notify_cancel():
            request.done.set_exception(error)

    def _end(self, request: Generation | Ingestion) -> bool:
        """Let go of a request: its place in line, its stream, its admission. False: that has been done."""
        if not self._scheduler.finish(request):
            return False
        if isinstance(request, Generation):
            self._runner.forget(request)
        with self._wake:
            self._num_admitted -= 1
        return True
