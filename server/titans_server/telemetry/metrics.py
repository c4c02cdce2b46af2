"""Prometheus metrics. The names after `titans_` are vLLM's where it has them; docs/operations.md explains each.

Labels have few values, known beforehand: never a session, a key or a path as the client wrote it.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from titans_server.errors import TitansError, VersionConflict
from titans_server.observer import Answering, Asked, Computed, Observer, Work

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
_SURPRISES = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 5)
_TOKENS = (1, 4, 16, 64, 256, 1_024, 4_096, 16_384, 65_536)


@dataclass(frozen=True)
class Residents:
    """Sessions whose state is at hand in one tier."""

    tier: str
    num_sessions: int
    num_bytes: int


class Gauged(Protocol):
    """What is looked at when somebody asks for the metrics. Called on any thread; returns at once."""

    @property
    def num_running(self) -> int:
        """Answers being made."""

    @property
    def num_waiting(self) -> int:
        """Answers whose prompt is not read yet."""

    @property
    def num_ingesting(self) -> int:
        """Strides of documents that are being learnt or wait for it."""

    def residents(self) -> Iterable[Residents]:
        """What each tier holds."""


class Metrics(Observer):
    """All metrics of one server, in a registry of its own. Any thread may tell it things."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"titans_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(f"titans_{name}", text, labels, buckets=tuple(buckets), registry=registry)

        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts read")
        self._generation_tokens = counter("generation_tokens", "Tokens of answers drawn")
        self._success = counter("request_success", "Answers ended", "finished_reason")
        self._first_token = histogram(
            "time_to_first_token_seconds", "From an answer's start to its first token", _LATENCIES
        )
        self._next_token = histogram("inter_token_latency_seconds", "From one token to the next", _STEPS)
        self._e2e = histogram("e2e_request_latency_seconds", "From an answer's start to its end", _LATENCIES)
        self._request_prompt = histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self._request_generation = histogram("request_generation_tokens", "Tokens of an answer", _TOKENS)

        self._work = {
            work: histogram(f"{work}_seconds", text, _LATENCIES)
            for work, text in (
                ("load", "Reading a session's state from the store"),
                ("commit", "Making a session's new state durable"),
                ("ingest", "Learning a stride of a document, with the wait for its turn"),
            )
        }
        self._failures = counter("work_failures", "Loads, strides and commits that failed", "work")
        self._put_off = counter("ingestions_put_off", "Accepted documents that are to be tried again", "code")
        self._conflicts = counter("commit_conflicts", "Commits refused because the session had moved on")
        self._surprise = histogram("surprise", "How far a token moved its memories' weights, by stride", _SURPRISES)
        self._ingest_tokens = counter("ingest_tokens", "Tokens of documents learnt")
        self._computed = {
            kind: histogram(f"{name}_seconds", text, _STEPS)
            for kind, name, text in (
                ("ingest", "chunk", "Computing a batch of chunks of documents"),
                ("prefill", "prefill_block", "Computing a block of a prompt, or a part of opening its session"),
                ("decode", "decode_step", "Computing a token of every running answer"),
            )
        }

        self._http = counter("http_requests", "HTTP requests answered", "method", "route", "status")
        self._http_seconds = histogram("http_request_duration_seconds", "Answering HTTP", _LATENCIES, "route")
        self._errors = counter("errors", "Requests that ended with an error", "code")
        self.in_flight = Gauge("titans_http_requests_in_flight", "HTTP requests being answered", registry=registry)
        self._model = Gauge(
            "titans_model_info",
            "The model that is served; always 1",
            ["model_name", "fingerprint", "device"],
            registry=registry,
        )
        self._begin_at_zero()

    def serve(self, gauged: Gauged, *, model_name: str, fingerprint: str, device: str) -> None:
        """The server is ready: from now on it is looked at, too."""
        self._model.labels(model_name, fingerprint, device).set(1)
        self.registry.register(_Looking(gauged))

    def _begin_at_zero(self) -> None:
        """A counter that is first seen at 1 has not increased for Prometheus: an alert would miss the first error."""
        kinds: list[type[TitansError]] = [TitansError, *TitansError.__subclasses__()]
        for kind in kinds:
            self._errors.labels(kind.default_code)
            self._put_off.labels(kind.default_code)
        for work in self._work:
            self._failures.labels(work)
        for reason in ("stop", "length", "abort"):
            self._success.labels(reason)

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format. Reads /proc: not for the event loop."""
        return generate_latest(self.registry)

    def answered(self, method: str, route: str, status: int, seconds: float, code: str | None) -> None:
        """An HTTP request has ended. `code`: of the error, where it ended with one."""
        self._http.labels(method, route, status).inc()
        self._http_seconds.labels(route).observe(seconds)
        if code is not None:
            self._errors.labels(code).inc()

    @contextmanager
    def working(self, work: Work, num_tokens: int = 0) -> Iterator[None]:
        """See Observer."""
        started = time.perf_counter()
        try:
            yield
        except VersionConflict:
            if work == "commit":
                self._conflicts.inc()
            raise
        except Exception:
            self._failures.labels(work).inc()
            raise
        self._work[work].observe(time.perf_counter() - started)
        if work == "ingest":
            self._ingest_tokens.inc(num_tokens)

    @contextmanager
    def answering(self, asked: Asked) -> Iterator[Answering]:
        """See Observer."""
        answer = _Timed(self._first_token, self._next_token)
        try:
            yield answer
        finally:
            self._success.labels(answer.reason).inc()
            self._generation_tokens.inc(answer.num_tokens)
            self._request_generation.observe(answer.num_tokens)
            self._request_prompt.observe(asked.num_prompt_tokens)
            self._prompt_tokens.inc(answer.num_read)
            if answer.reason != "abort":
                self._e2e.observe(time.perf_counter() - answer.started)

    def computed(self, kind: Computed, seconds: float) -> None:
        """See Observer."""
        self._computed[kind].observe(seconds)

    def surprised(self, by: float) -> None:
        """See Observer."""
        self._surprise.observe(by)

    def put_off(self, code: str) -> None:
        """See Observer."""
        self._put_off.labels(code).inc()


class _Timed(Answering):
    """Measures an answer."""

    def __init__(self, first: Histogram, following: Histogram) -> None:
        self._first, self._following = first, following
        self.started = self._last = time.perf_counter()
        self.num_read = self.num_tokens = 0  # of the prompt, and drawn
        self.reason = "abort"  # vLLM's word for an answer that somebody or something stopped

    def read(self, num_tokens: int) -> None:
        """See Answering."""
        self.num_read = num_tokens

    def drawn(self) -> None:
        """See Answering."""
        now = time.perf_counter()
        (self._following if self.num_tokens else self._first).observe(now - self._last)
        self.num_tokens += 1
        self._last = now

    def finished(self, reason: Literal["stop", "length"]) -> None:
        """See Answering."""
        self.reason = reason


class _Looking:
    """Looks at what changes all the time only when it is asked for."""

    def __init__(self, gauged: Gauged) -> None:
        self._gauged = gauged

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client wants it."""
        look = self._gauged
        yield GaugeMetricFamily("titans_num_requests_running", "Answers being made", look.num_running)
        yield GaugeMetricFamily("titans_num_requests_waiting", "Answers whose prompt is not read yet", look.num_waiting)
        yield GaugeMetricFamily("titans_num_ingests_running", "Strides of documents in the engine", look.num_ingesting)
        sessions = GaugeMetricFamily("titans_resident_sessions", "Sessions whose state is at hand", labels=["tier"])
        held = GaugeMetricFamily("titans_resident_bytes", "Bytes of the states at hand", labels=["tier"])
        for tier in look.residents():
            sessions.add_metric([tier.tier], tier.num_sessions)
            held.add_metric([tier.tier], tier.num_bytes)
        yield sessions
        yield held
