"""What a request leaves in a trace: who called whom, for how long, by OpenTelemetry's names, and no text."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import connect_sse
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from support.models import TinyCheckpoint
from support.servers import LiveServer, free_port
from titans_server.errors import StoreUnavailable, StreamStopped, TitansError
from titans_server.settings import Settings
from titans_server.telemetry.request import RequestInfo
from titans_server.telemetry.traces import Tracing

MARKER = "xylophone-of-the-drowned-mayor"
PLAIN = {"Content-Type": "text/plain"}
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Spans(SimpleSpanProcessor):
    """Those that have ended, and how many have not."""

    def __init__(self) -> None:
        self.ended, self.under_way, self._lock = InMemorySpanExporter(), 0, threading.Lock()
        super().__init__(self.ended)

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        with self._lock:
            self.under_way += 1
        super().on_start(span, parent_context)

    def on_end(self, span: ReadableSpan) -> None:
        super().on_end(span)
        with self._lock:
            self.under_way -= 1

    def take(self) -> list[ReadableSpan]:
        """All since the last time. An answer can be there before its request's span has ended."""
        deadline = time.monotonic() + 30
        while self.under_way and time.monotonic() < deadline:
            time.sleep(0.01)
        found = list(self.ended.get_finished_spans())
        self.ended.clear()
        return [span for span in found if span.name != "GET /v1/models"]


@pytest.fixture(scope="module")
def spans() -> Spans:
    return Spans()


@pytest.fixture(scope="module")
def live(checkpoint: TinyCheckpoint, spans: Spans, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder: Path = tmp_path_factory.mktemp("traces")
    provider = TracerProvider()
    provider.add_span_processor(spans)
    own: dict[str, Any] = {"body": checkpoint.body, "memory": checkpoint.memory, "dtype": "float32", "threads": 1}
    settings = Settings(port=free_port(), store=f"sqlite:///{folder}/titans.db", resident_bytes=0, **own)
    with LiveServer(settings, Tracing(provider)) as server:
        yield server


@pytest.fixture
def http(live: LiveServer, spans: Spans) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=60) as client:
        spans.take()
        yield client


def create(http: httpx.Client) -> str:
    return str(http.post("/v1/sessions").json()["id"])


def test_a_document_is_a_request_with_its_strides_and_its_commit(http: httpx.Client, spans: Spans) -> None:
    session = create(http)
    headers = PLAIN | {"traceparent": CALLER, "X-Request-ID": "one"}
    tokens = http.post(f"/v1/sessions/{session}/documents", content="words " * 40, headers=headers).json()["tokens"]
    *parts, whole = [span for span in spans.take() if span.name != "POST /v1/sessions"]
    assert whole.name == "POST /v1/sessions/{session_id}/documents"
    assert whole.kind is SpanKind.SERVER
    assert whole.attributes is not None and whole.context is not None and whole.parent is not None
    assert dict(whole.attributes) == {
        "http.request.method": "POST",
        "url.path": f"/v1/sessions/{session}/documents",
        "http.route": "/v1/sessions/{session_id}/documents",
        "http.response.status_code": 200,
        "titans.request_id": "one",
        "gen_ai.conversation.id": session,
    }
    assert f"{whole.context.trace_id:032x}" == CALLER.split("-")[1]
    assert f"{whole.parent.span_id:016x}" == CALLER.split("-")[2]
    assert {span.name for span in parts} == {"ingest", "commit"}
    for span in parts:
        assert span.parent is not None and span.parent.span_id == whole.context.span_id
        assert (span.attributes or {})["gen_ai.conversation.id"] == session
    assert sum(int(str((span.attributes or {}).get("titans.tokens", 0))) for span in parts) == tokens


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_the_conventions_for_generative_ai(http: httpx.Client, spans: Spans, stream: bool) -> None:
    cold, warm = create(http), create(http)
    for session in (cold, warm):
        http.post(f"/v1/sessions/{session}/documents", content="words", headers=PLAIN)
    spans.take()
    model = http.get("/v1/models").json()["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "session": cold}
    body |= {"temperature": 0.5, "logit_bias": {"2": -100}, "stream": stream, "stream_options": None}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    in_order = sorted(spans.take(), key=lambda span: (span.parent is None, span.name != "load"))
    *in_vain, load, answer, whole = in_order
    for span in in_vain:  # the version was given its snapshot while its log was read
        assert (span.name, (span.attributes or {})["error.type"]) == ("load", "version_conflict")
    assert (load.name, whole.name) == ("load", "POST /v1/chat/completions")
    assert whole.context is not None
    for span in (load, answer):
        assert span.parent is not None and span.parent.span_id == whole.context.span_id
    attributes = dict(answer.attributes or {})
    assert 0 < float(str(attributes.pop("gen_ai.response.time_to_first_chunk"))) < 60
    assert int(str(attributes.pop("gen_ai.usage.input_tokens"))) > 5
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "titans",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.conversation.id": cold,
    }
    assert answer.name == f"chat {model}"
    assert answer.end_time is not None and answer.start_time is not None and answer.end_time > answer.start_time


def test_a_response_is_a_chat(http: httpx.Client, spans: Spans) -> None:
    body = {"model": http.get("/v1/models").json()["data"][0]["id"], "input": "x", "max_output_tokens": 16}
    assert http.post("/v1/responses", json=body | {"store": False}).status_code == 200
    names = {(span.attributes or {}).get("gen_ai.operation.name") for span in spans.take()}
    assert names == {"chat", None}


def test_errors_have_their_code_and_only_a_servers_own_are_errors(http: httpx.Client, spans: Spans) -> None:
    http.get("/v1/sessions/none")
    (missing,) = spans.take()
    assert (missing.attributes or {})["error.type"] == "session_not_found"
    assert missing.status.status_code is StatusCode.UNSET
    path = f"/v1/sessions/{create(http)}/documents"
    with connect_sse(http, "POST", path, content=b"\xff", headers=PLAIN) as events:
        list(events.iter_sse())
    torn = spans.take()[-1]
    assert (torn.attributes or {})["error.type"] == "invalid_utf8"


@pytest.mark.parametrize(("error", "status"), [(StoreUnavailable, StatusCode.ERROR), (StreamStopped, StatusCode.UNSET)])
def test_a_stream_that_a_server_broke_off_is_an_error_though_it_began_well(
    error: type[TitansError], status: StatusCode
) -> None:
    provider, spans = TracerProvider(), Spans()
    provider.add_span_processor(spans)
    with Tracing(provider).request("GET", "/", {}) as span:
        span.ended("GET", "/", 200, RequestInfo("req_1", error=error("no")))
    (ended,) = spans.take()
    assert ended.status.status_code is status


def test_no_span_holds_what_a_user_wrote(http: httpx.Client, spans: Spans) -> None:
    path = f"/v1/sessions/{create(http)}"
    for content in (MARKER.encode(), MARKER.encode() + b"\xff"):
        http.post(f"{path}/documents", content=content, headers=PLAIN)
    for body in ({"prompt": MARKER, "max_tokens": 3}, {"prompt": MARKER, "top_p": 9}, {"prompt": MARKER * 5_000}):
        http.post(f"{path}/completions?{MARKER}", json=body)
    found = spans.take()
    assert len(found) > 6
    assert MARKER not in json.dumps([json.loads(span.to_json()) for span in found])


def test_health_and_metrics_make_no_spans(http: httpx.Client, spans: Spans) -> None:
    for path in ("/health/live", "/health/ready", "/metrics"):
        assert http.get(path).status_code == 200
    assert spans.take() == []
