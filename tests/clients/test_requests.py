"""What each method sends, and what it makes of the answer."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from titans_client import AsyncClient, Client, Session

Wire = dict[str, dict[str, Any]]
ANSWERS = [
    ("create", 201, "session", lambda c: c.sessions.create()),
    ("get", 200, "session", lambda c: c.sessions.get("ses_1")),
    ("ingest", 200, "document", lambda c: c.ingest("ses_1", "text")),
    ("complete", 200, "completion", lambda c: c.complete("ses_1", "text")),
    ("health", 200, "health", lambda c: c.health()),
]


class Recorder:
    """Answers the same to all, and keeps what it was asked."""

    def __init__(self, body: Any, status: int = 200) -> None:
        self._body, self._status = body, status
        self.requests: list[httpx.Request] = []

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return httpx.Response(self._status, json=self._body)

    @property
    def request(self) -> httpx.Request:
        assert len(self.requests) == 1
        return self.requests[0]

    @property
    def line(self) -> str:
        return f"{self.request.method} {self.request.url.raw_path.decode()}"


@pytest.mark.parametrize(("status", "name", "action"), [answer[1:] for answer in ANSWERS], ids=[a[0] for a in ANSWERS])
async def test_an_answer_becomes_a_model_with_all_its_fields(
    driver: Any, wire: Wire, status: int, name: str, action: Callable[[Any], Any]
) -> None:
    result = await driver.use(Recorder(wire[name], status).answer, action)
    assert result.model_dump() == wire[name]


async def test_creating_without_metadata_sends_no_body(driver: Any, wire: Wire) -> None:
    recorder = Recorder(wire["session"], 201)
    await driver.use(recorder.answer, lambda c: c.sessions.create())
    assert recorder.line == "POST /v1/sessions"
    assert recorder.request.content == b""


async def test_metadata_is_sent_and_comes_back(driver: Any, wire: Wire) -> None:
    recorder = Recorder(wire["session"] | {"metadata": {"owner": "me"}}, 201)
    session = await driver.use(recorder.answer, lambda c: c.sessions.create({"owner": "me"}))
    assert json.loads(recorder.request.content) == {"metadata": {"owner": "me"}}
    assert session.metadata == {"owner": "me"}


async def test_deleting_takes_an_empty_answer(driver: Any) -> None:
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(f"{request.method} {request.url.path}")
        return httpx.Response(204)

    assert await driver.use(handler, lambda c: c.sessions.delete("ses_1")) is None
    assert seen == ["DELETE /v1/sessions/ses_1"]


async def test_an_id_cannot_name_another_resource(driver: Any, wire: Wire) -> None:
    recorder = Recorder(wire["session"])
    await driver.use(recorder.answer, lambda c: c.sessions.get("../x?y=1#z"))
    assert recorder.line == "GET /v1/sessions/..%2Fx%3Fy%3D1%23z"


@pytest.mark.parametrize("session_id", ["", ".", ".."])
async def test_an_id_that_is_none_is_refused_before_anything_is_sent(driver: Any, session_id: str) -> None:
    recorder = Recorder({})
    with pytest.raises(ValueError, match="not a session's id"):
        await driver.use(recorder.answer, lambda c: c.sessions.delete(session_id))
    assert recorder.requests == []


async def test_only_the_options_that_are_given_are_sent(driver: Any, wire: Wire) -> None:
    recorder = Recorder(wire["completion"])
    await driver.use(recorder.answer, lambda c: c.complete("ses_1", "Q", seed=None, temperature=0))
    assert recorder.line == "POST /v1/sessions/ses_1/completions"
    assert json.loads(recorder.request.content) == {"prompt": "Q", "temperature": 0}


async def test_all_options_go_by_their_names(driver: Any, wire: Wire) -> None:
    recorder = Recorder(wire["completion"])
    options: dict[str, Any] = {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "stop": ("\n", "."),
        "seed": 7,
        "memory": "write",
    }
    await driver.use(recorder.answer, lambda c: c.complete("ses_1", "Q", **options))
    assert json.loads(recorder.request.content) == {"prompt": "Q", **options, "stop": ["\n", "."]}


async def test_an_option_that_does_not_exist_is_a_type_error(driver: Any) -> None:
    with pytest.raises(TypeError, match="max_token"):
        await driver.use(Recorder({}).answer, lambda c: c.complete("ses_1", "Q", max_token=5))


@pytest.mark.parametrize("document", ["Grüße", "Grüße".encode()])
async def test_a_text_is_sent_as_utf8(driver: Any, wire: Wire, document: str | bytes) -> None:
    recorder = Recorder(wire["document"])
    await driver.use(recorder.answer, lambda c: c.ingest("ses_1", document))
    assert recorder.line == "POST /v1/sessions/ses_1/documents"
    assert recorder.request.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert recorder.request.headers["Accept"] == "application/json"
    assert recorder.request.content == "Grüße".encode()


async def test_a_document_may_be_of_another_type(driver: Any, wire: Wire) -> None:
    recorder = Recorder(wire["document"])
    action = lambda c: c.ingest("ses_1", b'{"text": "x"}', content_type="application/json")  # noqa: E731
    await driver.use(recorder.answer, action)
    assert recorder.request.headers["Content-Type"] == "application/json"


async def test_work_has_no_read_timeout_and_the_rest_has_one(driver: Any, wire: Wire) -> None:
    for name, action in [("document", ANSWERS[2][3]), ("completion", ANSWERS[3][3])]:
        recorder = Recorder(wire[name])
        await driver.use(recorder.answer, action, timeout=3)
        timeout = recorder.request.extensions["timeout"]
        assert (timeout["connect"], timeout["read"], timeout["write"]) == (3, None, None)
    recorder = Recorder(wire["session"])
    await driver.use(recorder.answer, ANSWERS[1][3], timeout=3)
    assert set(recorder.request.extensions["timeout"].values()) == {3}


async def test_a_base_url_may_have_a_path(driver: Any, wire: Wire) -> None:
    recorder = Recorder(wire["session"])
    await driver.use(recorder.answer, ANSWERS[1][3], base_url="https://example.org/titans/")
    assert str(recorder.request.url) == "https://example.org/titans/v1/sessions/ses_1"


async def test_the_environment_says_where_and_who(driver: Any, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITANS_BASE_URL", "http://titans.test:1234")
    monkeypatch.setenv("TITANS_API_KEY", "from-the-environment")
    recorder = Recorder(wire["health"])
    await driver.use(recorder.answer, lambda c: c.health())
    assert str(recorder.request.url) == "http://titans.test:1234/health/ready"
    assert recorder.request.headers["Authorization"] == "Bearer from-the-environment"


async def test_arguments_go_before_the_environment(driver: Any, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITANS_BASE_URL", "http://titans.test:1234")
    monkeypatch.setenv("TITANS_API_KEY", "from-the-environment")
    recorder = Recorder(wire["health"])
    await driver.use(recorder.answer, lambda c: c.health(), base_url="http://here", api_key="mine")
    assert str(recorder.request.url) == "http://here/health/ready"
    assert recorder.request.headers["Authorization"] == "Bearer mine"


async def test_by_default_it_is_the_local_server_and_nobody(driver: Any, wire: Wire) -> None:
    recorder = Recorder(wire["health"])
    await driver.use(recorder.answer, lambda c: c.health())
    assert str(recorder.request.url) == "http://127.0.0.1:8000/health/ready"
    assert "Authorization" not in recorder.request.headers


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://[::1", "http://host:70000"])
def test_an_address_that_is_none_is_refused_at_once(kind: type[Client] | type[AsyncClient], url: str) -> None:
    with pytest.raises(ValueError, match="not a server's address"):
        kind(url)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("key", ["secret\r", "secret\n", "secret ", " secret", "sec\x00ret", "sécret"])
def test_a_key_that_no_header_takes_is_refused_at_once_and_not_shown(
    kind: type[Client] | type[AsyncClient], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TITANS_API_KEY", raising=False)
    with pytest.raises(ValueError, match="not an API key") as error:
        kind(api_key=key)
    assert key.strip() not in str(error.value)
    if "\x00" not in key:
        monkeypatch.setenv("TITANS_API_KEY", key)
        with pytest.raises(ValueError, match="not an API key"):
            kind()


def test_models_are_frozen_and_keep_what_they_do_not_know(wire: Wire) -> None:
    session = Session.model_validate(wire["session"] | {"later": "ses_0"})
    assert session.model_dump()["later"] == "ses_0"
    with pytest.raises(ValidationError, match="frozen"):
        session.version = 2  # type: ignore[misc]
