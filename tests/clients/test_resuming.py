"""Streams that are cut: picked up again after the last event that came, given up where they are not wanted."""

from collections.abc import Callable, Iterable
from typing import Any

import httpx
import pytest
from titans_client import APIConnectionError, APITimeoutError, InternalServerError, VersionConflictError

CHUNK = '{"id": "cmpl_1", "object": "completion.chunk", "session": "ses_1", "version": 1, "model": "m", "text": "%s"}'
CUT = httpx.ReadError("cut")
ERROR = '{"error": {"message": "moved on", "type": "t", "param": null, "code": "version_conflict"}}'


def event(number: int, data: str | None = None, name: str = "message") -> bytes:
    return f"id: {number}\nevent: {name}\ndata: {data or CHUNK % number}\n\n".encode()


class Script:
    """Answers one request after the other, and remembers them."""

    def __init__(self, pieces: Any, *answers: Iterable[bytes | Exception] | httpx.Response | Exception) -> None:
        self._pieces = pieces
        self._answers = list(answers)
        self.seen: list[httpx.Request] = []

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        if request.method == "DELETE":
            return httpx.Response(204)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return answer
        headers: dict[str, Any] = {
            "Content-Type": "text/event-stream",
            "X-Stream-ID": "str_1/ä".encode(),
            "Preference-Applied": "resumable",
        }
        return httpx.Response(200, headers=headers, stream=self._pieces(answer))

    @property
    def asked(self) -> list[tuple[str, str, str | None]]:
        return [(r.method, r.url.raw_path.decode(), r.headers.get("Last-Event-ID")) for r in self.seen]


def ask(client: Any) -> Any:
    return client.stream("ses_1", "Q")


@pytest.fixture
def script(pieces: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Script]:
    monkeypatch.setattr("titans_client._core.random.uniform", lambda *_: 0.0)
    return lambda *answers: Script(pieces, *answers)


def refused(status: int, code: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": code, "code": code}}, headers={"Retry-After": "0"})


FIRST, REST = ("POST", "/v1/sessions/ses_1/completions", None), "/v1/streams/str_1%2F%C3%A4"
END = event(9, "[DONE]")


@pytest.mark.parametrize("cut", [[CUT], []])
async def test_a_cut_stream_goes_on_after_the_last_event_that_came(driver: Any, script: Any, cut: list[Any]) -> None:
    half = event(4)[:20]
    rest = [event(3), half, *cut], CUT, refused(503, "overloaded"), [event(4), END]
    server = script([event(1), event(2), *cut], *rest)
    items = await driver.collect(server.handle, ask, max_retries=3)
    assert [item.text for item in items] == ["1", "2", "3", "4"]
    assert server.asked == [FIRST, ("GET", REST, "2"), *[("GET", REST, "3")] * 3]
    assert server.seen[0].headers["Prefer"] == "resumable"
    assert not server.seen[1].content


async def test_a_stream_that_is_cut_before_its_first_event_begins_anew(driver: Any, script: Any) -> None:
    server = script([CUT], [event(1), END])
    assert len(await driver.collect(server.handle, ask)) == 1
    assert server.asked == [FIRST, ("GET", REST, None)]


async def test_a_document_is_sent_once(driver: Any, script: Any) -> None:
    numbers = '"version": 1, "tokens": 1, "bytes": 4, "tokens_seen": 1, "seconds": 1'
    done = f'{{"object": "document", "session": "s", {numbers}}}'
    server = script([CUT], [event(1, done, "done"), event(2, "[DONE]")])
    items = await driver.collect(server.handle, lambda client: client.ingest_stream("ses_1", b"text"))
    assert [item.object for item in items] == ["document"]
    assert [request.content for request in server.seen] == [b"text", b""]


async def test_a_server_that_does_not_come_back_is_given_up(driver: Any, script: Any) -> None:
    server = script([event(1), CUT], CUT, CUT, CUT)
    with pytest.raises(APIConnectionError):
        await driver.collect(server.handle, ask, max_retries=2)
    assert [method for method, *_ in server.asked] == ["POST", "GET", "GET", "DELETE"]


async def test_a_server_that_takes_no_connection_in_time_is_asked_again(driver: Any, script: Any) -> None:
    server = script([event(1), CUT], httpx.ConnectTimeout("late"), [event(2), END])
    assert len(await driver.collect(server.handle, ask)) == 2
    assert server.asked == [FIRST, *[("GET", REST, "1")] * 2]


@pytest.mark.parametrize("silence", [[[event(1), httpx.ReadTimeout("")]], [[event(1), CUT], httpx.ReadTimeout("")]])
async def test_silence_is_told_at_once(driver: Any, script: Any, silence: Any) -> None:
    server = script(*silence)
    with pytest.raises(APITimeoutError):
        await driver.collect(server.handle, ask)
    assert len(server.asked) == len(silence) + 1  # and the stream is stopped


async def test_each_event_that_comes_renews_the_patience(driver: Any, script: Any) -> None:
    server = script(*[[event(i), CUT] for i in range(1, 9)], [END])
    assert len(await driver.collect(server.handle, ask, max_retries=1)) == 8


@pytest.mark.parametrize("code", ["stream_not_found", "events_lost"])
async def test_a_stream_that_is_kept_no_more_broke_off(driver: Any, script: Any, code: str) -> None:
    server = script([event(1), CUT], refused(404, code))
    with pytest.raises(APIConnectionError, match="cannot be resumed"):
        await driver.collect(server.handle, ask)
    assert [method for method, *_ in server.asked] == ["POST", "GET"]


async def test_a_stream_that_failed_is_not_asked_for_again(driver: Any, script: Any) -> None:
    server = script([event(1), event(2, ERROR, "error"), CUT])
    with pytest.raises(VersionConflictError):
        await driver.collect(server.handle, ask)
    assert server.asked == [FIRST]


async def test_what_is_no_cut_is_told_at_once(driver: Any, script: Any) -> None:
    server = script([event(1), CUT], refused(500, "internal_error"))
    with pytest.raises(InternalServerError):
        await driver.collect(server.handle, ask)


async def test_a_server_that_keeps_no_streams_is_not_asked_for_one(driver: Any, pieces: Any) -> None:
    headers = {"Content-Type": "text/event-stream", "X-Stream-ID": "str_1"}
    seen = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.method)
        return httpx.Response(200, headers=headers, stream=pieces([event(1), CUT]))

    with pytest.raises(APIConnectionError):
        await driver.collect(handle, ask)
    assert seen == ["POST"]


async def test_a_stream_that_is_given_up_is_stopped(driver: Any, script: Any) -> None:
    server = script([event(i) for i in range(1, 100)])

    async def read_one(client: Any) -> None:
        items = ask(client)
        await driver.first(items)
        assert [method for method, *_ in server.asked] == ["POST"]
        await driver.close(items)

    await driver.use(server.handle, read_one)
    assert server.asked == [FIRST, ("DELETE", REST, None)]


async def test_a_stream_that_has_ended_is_not_stopped(driver: Any, script: Any) -> None:
    server = script([event(1), END, CUT])
    assert len(await driver.collect(server.handle, ask)) == 1
    assert server.asked == [FIRST]
