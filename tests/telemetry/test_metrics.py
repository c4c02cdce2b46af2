"""What /metrics counts, on a real server: as much as was done, under names that stay few."""

import threading
from collections.abc import Callable

import httpx
import pytest
from httpx_sse import connect_sse
from prometheus_client.parser import text_string_to_metric_families
from support.servers import ServerProcess
from support.streams import EOS

PLAIN = {"Content-Type": "text/plain"}


class Scrape:
    """One answer of /metrics."""

    def __init__(self, http: httpx.Client) -> None:
        response = http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        self.samples = [x for family in text_string_to_metric_families(response.text) for x in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """A sample's value, 0 where it is not there yet."""
        found = [x.value for x in self.samples if x.name == name and labels.items() <= x.labels.items()]
        assert len(found) < 2, "the labels name one sample"
        return found[0] if found else 0.0


Change = Callable[..., float]


@pytest.fixture
def change(http: httpx.Client) -> Change:
    """How much a sample has changed since the test began."""
    before = Scrape(http)

    def since(name: str, **labels: str) -> float:
        return Scrape(http)(name, **labels) - before(name, **labels)

    return since


def create(http: httpx.Client) -> str:
    return str(http.post("/v1/sessions").raise_for_status().json()["id"])


def learn(http: httpx.Client, session: str, text: str) -> httpx.Response:
    return http.post(f"/v1/sessions/{session}/documents", content=text, headers=PLAIN)


def ask(http: httpx.Client, session: str, **fields: object) -> httpx.Response:
    body = {"prompt": "what now", "max_tokens": 8, "temperature": 0} | fields
    return http.post(f"/v1/sessions/{session}/completions", json=body)


def test_a_document_and_its_commit_are_counted(http: httpx.Client, change: Change) -> None:
    tokens = learn(http, create(http), "some words to learn " * 20).raise_for_status().json()["tokens"]
    assert change("titans_ingest_tokens_total") == tokens
    assert change("titans_commit_seconds_count") == 1
    assert change("titans_ingest_seconds_count") > 1
    assert change("titans_chunk_seconds_count") >= change("titans_ingest_seconds_count")
    assert change("titans_commit_seconds_sum") > 0


def test_every_stride_has_its_surprise(http: httpx.Client, change: Change) -> None:
    learn(http, create(http), "some words to learn " * 20).raise_for_status()
    assert change("titans_surprise_count") == change("titans_ingest_seconds_count") > 1
    assert change("titans_surprise_sum") > 0


def test_answers_are_counted_token_by_token(http: httpx.Client, change: Change) -> None:
    usages = [ask(http, create(http)).raise_for_status().json()["usage"] for _ in range(2)]
    drawn = sum(usage["completion_tokens"] for usage in usages)
    assert change("titans_generation_tokens_total") == drawn > 2
    assert change("titans_prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages)
    assert change("titans_time_to_first_token_seconds_count") == 2
    assert change("titans_inter_token_latency_seconds_count") == drawn - 2
    assert change("titans_e2e_request_latency_seconds_count") == 2
    assert change("titans_request_generation_tokens_sum") == drawn
    ended = [change("titans_request_success_total", finished_reason=why) for why in ("stop", "length", "abort")]
    assert (sum(ended), ended[2]) == (2, 0)


def test_an_answer_that_a_stop_string_ends_is_no_abort(http: httpx.Client, change: Change) -> None:
    session = create(http)
    text = ask(http, session, max_tokens=20).json()["text"]
    assert ask(http, session, max_tokens=20, stop=text[4]).json()["finish_reason"] == "stop"
    assert change("titans_request_success_total", finished_reason="stop") >= 1
    assert change("titans_request_success_total", finished_reason="abort") == 0


def test_a_client_that_leaves_is_an_abort_and_leaves_the_gauges_at_nothing(
    server: ServerProcess, http: httpx.Client, change: Change
) -> None:
    body = {"prompt": "x", "max_tokens": 4_000, "temperature": 1, "logit_bias": {"2": -100}, "stream": True}
    body |= {"model": http.get("/v1/models").json()["data"][0]["id"]}
    with connect_sse(http, "POST", "/v1/completions", json=body) as events:
        pieces = events.iter_sse()  # which closes the response when it is dropped
        next(pieces)
        assert Scrape(http)("titans_num_requests_running") == 1
        assert Scrape(http)("titans_http_requests_in_flight") == 2, "the stream and this question"
    wait_until(lambda: change("titans_request_success_total", finished_reason="abort") == 1)
    wait_until(lambda: Scrape(http)("titans_num_requests_running") == 0)
    wait_until(lambda: Scrape(http)("titans_http_requests_in_flight") == 1)


def test_a_prompt_that_is_left_before_the_first_token_is_counted_as_far_as_it_was_read(
    http: httpx.Client, change: Change
) -> None:
    body = {"prompt": "x" * 4_000, "max_tokens": 1, "echo": True, "logprobs": 1, "stream": True}
    body |= {"model": http.get("/v1/models").json()["data"][0]["id"]}
    with connect_sse(http, "POST", "/v1/completions", json=body) as events:
        pieces = events.iter_sse()
        for _ in range(100):
            next(pieces)
    wait_until(lambda: change("titans_request_success_total", finished_reason="abort") == 1)
    assert 100 <= change("titans_prompt_tokens_total") < 4_000
    assert change("titans_generation_tokens_total") == 0


def test_a_cold_session_is_a_load_and_a_warm_one_is_none(http: httpx.Client, change: Change) -> None:
    cold, warm = create(http), create(http)
    for session in (cold, warm):
        learn(http, session, "some words").raise_for_status()
    assert Scrape(http)("titans_resident_sessions", tier="memory") == 1
    assert Scrape(http)("titans_resident_bytes", tier="memory") > 1_000
    ask(http, warm)
    assert change("titans_load_seconds_count") == 0
    ask(http, cold)
    assert change("titans_load_seconds_count") == 1


def test_requests_are_counted_by_route_and_errors_by_code(http: httpx.Client, change: Change) -> None:
    session = create(http)
    http.get(f"/v1/sessions/{session}")
    http.get("/v1/sessions/nobody")
    route = "/v1/sessions/{session_id}"
    assert change("titans_http_requests_total", method="GET", route=route, status="200") == 1
    assert change("titans_http_requests_total", method="GET", route=route, status="404") == 1
    assert change("titans_http_request_duration_seconds_count", route=route) == 2
    assert change("titans_errors_total", code="session_not_found") == 1


def test_an_error_inside_a_stream_is_counted_by_its_code(http: httpx.Client, change: Change) -> None:
    path = f"/v1/sessions/{create(http)}/documents"
    with connect_sse(http, "POST", path, content=b"\xff\xfe", headers=PLAIN) as events:
        assert [event.event for event in events.iter_sse()] == ["error", "message"]
    wait_until(lambda: change("titans_errors_total", code="invalid_utf8") == 1)


@pytest.mark.parametrize("resumed", [False, True])
def test_an_error_that_ends_a_stream_is_counted_for_whom_it_was_told(
    http: httpx.Client, change: Change, resumed: bool
) -> None:
    body = {"prompt": "on", "stream": True, "max_tokens": 4_000, "logit_bias": {str(EOS): -100}}
    body |= {"model": http.get("/v1/models").json()["data"][0]["id"]}
    with http.stream("POST", "/v1/completions", json=body, headers={"Prefer": "resumable"}) as begun:
        path = f"/v1/streams/{begun.headers['X-Stream-ID']}"
        if not resumed:
            http.delete(path)
            assert "stream_stopped" in begun.read().decode()
    if resumed:
        with http.stream("GET", path) as gone_on:
            http.delete(path)
            assert "stream_stopped" in gone_on.read().decode()
    wait_until(lambda: change("titans_errors_total", code="stream_stopped") == 1)


def test_no_label_holds_what_a_client_chose(http: httpx.Client) -> None:
    session = create(http)
    learn(http, session, "some words")
    http.get("/marker-in-a-path")
    http.request("MARKER", "/v1/sessions", headers={"X-Request-ID": "marker-in-an-id"})
    text = http.get("/metrics").text
    assert session not in text
    assert "marker" not in text.lower()
    assert 'route="unmatched"' in text


def test_counting_from_many_clients_at_once_loses_nothing(server: ServerProcess, change: Change) -> None:
    def work() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            for _ in range(5):
                learn(http, create(http), "ten tokens").raise_for_status()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert change("titans_ingest_tokens_total") == 40 * len("ten tokens")
    assert change("titans_commit_seconds_count") == 40


def test_two_servers_in_one_process_count_apart() -> None:
    from titans_server.telemetry.metrics import Metrics

    one, other = Metrics(), Metrics()
    one.answered("GET", "/", 200, 0.1, None)
    assert one.registry.get_sample_value("titans_http_requests_total", {"method": "GET", "route": "/", "status": "200"})
    assert b"titans_http_requests_total{" not in other.exposition()


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(200):
        if holds():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it did not come to hold")
