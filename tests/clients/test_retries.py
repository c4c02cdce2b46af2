"""What is tried again, how often and when; and what never is."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from titans_client import APIConnectionError, APIStatusError, ServerUnavailableError, TitansError

GET: Callable[[Any], Any] = lambda c: c.sessions.get("ses_1")  # noqa: E731
DELETE: Callable[[Any], Any] = lambda c: c.sessions.delete("ses_1")  # noqa: E731


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were slept; nobody sleeps."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("titans_client._client.time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr("titans_client._async_client.asyncio", SimpleNamespace(sleep=sleep))
    return slept


class Flaky:
    """Fails in the given ways, one after the other, then answers; a response is given out as a fresh copy."""

    def __init__(self, *failures: Exception | httpx.Response, answer: Any = None) -> None:
        self._failures = list(failures)
        self._answer = answer
        self.num_calls = 0

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.num_calls += 1
        if self._failures:
            failure = self._failures.pop(0)
            if isinstance(failure, Exception):
                raise failure
            headers = {"Retry-After": failure.headers.get("Retry-After", "")}
            return httpx.Response(failure.status_code, content=failure.content, headers=headers)
        return httpx.Response(204) if self._answer is None else httpx.Response(200, json=self._answer)


def refused(status: int, retry_after: str | None = None) -> httpx.Response:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    body = {"error": {"message": "later", "type": "t", "param": None, "code": "overloaded"}}
    return httpx.Response(status, json=body, headers=headers)


@pytest.mark.parametrize(
    "failure", [httpx.ConnectError("x"), httpx.ReadTimeout("x"), httpx.ReadError("x"), refused(503), refused(429)]
)
async def test_gets_and_deletes_are_tried_again(driver: Any, waits: list[float], wire: Any, failure: Any) -> None:
    flaky = Flaky(failure, failure, answer=wire["session"])
    assert (await driver.use(flaky.handle, GET)).id == "ses_1"
    await driver.use(Flaky(failure).handle, DELETE)
    assert flaky.num_calls == 3
    assert len(waits) == 3


async def test_the_server_says_how_long_to_wait(driver: Any, waits: list[float]) -> None:
    await driver.use(Flaky(refused(503, "7"), refused(429, "0")).handle, DELETE)
    assert waits == [7, 0]


async def test_else_the_wait_doubles_and_varies(driver: Any, waits: list[float]) -> None:
    await driver.use(Flaky(*[httpx.ConnectError("x")] * 4).handle, DELETE, max_retries=4)
    assert all(0.125 * 2**n <= wait <= 0.25 * 2**n for n, wait in enumerate(waits))
    assert len(waits) == 4


async def test_after_a_few_tries_the_error_is_raised(driver: Any, waits: list[float]) -> None:
    flaky = Flaky(*[refused(503, "0")] * 9)
    with pytest.raises(ServerUnavailableError, match="later"):
        await driver.use(flaky.handle, GET)
    assert flaky.num_calls == 3
    flaky = Flaky(httpx.ConnectError("x"))
    with pytest.raises(APIConnectionError):
        await driver.use(flaky.handle, GET, max_retries=0)
    assert flaky.num_calls == 1


async def test_a_server_that_asks_for_too_long_a_wait_is_not_waited_for(driver: Any, waits: list[float]) -> None:
    with pytest.raises(ServerUnavailableError) as caught:
        await driver.use(Flaky(refused(503, "3600")).handle, GET)
    assert caught.value.retry_after == 3600
    assert waits == []


@pytest.mark.parametrize("status", [400, 404, 409, 412, 500, 502])
async def test_other_refusals_are_final(driver: Any, waits: list[float], status: int) -> None:
    flaky = Flaky(refused(status))
    with pytest.raises(APIStatusError):
        await driver.use(flaky.handle, GET)
    assert flaky.num_calls == 1


@pytest.mark.parametrize("failure", [httpx.ConnectError("x"), refused(503, "0"), refused(429, "0")])
@pytest.mark.parametrize(
    "action",
    [
        lambda c: c.sessions.create(),
        lambda c: c.ingest("ses_1", "text"),
        lambda c: c.complete("ses_1", "Q"),
        lambda c: c.health(),  # not a POST, but "not now" is its answer
    ],
    ids=["create", "ingest", "complete", "health"],
)
async def test_posts_are_never_tried_again(driver: Any, waits: list[float], action: Any, failure: Any) -> None:
    flaky = Flaky(failure)
    with pytest.raises(TitansError):
        await driver.use(flaky.handle, action)
    assert flaky.num_calls == 1
    assert waits == []


async def test_waiting_for_a_server_ends_when_it_is_ready(driver: Any, waits: list[float], wire: Any) -> None:
    flaky = Flaky(httpx.ConnectError("x"), refused(503, "7"), httpx.ReadError("x"), answer=wire["health"])
    assert (await driver.use(flaky.handle, lambda c: c.wait_until_ready())).model == "tiny"
    assert flaky.num_calls == 4
    assert len(waits) == 3


async def test_waiting_for_a_server_ends_in_time(driver: Any, waits: list[float]) -> None:
    with pytest.raises(ServerUnavailableError, match="later"):
        await driver.use(Flaky(*[refused(503)] * 9).handle, lambda c: c.wait_until_ready(0))
    assert waits == []


async def test_nobody_waits_for_a_server_that_has_ended(driver: Any, waits: list[float]) -> None:
    alive = iter([True, False])
    with pytest.raises(APIConnectionError):
        await driver.use(
            Flaky(*[httpx.ConnectError("x")] * 9).handle, lambda c: c.wait_until_ready(is_alive=lambda: next(alive))
        )
    assert len(waits) == 1


async def test_what_waiting_cannot_mend_is_raised_at_once(driver: Any, waits: list[float]) -> None:
    flaky = Flaky(httpx.Response(500, text="out of order"))
    with pytest.raises(APIStatusError, match="out of order"):
        await driver.use(flaky.handle, lambda c: c.wait_until_ready())
    assert (flaky.num_calls, waits) == (1, [])
