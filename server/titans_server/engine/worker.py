"""A compute thread that owns torch on one device: it loops over decide (scheduler), compute (runner), record (here).

The inbox is all that it shares with the asyncio side, under `_wake`. The thread ends when `close` is called and the
work at hand is done, or when not even a fault can be dealt with; whoever is left then is told.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from titans.sampling import Drawn

from titans_server.engine.request import Finish, Generation, Ingestion, Read, StepFailed
from titans_server.engine.runner import Runner
from titans_server.engine.scheduler import Scheduler
from titans_server.errors import ShuttingDown, TitansError
from titans_server.observer import Computed, Observer

log = logging.getLogger(__name__)

_IDLE_SECONDS = 0.05  # without work, before spare work is done: a document's next portion may be on its way


class Worker:
    """Requests in, each of which is answered in its own way."""

    def __init__(
        self, runner: Runner, *, ends: Collection[int], max_running: int, portion_seconds: float, observer: Observer
    ) -> None:
        """As `Engine` has them."""
        self.num_chosen = 0  # over others; asyncio's to count
        self._runner = runner
        self._observer = observer
        self._ends = ends
        runner.make_room(max_running)
        self._scheduler = Scheduler(
            window=runner.window,
            chunk=runner.chunk,
            max_running=max_running,
            largest_block=runner.largest_block,
            ingest_budget=runner.ingest_budget,
            portion_seconds=portion_seconds,
        )
        self._inbox: list[Generation | Ingestion] = []
        self._num_requests = 0
        self._closing = False
        self._is_idle = False  # there was nothing to do for a while
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"compute on {runner.device}")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Refuse new work, and end what is left with ShuttingDown."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def join(self) -> None:
        """Wait for the thread, once it is closed."""
        if self._thread.is_alive():
            self._thread.join()

    def is_alive(self) -> bool:
        """Whether work is still being done."""
        return self._thread.is_alive()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._runner.device

    @property
    def num_requests(self) -> int:
        """Everything taken and not yet ended."""
        return self._num_requests

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

    def submit(self, request: Generation | Ingestion) -> None:
        """Take a request on. Raises ShuttingDown."""
        with self._wake:
            if self._closing:
                raise ShuttingDown("the server is shutting down")
            self._num_requests += 1
            self._inbox.append(request)
            self._wake.notify()

    def _run(self) -> None:
        if self._runner.is_native:  # torch is left with copies, for each of which it would wake its threads
            torch.set_num_threads(1)
        try:
            while self._take_in():
                if len(self._scheduler):
                    self._step()
                else:
                    self._prepare()
            self._leave(ShuttingDown("the server is shutting down"))
        except Exception:  # not even ending a request works any more: a device that is lost
            log.exception("the thread that runs the model ends")
            self._leave(ShuttingDown("the thread that runs the model has ended; the server's log says why"))

    def _leave(self, error: TitansError) -> None:
        """Refuse new work, and end what is left."""
        with self._wake:
            self._closing = True
            left = [*self._scheduler.all_requests(), *self._inbox]
            self._inbox.clear()
        for request in left:
            self._scheduler.finish(request)
            _tell(request, error)
        self._num_requests = 0

    def _take_in(self) -> bool:
        """Wait for work; False when the engine is closing. Where there is spare work, waiting ends after a while."""
        with self._wake:
            while not (self._inbox or len(self._scheduler) or self._closing):
                patience = 0.0 if self._is_idle else _IDLE_SECONDS
                if not self._wake.wait(patience if self._runner.has_spare_work else None):
                    self._is_idle = True
                    return True
            self._is_idle = False
            for request in self._inbox:
                self._scheduler.add(request)
            self._inbox.clear()
            return not self._closing

    def _step(self) -> None:
        for request in self._scheduler.cancelled():
            self._end(request)
        step = self._scheduler.next_step()
        self._guard("decode", step.decode, partial(self._decode, step.decode))
        for first, _ in step.prefill[:1]:
            if self._runner.is_open(first):
                ready = [part for part in step.prefill if self._runner.is_open(part[0])]
                self._guard("prefill", [request for request, _ in ready], partial(self._prefill, ready))
            else:
                self._guard("prefill", [first], partial(self._open, first, step.seconds))
        self._guard("ingest", [request for request, _ in step.ingest], partial(self._ingest, step.ingest))

    def _prepare(self) -> None:
        try:
            self._runner.prepare()
        except Exception:
            log.exception("preparing failed")

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
                self._fail(request, StepFailed("the model failed on this request"))

    def _ingest(self, chunks: list[tuple[Ingestion, int]]) -> int:
        self._runner.ingest(chunks)
        for request, _ in chunks:
            if request.num_done == len(request.tokens):
                self._learnt(request)
        return len(chunks) * max(size for _, size in chunks)

    def _learnt(self, request: Ingestion) -> None:
        surprise = self._runner.surprise(request)
        if not math.isfinite(surprise):  # a state that no store would give back, and of which nothing can be asked
            self._fail(request, StepFailed("learning this text has taken the memory's weights out of all bounds"))
            return
        self._observer.surprised(surprise)
        self._end(request)
        if request.done.set_running_or_notify_cancel():
            request.done.set_result(request.state)

    def _open(self, request: Generation, seconds: float) -> int:
        self._runner.open(request, seconds)
        return 0

    def _prefill(self, parts: list[tuple[Generation, int]]) -> int:
        for request, (told, first) in self._runner.prefill(parts).items():
            for token in told:
                request.emit(Read(token))
            if first is not None:
                self._scheduler.prompt_read(request)
                if request.max_tokens:
                    self._record(request, first)
                else:
                    self._finish(request, "length")
        return len(parts) * max(size for _, size in parts)

    def _decode(self, requests: list[Generation]) -> int:
        for request, drawn in self._runner.decode(requests).items():
            self._record(request, drawn)
        return len(requests)

    def _record(self, request: Generation, drawn: Drawn) -> None:
        request.num_generated += 1
        if drawn.token in self._ends:
            if request.echo:
                request.emit(Read(drawn))
            self._finish(request, "stop")
            return
        request.emit(drawn)
        if request.num_generated == request.max_tokens:
            self._finish(request, "length")

    def _finish(self, request: Generation, answer: Finish) -> None:
        if self._end(request):
            request.emit(answer)

    def _fail(self, request: Generation | Ingestion, error: TitansError) -> None:
        if self._end(request):
            _tell(request, error)

    def _end(self, request: Generation | Ingestion) -> bool:
        """Let go of a request: its place in line, its stream, its admission. False: that has been done."""
        if isinstance(request, Generation):
            self._runner.forget(request)  # first: where that fails, `_leave` finds the request
        if not self._scheduler.finish(request):
            return False
        with self._wake:
            self._num_requests -= 1
        return True


def _tell(request: Generation | Ingestion, error: TitansError) -> None:
    if isinstance(request, Generation):
        request.emit(error)
    elif request.done.set_running_or_notify_cancel():
        request.done.set_exception(error)
