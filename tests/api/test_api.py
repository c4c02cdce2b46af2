"""The HTTP API on a real socket, with a tiny model: what it answers to good and to bad input."""

import concurrent.futures
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from httpx_sse import connect_sse
from support.servers import LiveServer, Upload, free_port
from titans_server.settings import Settings

PLAIN = {"Content-Type": "text/plain"}
ASK = {"prompt": "what now", "max_tokens": 8, "temperature": 0}


def code(response: httpx.Response) -> str:
    fields = response.json()["error"]
    assert set(fields) == {"message", "type", "param", "code"}
    assert fields["message"]
    return str(fields["code"])


def post(http: httpx.Client, session: str, text: str | bytes | Iterator[bytes], **headers: str) -> httpx.Response:
    return http.post(f"/v1/sessions/{session}/documents", content=text, headers=PLAIN | headers)


def ask(http: httpx.Client, session: str, **fields: Any) -> str:
    response = http.post(f"/v1/sessions/{session}/completions", json=ASK | fields)
    assert response.status_code == 200, response.text
    return str(response.json()["text"])


def version(http: httpx.Client, session: str) -> int:
    return int(http.get(f"/v1/sessions/{session}").json()["version"])


def test_a_session_from_birth_to_death(http: httpx.Client) -> None:
    created = http.post("/v1/sessions", json={"metadata": {"book": "Ü"}})
    assert created.status_code == 201
    assert created.headers["etag"] == '"0"'
    path = created.headers["location"]
    assert http.get(path).json() == created.json()
    assert created.json()["metadata"] == {"book": "Ü"}

    learnt = http.post(path + "/documents", content="some words to learn", headers=PLAIN).json()
    assert (learnt["version"], learnt["tokens"], learnt["bytes"]) == (1, 19, 19)
    shown = http.get(path)
    assert shown.headers["etag"] == '"1"'
    assert (shown.json()["tokens_seen"], shown.json()["version"]) == (19, 1)

    assert http.delete(path).status_code == 204
    for method in ("GET", "DELETE"):
        assert http.request(method, path).status_code == 404


def test_documents_add_up(http: httpx.Client, session: str) -> None:
    post(http, session, "first")
    second = http.post(f"/v1/sessions/{session}/documents", json={"text": "and sécond"}).json()
    assert (second["version"], second["bytes"]) == (2, 11)
    assert second["tokens_seen"] == len("first") + len("\n\n") + 11, "a blank line stands between documents"


def test_a_document_is_the_same_however_it_arrives(http: httpx.Client) -> None:
    text = "Dieser Text enthält Zeichen mit mehreren Bytes: äöü €uro 🙂. " * 40
    body = text.encode()
    answers = set()
    for pieces in (lambda: body, lambda: (body[i : i + 7] for i in range(0, len(body), 7))):
        session = http.post("/v1/sessions").json()["id"]
        assert post(http, session, pieces()).status_code == 200
        answers.add(ask(http, session, max_tokens=30))
    session = http.post("/v1/sessions").json()["id"]
    http.post(f"/v1/sessions/{session}/documents", json={"text": text})
    answers.add(ask(http, session, max_tokens=30))
    assert len(answers) == 1


def test_progress_streams_and_ends_with_the_document(http: httpx.Client, session: str) -> None:
    headers = PLAIN | {"Accept": "text/event-stream"}
    path = f"/v1/sessions/{session}/documents"
    with connect_sse(http, "POST", path, content=b"words " * 500, headers=headers) as source:
        events = list(source.iter_sse())
    assert source.response.headers["x-accel-buffering"] == "no"
    assert [e.event for e in events[:-2]] == ["progress"] * (len(events) - 2)
    assert (events[-2].event, events[-1].data) == ("done", "[DONE]")
    tokens = [json.loads(e.data)["tokens"] for e in events[:-1]]
    assert tokens == sorted(tokens)
    assert tokens[-1] == 3_000
    assert json.loads(events[-2].data)["version"] == version(http, session) == 1


def test_a_completion_streams_what_it_answers_at_once(http: httpx.Client, session: str) -> None:
    post(http, session, "something to remember")
    whole = http.post(f"/v1/sessions/{session}/completions", json=ASK).json()
    with connect_sse(http, "POST", f"/v1/sessions/{session}/completions", json=ASK | {"stream": True}) as source:
        *chunks, done = (event.data for event in source.iter_sse())
    parsed = [json.loads(chunk) for chunk in chunks]
    assert done == "[DONE]"
    assert "".join(c["text"] for c in parsed) == whole["text"]
    assert [c["finish_reason"] for c in parsed[:-1]] == [None] * (len(parsed) - 1)
    assert parsed[-1]["finish_reason"] == whole["finish_reason"]
    assert parsed[-1]["usage"] == whole["usage"]


def test_a_completion_leaves_the_session_alone(http: httpx.Client, session: str) -> None:
    post(http, session, "something to remember")
    assert ask(http, session) == ask(http, session)
    assert version(http, session) == 1


def test_memory_write_learns_prompt_and_answer(http: httpx.Client, session: str) -> None:
    answer = http.post(f"/v1/sessions/{session}/completions", json=ASK | {"memory": "write"}).json()
    shown = http.get(f"/v1/sessions/{session}").json()
    assert answer["version"] == shown["version"] == 1
    assert shown["tokens_seen"] == answer["usage"]["total_tokens"]


def test_a_stop_string_ends_the_answer_before_it(http: httpx.Client, session: str) -> None:
    post(http, session, "something to remember")
    whole = ask(http, session, max_tokens=60)
    stop = whole[5:7]
    response = http.post(f"/v1/sessions/{session}/completions", json=ASK | {"max_tokens": 60, "stop": ["###", stop]})
    assert response.json()["text"] == whole[: whole.index(stop)]
    assert response.json()["finish_reason"] == "stop"


def test_sampling_repeats_with_its_seed(http: httpx.Client, session: str) -> None:
    drawn = [ask(http, session, temperature=1.3, top_p=0.9, top_k=50, seed=s, max_tokens=20) for s in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_memory_off_answers_as_a_model_without_memory(http: httpx.Client, session: str) -> None:
    post(http, session, "a rather long story. " * 30)
    on, off = (ask(http, session, memory=m, max_tokens=30) for m in ("read", "off"))
    assert on != off


def test_sessions_at_once_answer_as_alone(http: httpx.Client) -> None:
    texts = [f"story number {i}: " + "and so it went on. " * (3 * i + 1) for i in range(6)]

    def run(text: str) -> str:
        session = http.post("/v1/sessions").json()["id"]
        assert post(http, session, text).status_code == 200
        return ask(http, session, max_tokens=20)

    alone = [run(text) for text in texts]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(run, texts)) == alone


@pytest.mark.parametrize(
    ("body", "headers", "status", "expected"),
    [
        (b"", PLAIN, 422, "empty_document"),
        (b'{"text": ""}', {"Content-Type": "application/json"}, 422, "empty_document"),
        (b"ab\xff\xfe", PLAIN, 422, "invalid_utf8"),
        (b"good text and then \xc3", PLAIN, 422, "invalid_utf8"),
        (b'{"words": "a"}', {"Content-Type": "application/json"}, 422, "invalid_json"),
        (b"%PDF", {"Content-Type": "application/pdf"}, 415, "unsupported_media_type"),
        (b"text", {"Content-Type": ""}, 415, "unsupported_media_type"),
        (b"a" * 20_001, PLAIN, 413, "document_too_large"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_bad_document_is_refused_and_nothing_is_lost(
    http: httpx.Client, session: str, body: bytes, headers: dict[str, str], status: int, expected: str, streamed: bool
) -> None:
    post(http, session, "what was there before")
    before = ask(http, session)
    accept = {"Accept": "text/event-stream"} if streamed else {}
    response = http.post(f"/v1/sessions/{session}/documents", content=body, headers=headers | accept)
    if streamed and response.status_code == 200:
        assert "event: error" in response.text
        assert f'"code":"{expected}"' in response.text
        assert response.text.rstrip().endswith("data: [DONE]")
    else:
        assert (response.status_code, code(response)) == (status, expected)
    assert version(http, session) == 1
    assert ask(http, session) == before


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 10**9}, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "top_k": -1}, "top_k"),
        ({"prompt": "a", "stop": ["x"] * 5}, "stop"),
        ({"prompt": "a", "stop": 7}, "stop"),
        ({"prompt": "a", "stop": ""}, "stop.0"),
        ({"prompt": "a", "stop": ["x", ""]}, "stop.1"),
        ({"prompt": "a", "memory": "maybe"}, "memory"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "seed": "7"}, "seed"),
        ({"prompt": "a", "temperature": "1"}, "temperature"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "tempratur": 1}, "tempratur"),
    ],
)
def test_bad_values_are_named(http: httpx.Client, session: str, fields: dict[str, Any], param: str) -> None:
    body = json.dumps(fields)
    headers = {"Content-Type": "application/json"}
    response = http.post(f"/v1/sessions/{session}/completions", content=body, headers=headers)
    assert response.status_code == 422
    code(response)
    assert response.json()["error"]["param"] == param


def test_too_many_stop_strings_are_told_of_as_too_many(http: httpx.Client, session: str) -> None:
    error = http.post(f"/v1/sessions/{session}/completions", json=ASK | {"stop": ["x"] * 5}).json()["error"]
    assert "at most 4" in error["message"]


@pytest.mark.parametrize(
    ("path", "headers", "param"),
    [
        ("/v1/sessions?limit=0", {}, "limit"),
        ("/v1/sessions?limit=x", {}, "limit"),
        ("/v1/sessions/{session}/state?version=x", {}, "version"),
        ("/v1/streams/str_x", {"Last-Event-ID": "x"}, "Last-Event-ID"),
    ],
)
def test_bad_values_of_query_and_headers_are_named(
    http: httpx.Client, session: str, path: str, headers: dict[str, str], param: str
) -> None:
    error = http.get(path.format(session=session), headers=headers).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_request", param)


def test_json_that_is_not_said_to_be_json_is_refused_with_what_is_missing(http: httpx.Client, session: str) -> None:
    for path in ("/v1/sessions", f"/v1/sessions/{session}/completions", "/v1/chat/completions"):
        for kind in ("application/x-www-form-urlencoded", "text/plain"):
            response = http.post(path, content=json.dumps({"prompt": "a"}), headers={"Content-Type": kind})
            assert response.status_code in {400, 422}
            assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_a_body_that_is_not_json_is_refused(http: httpx.Client, session: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = http.post(f"/v1/sessions/{session}/completions", content=b"{", headers=headers)
    assert (response.status_code, code(response)) == (422, "invalid_json")


@pytest.mark.parametrize("content", [b'{"prompt": "\\ud800"}', b'{"prompt": "a", "\\ud800": 1}'])
def test_half_a_surrogate_pair_is_refused(http: httpx.Client, session: str, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = http.post(f"/v1/sessions/{session}/completions", content=content, headers=headers)
    assert response.status_code == 422
    assert code(response) in {"invalid_utf8", "invalid_request"}


def test_a_prompt_too_long_is_refused(http: httpx.Client, session: str) -> None:
    response = http.post(f"/v1/sessions/{session}/completions", json=ASK | {"prompt": "x" * 101})
    assert (response.status_code, code(response)) == (422, "prompt_too_long")
    streamed = http.post(f"/v1/sessions/{session}/completions", json=ASK | {"prompt": "x" * 101, "stream": True})
    assert (streamed.status_code, code(streamed)) == (422, "prompt_too_long")
    hopeless = http.post(f"/v1/sessions/{session}/completions", json=ASK | {"prompt": "x" * 1_000_000})
    assert (hopeless.status_code, code(hopeless)) == (422, "prompt_too_long")
    assert "at least" in hopeless.text


def test_others_are_served_while_a_long_prompt_is_made_tokens(settings: Settings) -> None:
    own = {"port": free_port(), "store": "memory://", "max_prompt_tokens": 500_000}
    with (
        LiveServer(settings.model_copy(update=own)) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        path = f"/v1/sessions/{http.post('/v1/sessions').json()['id']}/completions"
        refused = pool.submit(http.post, path, json=ASK | {"prompt": "a word and 12 more " * 100_000})
        num_served = 0
        while not refused.done():
            assert http.get("/v1/models").status_code == 200
            num_served += 1
        assert code(refused.result()) == "prompt_too_long"
        assert "at least" not in refused.result().text
    assert num_served > 50  # hundreds; fewer than ten where they wait for it


def test_where_an_operator_gives_fewer_tokens_than_the_default_these_are_given(settings: Settings) -> None:
    own = {"port": free_port(), "store": "memory://", "max_completion_tokens": 3}
    with LiveServer(settings.model_copy(update=own)) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        session = http.post("/v1/sessions").json()["id"]
        for path, body in (
            (f"/v1/sessions/{session}/completions", {"prompt": "a", "temperature": 0}),
            ("/v1/completions", {"model": "tiny-0", "prompt": "a", "temperature": 0}),
        ):
            assert http.post(path, json=body).json()["usage"]["completion_tokens"] == 3
            refused = http.post(path, json=body | {"max_tokens": 4})
            assert (refused.status_code // 100, refused.json()["error"]["param"]) == (4, "max_tokens")


def test_more_answers_than_may_ever_be_under_way_are_refused_for_good(settings: Settings) -> None:
    own = {"port": free_port(), "store": "memory://", "max_requests": 3}
    with LiveServer(settings.model_copy(update=own)) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        body = {"model": "tiny-0", "prompt": "a", "max_tokens": 1}
        assert len(http.post("/v1/completions", json=body | {"n": 3}).raise_for_status().json()["choices"]) == 3
        for fields in ({"n": 4}, {"prompt": ["a", "b"], "n": 2}, {"n": 4, "stream": True}):
            refused = http.post("/v1/completions", json=body | fields)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")


@pytest.mark.parametrize("name", ["ses_nobody", "..%2f..%2fetc", "ses_ä", "%00", "a" * 3_000, "{sid}:record"])
def test_an_unknown_session_is_not_found(http: httpx.Client, name: str) -> None:
    for response in (
        http.get(f"/v1/sessions/{name}"),
        http.delete(f"/v1/sessions/{name}"),
        http.post(f"/v1/sessions/{name}/documents", content="text", headers=PLAIN),
        http.post(f"/v1/sessions/{name}/completions", json=ASK),
    ):
        assert response.status_code == 404
        assert code(response) in {"session_not_found", "http_404"}


def test_a_path_or_method_that_is_not_there_says_so_in_the_same_shape(http: httpx.Client) -> None:
    assert code(http.get("/v2/nothing")) == "http_404"
    assert code(http.post("/v1/sessions/")) == "http_404"
    assert code(http.put("/v1/sessions")) == "http_405"


def test_what_can_be_got_has_a_head(http: httpx.Client, session: str) -> None:
    """RFC 9110, section 9.3.2: the same status and headers, and no body. A stream's would take it from its reader."""
    paths = ["/health/live", "/health/ready", "/metrics", "/v1/models", "/v1/models/tiny-0", "/v1/sessions?limit=1"]
    paths += [f"/v1/sessions/{session}{rest}" for rest in ("", "/versions", "/state")]
    for path in (*paths, f"/v1/conversations/{session}", "/v1/sessions/ses_nobody", "/v1/sessions?limit=0"):
        got, head = http.get(path), http.head(path)
        assert (head.status_code, head.content) == (got.status_code, b""), path
        assert head.headers.get("etag") == got.headers.get("etag")
        assert path == "/metrics" or head.headers["content-length"] == got.headers["content-length"]
    for path in ("/v1/streams/str_none", "/v1/completions", f"/v1/sessions/{session}/fork"):
        assert http.head(path).status_code == 405
    assert 'titans_http_requests_total{method="HEAD",route="/v1/models",status="200"}' in http.get("/metrics").text


@pytest.mark.parametrize(
    ("accept", "is_stream"),
    [
        ("Text/Event-Stream", True),
        ("application/json, text/event-stream;q=0.5", True),
        ("text/event-stream; q=0", False),
        ("application/json, text/event-stream;Q=0.000", False),
        ("text/event-streams, */*", False),
    ],
)
def test_a_stream_is_for_who_takes_one(http: httpx.Client, session: str, accept: str, is_stream: bool) -> None:
    kind = post(http, session, "some words", Accept=accept).raise_for_status().headers["content-type"]
    assert kind.startswith("text/event-stream" if is_stream else "application/json")


def test_health(http: httpx.Client, settings: Settings) -> None:
    assert http.get("/health/live").json() == {"status": "ok"}
    ready = http.get("/health/ready").json()
    assert (ready["status"], ready["device"], ready["store"]) == ("ready", "cpu", "sqlite")


def test_writers_wait_in_line_and_too_many_are_refused(http: httpx.Client, server: LiveServer, session: str) -> None:
    """While one writes, one waits, as the server's settings have it; the others are told so at once."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool, Upload(server, session) as upload:
        upload.begin("many words " * 20)
        writing = [pool.submit(post, http, session, "a few words") for _ in range(4)]
        refused = [next(done).result().status_code for done in [concurrent.futures.as_completed(writing)] * 3]
        assert refused == [429, 429, 429]
        name, learnt = upload.finish()
    assert (name, learnt["version"]) == ("done", 1)
    assert sorted(x.result().status_code for x in writing) == [200, 429, 429, 429]
    assert version(http, session) == 2


def test_a_session_is_deleted_while_a_document_is_learnt_in_it(
    http: httpx.Client, server: LiveServer, session: str
) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool, Upload(server, session) as upload:
        upload.begin("many words " * 20)
        waiting = pool.submit(post, http, session, "a few words")
        assert http.delete(f"/v1/sessions/{session}").status_code == 204
        assert http.get(f"/v1/sessions/{session}").status_code == 404
        name, error = upload.finish()
        assert (name, error["error"]["code"] in {"session_not_found", "ingestion_cancelled"}) == ("error", True)
        assert code(waiting.result()) in {"session_not_found", "ingestion_cancelled"}


def test_a_client_that_leaves_midway_leaves_the_session_as_it_was(
    http: httpx.Client, server: LiveServer, session: str
) -> None:
    post(http, session, "what was there before")
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/sessions/{session}/documents HTTP/1.1\r\nHost: {host}\r\nContent-Type: text/plain\r\n"
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(head.encode() + b"Content-Length: 10000\r\n\r\n" + b"half a document " * 200)
        time.sleep(0.2)
    assert post(http, session, "and life goes on").json()["version"] == 2


def test_an_answer_that_nobody_reads_is_stopped(http: httpx.Client, session: str) -> None:
    endless = {"prompt": "a", "max_tokens": 4_096, "temperature": 1.0, "stream": True}
    for _ in range(3):
        with http.stream("POST", f"/v1/sessions/{session}/completions", json=endless) as response:
            next(response.iter_raw())
    started = time.monotonic()
    ask(http, session)
    assert time.monotonic() - started < 10


def test_a_fault_of_the_servers_has_an_id_and_is_counted_as_one(
    http: httpx.Client,
    server: LiveServer,
    session: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(_: str) -> None:
        raise RuntimeError("nobody foresaw this")

    caplog.set_level("INFO", "titans_server")
    with monkeypatch.context() as patched:
        patched.setattr(server.context.service, "get", fail)
        response = http.get(f"/v1/sessions/{session}", headers={"X-Request-ID": "faulty"})
    assert (response.status_code, code(response)) == (500, "internal_error")
    assert response.headers["X-Request-ID"] == "faulty"
    assert http.get(f"/v1/sessions/{session}").status_code == 200, "the connection is as good as before"
    counted = http.get("/metrics").text
    assert 'titans_errors_total{code="internal_error"} 1.0' in counted
    assert 'titans_http_requests_total{method="GET",route="/v1/sessions/{session_id}",status="500"} 1.0' in counted
    told = [record for record in caplog.records if record.name.startswith("titans_server.")]
    assert any(record.exc_info and "nobody foresaw" in str(record.exc_info[1]) for record in told)
    assert ("answered", 500, "internal_error") in [
        (record.message, vars(record).get("status"), vars(record).get("code")) for record in told
    ]
