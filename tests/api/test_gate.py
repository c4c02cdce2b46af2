"""Who is let in, on real sockets: keys, rates, sizes, and a server that will not be open to the world."""

import asyncio
import concurrent.futures
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import SecretStr, ValidationError
from support.keys import new_key, put
from support.models import TinyCheckpoint, write_tiny_checkpoint
from support.servers import LiveServer, free_port
from titans_client.cli import main
from titans_server.app import create_app
from titans_server.lifecycle import CannotStart
from titans_server.settings import Settings
from titans_server.tenants.quotas import Quotas

STATIC = "a-static-key-of-the-operator"
PLAIN = {"Content-Type": "text/plain"}
ASK = {"prompt": "what now", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/titans.db"


def settings_for(checkpoint: TinyCheckpoint, folder: Path, **settings: Any) -> Settings:
    own: dict[str, Any] = {"body": checkpoint.body, "memory": checkpoint.memory, "dtype": "float32", "threads": 1}
    own |= {"port": free_port(), "store": f"sqlite:///{folder}/titans.db"}
    return Settings(**own | settings)


@pytest.fixture(scope="module")
def server(checkpoint: TinyCheckpoint, store: str) -> Iterator[LiveServer]:
    limits: dict[str, Any] = {"max_body_bytes": 2_000, "max_header_bytes": 4_000}
    with LiveServer(settings_for(checkpoint, Path(), store=store, api_key=STATIC, **limits)) as server:
        yield server


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


OWN_NAMES = [
    {"Host": "localhost"},
    {"Host": "LOCALHOST.:8000"},
    {"Host": "127.0.0.1:1"},
    {"Host": "[::1]:8000"},
    {"Host": "192.168.1.7"},
    {"Host": "server:8000"},
    {"Host": "host.docker.internal:8000"},
    {"Host": "laptop.local"},
    {"Origin": "http://localhost:3000"},
    {"Origin": "http://10.0.0.7"},
    {"Origin": "vscode-webview://a.b"},
]
FOREIGN_NAMES = [
    {"Host": "evil.example"},
    {"Host": "evil.example:8000"},
    {"Host": "127.0.0.1.evil.example"},
    {"Host": "localhost.evil.example."},
    {"Host": "[evil.example"},
    {"Origin": "https://evil.example"},
    {"Origin": "http://8.8.8.8"},
    {"Origin": "http://[2001:4860:4860::8888]:8000"},
    {"Origin": "http://evil.example:8000"},
    {"Origin": "null"},
]


def test_a_page_of_the_web_is_not_let_in_without_a_key(checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """The browser is on this machine, sends what the page wants, and shows it what its own name answers."""
    settings = settings_for(checkpoint, tmp_path)
    with LiveServer(settings) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for names in OWN_NAMES:
            assert client.post("/v1/sessions", headers=names).status_code == 201, names
        for names in FOREIGN_NAMES:
            for path in ("/v1/sessions", "/v1/models", "/metrics", "/nothing"):
                response = client.get(path, headers=names)
                assert refused(response) == (401, "invalid_api_key"), (names, path)
            assert refused(client.post("/v1/sessions", headers=names)) == (401, "invalid_api_key"), names
            assert client.get("/health/ready", headers=names).status_code == 200
        assert len(client.get("/v1/sessions").json()["data"]) == len(OWN_NAMES)
    with LiveServer(settings.model_copy(update={"api_key": SecretStr(STATIC)})) as server:
        named = {"Host": "titans.example", "Authorization": f"Bearer {STATIC}"}
        assert httpx.get(f"{server.url}/v1/models", headers=named).status_code == 200


def refused(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


def test_every_route_but_health_needs_a_key(http: httpx.Client) -> None:
    app = create_app(Settings())
    paths = [(m.upper(), path) for path, methods in app.openapi()["paths"].items() for m in methods]
    paths += [("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/nowhere"), ("POST", "/health/live/")]
    assert len(paths) > 10
    for method, path in paths:
        response = http.request(method, path.replace("{", "").replace("}", ""), json={})
        if path in {"/health/live", "/health/ready"}:
            assert response.status_code == 200
            continue
        assert refused(response) == (401, "invalid_api_key"), path
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert response.headers["www-authenticate"] == 'Bearer realm="titans"'


@pytest.mark.parametrize(
    "shown",
    [
        "",
        "Bearer",
        f"Basic {STATIC}",
        STATIC,
        f"Bearer {STATIC}x",
        f"Bearer {STATIC} {STATIC}",
        "Bearer é",
    ],
)
def test_what_is_no_key_is_refused_and_never_repeated(http: httpx.Client, shown: str) -> None:
    response = http.get("/v1/models", headers={b"Authorization": shown.encode("latin-1")})
    assert refused(response) == (401, "invalid_api_key")
    assert STATIC not in response.text


def test_two_authorization_headers_are_refused(http: httpx.Client) -> None:
    twice = [("Authorization", f"Bearer {STATIC}"), ("Authorization", "Bearer other")]
    assert refused(http.get("/v1/models", headers=twice)) == (401, "invalid_api_key")


def test_the_static_key_and_keys_of_the_store_let_in(http: httpx.Client, store: str) -> None:
    _, header = new_key(store)
    for shown in ({"Authorization": f"Bearer {STATIC}"}, {"Authorization": f"bearer {STATIC}"}, header):
        assert http.get("/v1/models", headers=shown).status_code == 200


def test_openais_client_knows_the_error(server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-wrong", max_retries=0) as ai:
        with pytest.raises(openai.AuthenticationError) as error:
            ai.models.list()
        assert error.value.code == "invalid_api_key"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=STATIC) as ai:
        assert ai.models.list().data


def test_a_revoked_key_is_refused_soon_while_others_work(server: LiveServer, http: httpx.Client, store: str) -> None:
    (revoked, header), (_, other) = new_key(store), new_key(store)
    stop = time.monotonic() + 60

    def until_refused() -> None:
        with httpx.Client(base_url=server.url, headers=header) as client:
            while time.monotonic() < stop:
                if client.get("/v1/models").status_code == 401:
                    return
        raise AssertionError("it still works")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(until_refused) for _ in range(4)]
        time.sleep(0.5)
        assert not any(future.done() for future in asking)
        asyncio.run(put(store, replace(revoked, revoked_at=time.time())))
        for future in asking:
            future.result()
    assert http.get("/v1/models", headers=other).status_code == 200


def test_a_key_works_and_stops_working_on_every_server(
    checkpoint: TinyCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def titans(*words: str) -> str:
        assert main(["keys", *words]) == 0
        return capsys.readouterr().out.strip()

    store = f"sqlite:///{tmp_path}/titans.db"
    monkeypatch.setenv("TITANS_STORE", store)
    with (
        LiveServer(settings_for(checkpoint, tmp_path, api_key=STATIC)) as one,
        LiveServer(settings_for(checkpoint, tmp_path, api_key=STATIC)) as other,
    ):
        text = titans("create", "bob")
        _, key_id, secret = text.split("-", 2)

        def statuses() -> list[int]:
            header = {"Authorization": f"Bearer {text}"}
            return [httpx.get(f"{server.url}/v1/models", headers=header).status_code for server in (one, other)]

        assert statuses() == [200, 200]
        (line,) = [line for line in titans("list").splitlines() if line.startswith(key_id)]
        assert "active\tbob" in line and secret not in line
        titans("revoke", key_id)
        time.sleep(1.1)
        assert statuses() == [401, 401]


def test_requests_a_minute_are_counted_down_and_refused(http: httpx.Client, store: str) -> None:
    _, header = new_key(store, Quotas(requests_per_minute=3))
    answers = [http.get("/v1/models", headers=header) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
    assert answers[0].headers["x-ratelimit-reset-requests"].endswith("s")
    assert refused(answers[3]) == (429, "rate_limit_exceeded")
    assert http.get("/metrics", headers=header).status_code == 200, "whoever watches is not to be blinded by it"
    assert 1 <= int(answers[3].headers["retry-after"]) <= 20
    _, other = new_key(store, Quotas(requests_per_minute=3))
    assert http.get("/v1/models", headers=other).status_code == 200


@pytest.mark.parametrize("kind", ["requests", "tokens"])
def test_a_kept_key_with_a_rate_of_0_is_refused_what_it_may_never_have(
    http: httpx.Client, store: str, kind: str
) -> None:
    """No such key is made any more; one may be there still."""
    _, header = new_key(store, Quotas(**{f"{kind}_per_minute": 0}))
    answer = http.post("/v1/sessions", headers=header)
    assert refused(answer) == (429, "quota_exceeded")
    assert f"0 {kind} a minute" in answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false" and "retry-after" not in answer.headers
    told = [answer.headers[f"x-ratelimit-{name}-{kind}"] for name in ("limit", "remaining", "reset")]
    assert told == ["0", "0", "0s"]
    looked = http.get("/v1/models", headers=header)
    assert looked.status_code == (429 if kind == "requests" else 200), "looking costs no tokens"


def test_a_kept_key_with_no_request_at_once_is_not_told_to_come_again(http: httpx.Client, store: str) -> None:
    """As above."""
    _, header = new_key(store, Quotas(requests_at_once=0))
    answer = http.get("/v1/models", headers=header)
    assert refused(answer) == (429, "quota_exceeded")
    assert answer.headers["x-should-retry"] == "false" and "retry-after" not in answer.headers


def test_tokens_of_documents_and_answers_are_charged(http: httpx.Client, store: str) -> None:
    _, header = new_key(store, Quotas(tokens_per_minute=100))
    started = time.monotonic()

    def refilled() -> int:
        return math.ceil((time.monotonic() - started) * 100 / 60)

    session = http.post("/v1/sessions", headers=header).json()["id"]
    path = f"/v1/sessions/{session}"
    assert http.post(f"{path}/documents", content="x" * 60, headers=PLAIN | header).status_code == 200
    left = http.get(path, headers=header).headers
    assert left["x-ratelimit-limit-tokens"] == "100"
    assert 0 <= int(left["x-ratelimit-remaining-tokens"]) - 40 <= refilled()
    usage = http.post(f"{path}/completions", json=ASK, headers=header).json()["usage"]
    left = http.get(path, headers=header).headers
    assert 0 <= int(left["x-ratelimit-remaining-tokens"]) - (40 - usage["total_tokens"]) <= refilled()
    assert http.post(f"{path}/documents", content="x" * 300, headers=PLAIN | header).status_code == 200
    late = http.post(f"{path}/completions", json=ASK, headers=header)
    assert refused(late) == (429, "rate_limit_exceeded")
    assert 0 < int(late.headers["retry-after"]) < 200
    assert late.headers["x-ratelimit-remaining-tokens"] == "0"
    assert http.get(path, headers=header).status_code == 200, "looking costs no tokens"


def test_a_prompt_that_is_only_scored_is_charged(http: httpx.Client, store: str) -> None:
    _, header = new_key(store, Quotas(tokens_per_minute=1_000))
    model = http.get("/v1/models", headers=header).json()["data"][0]["id"]
    scored = {"model": model, "prompt": "x" * 400, "max_tokens": 0, "echo": True, "logprobs": 1}
    assert http.post("/v1/completions", json=scored, headers=header).json()["usage"]["total_tokens"] >= 400
    left = http.get("/v1/models", headers=header).headers["x-ratelimit-remaining-tokens"]
    assert int(left) < 700


def test_a_prompt_that_is_left_before_the_first_token_is_charged_as_far_as_it_was_read(
    http: httpx.Client, store: str
) -> None:
    _, header = new_key(store, Quotas(tokens_per_minute=600))
    model = http.get("/v1/models", headers=header).json()["data"][0]["id"]
    scored = {"model": model, "prompt": "x" * 1_500, "max_tokens": 1, "echo": True, "logprobs": 1, "stream": True}
    with http.stream("POST", "/v1/completions", json=scored, headers=header) as response:
        lines = response.iter_lines()
        for _ in range(300):
            next(line for line in lines if line.startswith("data: {"))

    def left() -> int:
        return int(http.get("/v1/models", headers=header).headers["x-ratelimit-remaining-tokens"])

    _soon(lambda: left() < 400)  # 300 were read at least; ten come back in a second


def test_streams_at_once_are_bounded_for_each_key(server: LiveServer, http: httpx.Client, store: str) -> None:
    _, header = new_key(store, Quotas(requests_at_once=2, tokens_per_minute=1_000_000))
    model = http.get("/v1/models", headers=header).json()["data"][0]["id"]
    endless = {"model": model, "prompt": "x", "max_tokens": 4_000, "logit_bias": {"2": -100}, "stream": True}
    with (
        http.stream("POST", "/v1/completions", json=endless, headers=header) as one,
        http.stream("POST", "/v1/completions", json=endless, headers=header) as other,
    ):
        assert (one.status_code, other.status_code) == (200, 200)
        third = http.post("/v1/completions", json=endless, headers=header)
        assert refused(third) == (429, "rate_limit_exceeded")
        assert third.headers["x-ratelimit-remaining-tokens"].isdecimal()
        assert third.headers["retry-after"] == "1"
        assert http.get("/v1/models", headers={"Authorization": f"Bearer {STATIC}"}).status_code == 200
    _soon(lambda: http.get("/v1/models", headers=header).status_code == 200)  # streams that were left do not count


def test_a_stream_that_goes_on_without_a_reader_still_counts(http: httpx.Client, store: str) -> None:
    _, header = new_key(store, Quotas(requests_at_once=1, tokens_per_minute=1_000_000))
    model = http.get("/v1/models", headers=header).json()["data"][0]["id"]
    endless = {"model": model, "prompt": "x", "max_tokens": 4_000, "logit_bias": {"2": -100}, "stream": True}
    path = "/v1/completions"
    with http.stream("POST", path, json=endless, headers=header | {"Prefer": "resumable"}) as response:
        stream = f"/v1/streams/{response.headers['x-stream-id']}"
    _soon(lambda: http.get("/v1/models", headers=header).status_code == 200)  # the server sees that the reader has gone
    assert refused(http.post(path, json=endless, headers=header)) == (429, "rate_limit_exceeded")
    with http.stream("GET", stream, headers=header) as response:
        assert response.status_code == 200, "it can be resumed all the same"
        assert http.delete(stream, headers=header).status_code == 204, "and stopped, also while it is read"
    short = endless | {"max_tokens": 1, "stream": False}
    _soon(lambda: http.post(path, json=short, headers=header).status_code == 200)  # the reader that left counted, too


def _soon(is_so: Callable[[], bool]) -> None:
    for _ in range(100):
        if is_so():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to that")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_read_whole_has_a_limit_and_a_document_has_another(http: httpx.Client, chunked: bool) -> None:
    header = {"Authorization": f"Bearer {STATIC}", "Content-Type": "application/json"}
    session = http.post("/v1/sessions", headers=header).json()["id"]
    body = b'{"prompt": "' + b"x" * 3_000 + b'"}'
    large = (body[i : i + 999] for i in range(0, len(body), 999)) if chunked else body
    response = http.post(f"/v1/sessions/{session}/completions", content=large, headers=header)
    assert refused(response) == (413, "body_too_large")
    text = http.post(f"/v1/sessions/{session}/documents", content=b"x" * 3_000, headers=header | PLAIN)
    assert text.status_code == 200


def test_headers_have_a_limit(http: httpx.Client) -> None:
    header = {"Authorization": f"Bearer {STATIC}"}
    assert http.get("/v1/models", headers=header | {"X-Much": "x" * 2_000}).status_code == 200
    for much in ({"X-Much": "x" * 5_000}, {f"X-{i}": "" for i in range(1_000)}):
        assert refused(http.get("/v1/models", headers=header | much)) == (431, "headers_too_large")


def test_keys_at_once_do_not_get_in_each_others_way(server: LiveServer, store: str) -> None:
    headers = [new_key(store, Quotas(requests_per_minute=10))[1] for _ in range(6)]

    def ask(header: dict[str, str]) -> list[int]:
        with httpx.Client(base_url=server.url, headers=header, timeout=60) as client:
            return [client.get("/v1/models").status_code for _ in range(12)]

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for statuses in pool.map(ask, headers):
            assert statuses == [200] * 10 + [429] * 2


@pytest.mark.parametrize("exposed", [{"host": "0.0.0.0"}, {"published_on": "192.0.2.1"}])
async def test_a_server_without_a_key_does_not_start_where_others_reach_it(
    checkpoint: TinyCheckpoint, tmp_path: Path, exposed: dict[str, str]
) -> None:
    app = create_app(settings_for(checkpoint, tmp_path, **exposed))
    with pytest.raises(CannotStart, match="TITANS_API_KEY"):
        async with app.router.lifespan_context(app):
            pass


def test_a_short_static_key_is_refused_and_not_shown() -> None:
    with pytest.raises(ValidationError, match="api_key") as error:
        Settings(api_key="short-one")
    assert "short-one" not in str(error.value)
    assert STATIC not in repr(Settings(api_key=STATIC))


@pytest.mark.parametrize("settings", [{"allow_anonymous": True}, {"published_on": "127.0.0.1"}])
def test_it_starts_where_that_is_said_to_be_safe(
    checkpoint: TinyCheckpoint, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with LiveServer(settings_for(checkpoint, tmp_path, host="0.0.0.0", **settings)) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 200


@pytest.mark.parametrize(("metrics", "expected"), [("open", (200, 200)), ("key", (401, 200)), ("off", (401, 404))])
def test_metrics_are_open_to_all_only_where_that_is_set(
    checkpoint: TinyCheckpoint, tmp_path: Path, metrics: str, expected: tuple[int, int]
) -> None:
    with LiveServer(settings_for(checkpoint, tmp_path, metrics=metrics, api_key=STATIC)) as server:
        found = [
            httpx.get(f"{server.url}/metrics", headers=headers).status_code
            for headers in ({}, {"Authorization": f"Bearer {STATIC}"})
        ]
    assert tuple(found) == expected


@pytest.mark.parametrize(
    ("host", "exposed"),
    [
        *((host, False) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")),
        *((host, True) for host in ("0.0.0.0", "::", "", "10.0.0.1", "example.org")),
    ],
)
def test_only_loopback_is_out_of_reach(host: str, exposed: bool) -> None:
    assert Settings(host=host).is_reachable_from_elsewhere is exposed
    assert Settings(host="0.0.0.0", published_on=host or None).is_reachable_from_elsewhere is exposed
