"""OpenTelemetry traces: a span for a request, and under it one for each load, stride, answer and commit.

Attributes follow OpenTelemetry's conventions for HTTP and for generative AI (`gen_ai.*`); none holds a user's text.
Needs the extra `otel`. Where spans go is said in OpenTelemetry's own variables: OTEL_EXPORTER_OTLP_ENDPOINT and others.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from typing import Literal

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from titans_server.errors import TitansError, VersionConflict
from titans_server.observer import Answering, Asked, Observer, Work
from titans_server.telemetry import request

_operation: ContextVar[str] = ContextVar("titans_operation", default="text_completion")


def exporting() -> "Tracing":
    """Traces that are sent away, in batches, by a thread that ends in `close`."""
    provider = TracerProvider(resource=Resource.create({"service.name": "titans-server"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


class Tracing(Observer):
    """Makes spans. Each is a child of the one of the request that the running code works for."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("titans_server", version("titans-server"))
        self._model = ""

    def serve(self, model_name: str) -> None:
        """The model's name is known."""
        self._model = model_name

    def close(self) -> None:
        """Send what is left. Waits for the network."""
        self._provider.shutdown()

    @contextmanager
    def request(self, method: str, path: str, headers: Mapping[str, str]) -> Iterator["RequestSpan"]:
        """A request's span, under its caller's where the headers name one (W3C Trace Context)."""
        _operation.set("chat" if path.endswith(("/chat/completions", "/responses")) else "text_completion")
        with self._tracer.start_as_current_span(
            method,
            context=extract(headers),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "url.path": path},
            record_exception=False,  # its message may quote a user
            set_status_on_exception=False,
        ) as span:
            yield RequestSpan(span)

    @contextmanager
    def working(self, work: Work, num_tokens: int = 0) -> Iterator[None]:
        """See Observer."""
        span = self._start(work, {"titans.tokens": num_tokens} if work == "ingest" else {})
        with _ending(span):
            yield

    @contextmanager
    def answering(self, asked: Asked) -> Iterator[Answering]:
        """See Observer."""
        operation = _operation.get()
        span = self._start(
            f"{operation} {self._model}",
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "titans",
                "gen_ai.request.model": self._model,
                "gen_ai.response.model": self._model,
                "gen_ai.request.max_tokens": asked.max_tokens,
                "gen_ai.request.temperature": asked.temperature,
                "gen_ai.request.top_p": asked.top_p,
                "gen_ai.usage.input_tokens": asked.num_prompt_tokens,
            },
        )
        with _ending(span):
            answer = _Spanned(span)
            try:
                yield answer
            finally:
                span.set_attribute("gen_ai.usage.output_tokens", answer.num_tokens)

    def _start(self, name: str, attributes: Mapping[str, str | int | float]) -> Span:
        """A span that is nobody's parent: it may be ended in another task than it was begun in."""
        span = self._tracer.start_span(name, attributes=attributes)
        if (info := request.current()) is not None and info.session_id is not None:
            span.set_attribute("gen_ai.conversation.id", info.session_id)
        return span


class RequestSpan:
    """A request's span while it is answered."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def ended(self, method: str, route: str, status: int, info: request.RequestInfo) -> None:
        """What is known of the request at its end."""
        span = self._span
        span.update_name(f"{method} {route}")
        span.set_attributes({"http.route": route, "http.response.status_code": status, "titans.request_id": info.id})
        if info.session_id is not None:
            span.set_attribute("gen_ai.conversation.id", info.session_id)
        if info.error is not None:
            span.set_attribute("error.type", info.error.code)
            status = info.error.status  # of a stream, which was begun as if all were well
        if status >= 500:  # what a client gets wrong is no error
            span.set_status(Status(StatusCode.ERROR))


@contextmanager
def _ending(span: Span) -> Iterator[None]:
    """End a span; with the error's name alone: its message may quote a user."""
    try:
        yield
    except Exception as error:
        span.set_attribute("error.type", error.code if isinstance(error, TitansError) else type(error).__name__)
        if not isinstance(error, VersionConflict):  # that another write came first is no fault
            span.set_status(Status(StatusCode.ERROR))
        raise
    finally:
        span.end()


class _Spanned(Answering):
    def __init__(self, span: Span) -> None:
        self._span = span
        self._started = time.perf_counter()
        self.num_tokens = 0

    def drawn(self) -> None:
        """See Answering."""
        if not self.num_tokens:
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", time.perf_counter() - self._started)
        self.num_tokens += 1

    def finished(self, reason: Literal["stop", "length"]) -> None:
        """See Answering."""
        self._span.set_attribute("gen_ai.response.finish_reasons", [reason])
