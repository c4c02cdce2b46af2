"""Thousands of requests on a clock that is only counted: what must hold whoever comes and goes."""

import heapq
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from titans_server.engine.request import Generation, Ingestion
from titans_server.engine.scheduler import Scheduler, Step
from titans_server.observer import Computed

WINDOW, CHUNK, MAX_RUNNING = 256, 64, 16
Request = Generation | Ingestion
NOTHING: Any = None

DECODE, ROW, CALL, TOKEN = 0.010, 0.002, 0.020, 0.0012  # seconds: a step, each answer in it; a call, each token in it
LAYERS, LAYER = 12, 0.017  # to open a session; each of them
PORTION = 0.1  # what answers may have to wait for, about
LONGEST = DECODE + MAX_RUNNING * ROW + 1.2 * PORTION  # between two tokens of one answer


def generation(num_prompt: int, num_answer: int) -> Generation:
    return Generation(NOTHING, [0] * num_prompt, num_answer, NOTHING, True, lambda _: None)


@dataclass
class Machine:
    """Does what the scheduler says, at a price, and keeps a diary."""

    scheduler: Scheduler
    largest_block: int = WINDOW
    now: float = 0.0
    layers_left: dict[Request, int] = field(default_factory=lambda: defaultdict(lambda: LAYERS))
    tokens_at: dict[Request, list[float]] = field(default_factory=lambda: defaultdict(list))
    turns_at: dict[Request, list[float]] = field(default_factory=lambda: defaultdict(list))
    ended_at: dict[Request, float] = field(default_factory=dict)

    def step(self) -> Step:
        for request in self.scheduler.cancelled():
            self._end(request)
        step = self.scheduler.next_step()
        if step.decode:
            self._spend("decode", len(step.decode), DECODE + ROW * len(step.decode))
        for answer in step.decode:
            self._token(answer)
        if step.prefill and self._is_open(step.prefill[0][0], step.seconds):
            ready = [(answer, size) for answer, size in step.prefill if not self.layers_left[answer]]
            num_tokens = len(ready) * max(size for _, size in ready)
            self._spend("prefill", num_tokens, CALL + ROW * len(ready) + TOKEN * num_tokens)
            for answer, size in ready:
                answer.num_read += size
                if answer.num_read == len(answer.prompt):
                    self.scheduler.prompt_read(answer)
                    self._token(answer)
        if step.ingest:
            num_tokens = len(step.ingest) * max(size for _, size in step.ingest)
            self._spend("ingest", num_tokens, CALL + TOKEN * num_tokens)
        for document, size in step.ingest:
            before = document.position + document.num_done
            assert size <= (WINDOW if self.scheduler.num_running else self.largest_block)
            document.num_done += size
            if document.num_done == len(document.tokens):
                self._end(document)
            else:
                assert (before + size) % CHUNK == 0, "a chunk was split"
            self.turns_at[document].append(self.now)
        return step

    def _is_open(self, answer: Request, seconds: float) -> bool:
        """Whether it was open already; else it goes on being opened."""
        if not self.layers_left[answer]:
            return True
        done = min(self.layers_left[answer], math.ceil(min(seconds, 9.0) / LAYER))
        self.layers_left[answer] -= done
        self._spend("prefill", 0, done * LAYER)
        return False

    def _token(self, answer: Generation) -> None:
        answer.num_generated += 1
        self.tokens_at[answer].append(self.now)
        if answer.num_generated == answer.max_tokens:
            self._end(answer)

    def _end(self, request: Request) -> None:
        assert self.scheduler.finish(request)
        self.ended_at[request] = self.now

    def _spend(self, kind: Computed, num_tokens: int, seconds: float) -> None:
        self.now += seconds
        self.scheduler.spent(kind, num_tokens, seconds)


def machine(windows_at_once: int = 1, windows_a_step: int = 1) -> Machine:
    """Of a CPU, or of a GPU: documents get more at once while nobody is answered."""
    scheduler = Scheduler(
        window=WINDOW,
        chunk=CHUNK,
        max_running=MAX_RUNNING,
        largest_block=windows_at_once * WINDOW,
        ingest_budget=windows_a_step * WINDOW,
        portion_seconds=PORTION,
    )
    return Machine(scheduler, windows_at_once * WINDOW)


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(times)]


def crowd(count: int, seed: int) -> Iterator[tuple[float, Request]]:
    """Arrivals in order, about as fast as the machine can serve them, some all at once."""
    chance, now = random.Random(seed), 0.0
    for _ in range(count):
        now += chance.expovariate(1.1) if chance.random() < 0.9 else 0.0
        if chance.random() < 0.5:
            yield now, generation(int(chance.expovariate(1 / 60)) + 1, int(chance.expovariate(1 / 30)) + 1)
        else:
            size = int(chance.expovariate(1 / 600)) + 1
            yield now, Ingestion(NOTHING, [0] * size, chance.randrange(5_000), urgent=chance.random() < 0.1)


@pytest.mark.parametrize("seed", [1, 2])
def test_of_thousands_of_requests_all_are_served_and_no_answer_halts(seed: int) -> None:
    ours, arrivals = machine(), list(crowd(1_500, seed))
    waiting, chance = arrivals[::-1], random.Random(seed)
    cancelled: list[tuple[float, Request]] = []
    while waiting or len(ours.scheduler):
        if not len(ours.scheduler):
            ours.now = max(ours.now, waiting[-1][0])
        while waiting and waiting[-1][0] <= ours.now:
            ours.scheduler.add(waiting.pop()[1])
        if chance.random() < 0.01 and len(ours.scheduler):
            gone = chance.choice(ours.scheduler.all_requests())
            if isinstance(gone, Generation):
                gone.cancelled = True
            else:
                gone.done.cancel()
            cancelled.append((ours.now, gone))
        ours.step()
    assert len(ours.ended_at) == len(arrivals)
    for when, gone in cancelled:
        assert ours.ended_at[gone] == when, "what is cancelled has not one step more"
    assert max(gap for times in ours.tokens_at.values() for gap in gaps(times)) <= LONGEST
    for _, request in arrivals:
        if isinstance(request, Generation) and not request.cancelled:
            assert request.num_generated == request.max_tokens


def test_one_document_costs_an_answer_a_block_now_and_then_and_half_its_speed() -> None:
    rates = {}
    for num_documents in (0, 1, 50):
        ours, answer = machine(), generation(10, 400)
        ours.scheduler.add(answer)
        for _ in range(num_documents):
            ours.scheduler.add(Ingestion(NOTHING, [0] * 1_000_000, 0))
        while answer not in ours.ended_at:
            ours.step()
        times = ours.tokens_at[answer]
        rates[num_documents] = len(times) / (times[-1] - times[0])
        assert max(gaps(times)) <= DECODE + ROW + 1.2 * PORTION
    assert rates[1] > 0.45 * rates[0]
    assert rates[50] == pytest.approx(rates[1], rel=0.02), "fifty are no worse than one"


def test_documents_go_on_however_many_answers_are_asked_for() -> None:
    ours, document = machine(), Ingestion(NOTHING, [0] * 20_000, 0)
    ours.scheduler.add(document)
    answers = [generation(100, 20) for _ in range(2_000)]
    for answer in answers:
        ours.scheduler.add(answer)
    while document not in ours.ended_at:
        ours.step()
    assert len(ours.ended_at) < len(answers), "answers were still waiting"
    assert max(gaps(ours.turns_at[document])) <= 2 * LONGEST


def test_equal_documents_stay_side_by_side() -> None:
    ours = machine()
    documents = [Ingestion(NOTHING, [0] * 10_000, 0) for _ in range(20)]
    for document in documents:
        ours.scheduler.add(document)
    ours.scheduler.add(generation(10, 10_000))
    for _ in range(3_000):
        ours.step()
        done = [document.num_done for document in documents]
        assert max(done) - min(done) <= WINDOW


jobs = st.one_of(
    st.builds(generation, st.integers(1, 700), st.integers(1, 40)),
    st.builds(
        lambda size, position, urgent: Ingestion(NOTHING, [0] * size, position, urgent=urgent),
        st.integers(1, 3_000),
        st.integers(0, 10_000),
        st.booleans(),
    ),
)


@given(st.sampled_from([(1, 1), (4, 16)]), st.lists(st.tuples(st.integers(0, 30), jobs), min_size=1, max_size=40))
@settings(max_examples=300, deadline=None)
def test_whatever_comes_whenever_a_step_holds_to_its_bounds(
    kind: tuple[int, int], arrivals: list[tuple[int, Request]]
) -> None:
    ours, queue = machine(*kind), [(when, i, job) for i, (when, job) in enumerate(arrivals)]
    heapq.heapify(queue)
    for turn in itertools.count():
        while queue and queue[0][0] <= turn:
            ours.scheduler.add(heapq.heappop(queue)[2])
        if not queue and not len(ours.scheduler):
            break
        running = ours.scheduler.num_running
        step = ours.step()
        assert len(step.decode) == running <= MAX_RUNNING
        assert running + len(step.prefill) <= MAX_RUNNING
        assert len(step.prefill) * max((size for _, size in step.prefill), default=0) <= WINDOW
        if len(step.prefill) > 1:
            assert all(len(answer.prompt) - answer.num_read in (size, 0) for answer, size in step.prefill)
        assert not (running and step.prefill and step.ingest)
        longest, answers = max((size for _, size in step.ingest), default=0), step.decode or step.prefill
        assert longest * len(step.ingest) <= (WINDOW if answers else kind[1] * WINDOW)
        if longest > WINDOW:
            assert not answers and kind[0] * len(step.ingest) <= kind[1], "graphs are as wide as the longest may be"
        assert step or not len(ours.scheduler), "there was work, and nothing was done"
    assert len(ours.ended_at) == len(arrivals)
