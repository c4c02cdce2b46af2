"""The error tree: whole, told apart by code, and raised for whatever comes instead of an answer."""

import pickle
import re
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import pytest
import titans_client
from titans_client import APIConnectionError, APIResponseError, APIStatusError, APITimeoutError, TitansError
from titans_client._errors import BY_CODE, event_error, parse_retry_after, status_error

API = Path(__file__).parents[2] / "docs" / "api.md"


def documented() -> dict[str, int]:
    table = API.read_text(encoding="utf-8").partition("## Errors")[2]
    rows = re.findall(r"^\| (\d{3}) \| (.+?) \|", table, re.MULTILINE)
    return {code: int(status) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}


def body(code: str | None, message: str = "no", param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "t", "param": param, "code": code}}


def test_every_documented_code_has_its_class_and_no_other() -> None:
    assert {code: status for code, (status, _) in BY_CODE.items()} == documented()


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = set(re.findall(r"── (\w+)", titans_client._errors.__doc__ or ""))
    public = {name for name in titans_client.__all__ if name.endswith("Error")} - {"TitansError"}
    assert drawn == public
    assert all(issubclass(getattr(titans_client, name), TitansError) for name in public)


@pytest.mark.parametrize("code", BY_CODE)
async def test_a_code_raises_its_class(driver: Any, code: str) -> None:
    status, kind = BY_CODE[code]
    handler = lambda request: httpx.Response(status, json=body(code, "not so", "prompt"))  # noqa: E731
    with pytest.raises(kind, match="not so") as caught:
        await driver.use(handler, lambda c: c.complete("ses_1", "Q"))
    error = caught.value
    assert (error.status, error.code, error.message, error.param) == (status, code, "not so", "prompt")
    assert error.retry_after is None
    assert type(event_error('{"error": {"message": "x", "code": "%s"}}' % code)) is kind  # noqa: UP031


async def test_a_code_of_a_later_server_is_a_status_error(driver: Any) -> None:
    handler = lambda request: httpx.Response(402, json=body("quota_exhausted"))  # noqa: E731
    with pytest.raises(APIStatusError) as caught:
        await driver.use(handler, lambda c: c.health())
    assert type(caught.value) is APIStatusError
    assert (caught.value.status, caught.value.code) == (402, "quota_exhausted")


@pytest.mark.parametrize(("status", "name"), [(502, "APIStatusError"), (503, "ServerUnavailableError")])
async def test_a_gateways_page_is_a_status_error_in_one_line(driver: Any, status: int, name: str) -> None:
    page = lambda request: httpx.Response(status, html="<h1>Bad\n\nGateway</h1>" + "x" * 10_000)  # noqa: E731
    with pytest.raises(APIStatusError) as caught:
        await driver.use(page, lambda c: c.health())
    assert type(caught.value).__name__ == name
    assert caught.value.code is None
    assert str(caught.value).startswith(f"HTTP {status} ")
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


async def test_a_redirect_is_a_status_error_for_it_is_not_followed(driver: Any) -> None:
    handler = lambda request: httpx.Response(307, headers={"Location": "/elsewhere"})  # noqa: E731
    with pytest.raises(APIStatusError, match="307"):
        await driver.use(handler, lambda c: c.health())


@pytest.mark.parametrize("text", ["<p>Welcome</p>", "{}", "[]", "", '{"status": 5}'])
async def test_an_answer_of_another_shape_is_no_answer(driver: Any, text: str) -> None:
    with pytest.raises(APIResponseError, match="not a Health"):
        await driver.use(lambda request: httpx.Response(200, text=text), lambda c: c.health())


@pytest.mark.parametrize(
    ("cause", "kind", "message"),
    [
        (httpx.ConnectError("refused"), APIConnectionError, "cannot connect to http://127.0.0.1:8000: refused"),
        (httpx.ConnectTimeout(""), APITimeoutError, "cannot connect to http://127.0.0.1:8000: ConnectTimeout"),
        (httpx.ReadTimeout("timed out"), APITimeoutError, "no answer .* in time: timed out"),
        (httpx.ReadError("reset"), APIConnectionError, "broke off: reset"),
        (httpx.RemoteProtocolError("bad"), APIConnectionError, "broke off: bad"),
    ],
)
async def test_errors_of_the_connection_are_told_apart(
    driver: Any, cause: Exception, kind: type[APIConnectionError], message: str
) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise cause

    with pytest.raises(APIConnectionError, match=message) as caught:
        await driver.use(handler, lambda c: c.health())
    assert type(caught.value) is kind
    assert caught.value.__cause__ is cause


def test_a_closed_port_is_a_connection_error() -> None:
    client = titans_client.Client("http://127.0.0.1:1", max_retries=0)
    with client, pytest.raises(APIConnectionError, match="cannot connect"):
        client.sessions.get("ses_1")


def test_retry_after_is_seconds_or_a_date_or_nothing() -> None:
    assert parse_retry_after("5") == 5
    assert parse_retry_after("0") == 0
    assert parse_retry_after(None) is None
    assert parse_retry_after("soon") is None
    assert parse_retry_after("nan") is None
    assert parse_retry_after("-1") is None
    assert parse_retry_after("") is None
    assert parse_retry_after("Wed, 21 Oct 9999999999 07:28:00 GMT") is None
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert 50 < (parse_retry_after(formatdate(time.time() + 60, usegmt=True)) or 0) <= 60


def test_errors_can_be_pickled() -> None:
    error = status_error(429, b'{"error": {"message": "busy", "code": "session_busy"}}', "2")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert vars(again) == vars(error)
    assert str(again) == "busy"
