"""Streams: read whatever way the bytes are cut, ended properly or not, given up."""

import asyncio
import gc
import json
from typing import Any

import httpx
import pytest
from titans_client import (
    APIConnectionError,
    APIResponseError,
    AsyncClient,
    Client,
    Document,
    Progress,
    SessionBusyError,
    SessionNotFoundError,
    VersionConflictError,
)

PROGRESS = {"tokens": 50, "bytes": 200, "seconds": 0.25}
ERROR = {"error": {"message": "moved on", "type": "invalid_request_error", "param": None, "code": "version_conflict"}}
CHUNK = {
    "id": "cmpl_1",
    "object": "completion.chunk",
    "session": "ses_1",
    "version": 1,
    "model": "tiny",
    "text": "",
    "finish_reason": None,
}
DONE = b"data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> bytes:
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def chunks(*texts: str) -> bytes:
    return b"".join(event(CHUNK | {"text": text}) for text in texts)


LAST = event(
    CHUNK | {"finish_reason": "stop", "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}}
)


def answer(stream: Any, status: int = 200, content_type: str = "text/event-stream; charset=utf-8") -> Any:
    return lambda request: httpx.Response(status, headers={"Content-Type": content_type}, stream=stream)


def ask(client: Any) -> Any:
    return client.stream("ses_1", "Q")


def learn(client: Any) -> Any:
    return client.ingest_stream("ses_1", "text")


async def texts(driver: Any, stream: Any) -> list[str]:
    return [chunk.text for chunk in await driver.collect(answer(stream), ask)]


async def test_a_completion_comes_in_pieces(driver: Any, pieces: Any) -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        response: httpx.Response = answer(pieces([chunks(" 48", "192"), LAST, DONE]))(request)
        return response

    *others, last = await driver.collect(handler, lambda c: c.stream("ses_1", "Q", max_tokens=4))
    assert [chunk.text for chunk in others] == [" 48", "192"]
    assert [chunk.finish_reason for chunk in others] == [None, None]
    assert last.finish_reason == "stop"
    assert last.usage.total_tokens == 3
    assert json.loads(seen[0].content) == {"prompt": "Q", "max_tokens": 4, "stream": True}
    assert seen[0].headers["Accept"] == "text/event-stream"
    assert seen[0].extensions["timeout"]["read"] is None


async def test_an_ingest_is_progress_and_then_its_document(driver: Any, pieces: Any, wire: Any) -> None:
    stream = pieces([event(PROGRESS, "progress") * 2, event(wire["document"], "done"), DONE])
    *progress, document = await driver.collect(answer(stream), learn)
    assert progress == [Progress(**PROGRESS)] * 2
    assert document == Document(**wire["document"])
    assert stream.closed


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
async def test_the_bytes_may_be_cut_anywhere(driver: Any, pieces: Any, newline: bytes) -> None:
    body = (b": ping\n\n" + chunks("Grüße ", "你好", "🌍\u2028") + LAST + DONE).replace(b"\n", newline)
    expected = ["Grüße ", "你好", "🌍\u2028", ""]
    for cut in range(1, len(body), 1 if newline == b"\n" else 7):
        assert await texts(driver, pieces([body[:cut], body[cut:]])) == expected
    assert await texts(driver, pieces([body[i : i + 1] for i in range(len(body))])) == expected


async def test_comments_ids_and_unknown_events_are_skipped(driver: Any, pieces: Any) -> None:
    noise = b": ping\n\nid: 7\n\nretry: 3000\n\nevent: later\ndata: not json\n\n"
    assert await texts(driver, pieces([noise, chunks("a"), noise, LAST, noise, DONE])) == ["a", ""]


async def test_an_error_inside_a_stream_raises_its_class(driver: Any, pieces: Any) -> None:
    for action, before in [(ask, chunks("a")), (ask, chunks("a") + LAST), (learn, event(PROGRESS, "progress"))]:
        stream = pieces([before, event(ERROR, "error"), DONE])
        with pytest.raises(VersionConflictError, match="moved on") as caught:
            await driver.collect(answer(stream), action)
        assert (caught.value.status, caught.value.code) == (412, "version_conflict")
        assert stream.closed


async def test_a_refused_stream_raises_its_class(driver: Any) -> None:
    body = {"error": {"message": "no session", "type": "t", "param": None, "code": "session_not_found"}}
    with pytest.raises(SessionNotFoundError, match="no session"):
        await driver.collect(lambda request: httpx.Response(404, json=body), ask)


async def test_a_refused_ingest_is_not_tried_again(driver: Any) -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        body = {"error": {"message": "busy", "type": "t", "param": None, "code": "session_busy"}}
        return httpx.Response(429, json=body, headers={"Retry-After": "3"})

    with pytest.raises(SessionBusyError) as caught:
        await driver.collect(handler, learn)
    assert caught.value.retry_after == 3
    assert len(seen) == 1


@pytest.mark.parametrize(
    "body",
    [
        [chunks("a")],
        [chunks("a"), LAST],  # not told that all is done
        [chunks("a"), b"data: [DO"],
        [chunks("a"), httpx.RemoteProtocolError("peer closed connection")],
        [chunks("a"), httpx.ReadError("reset")],
    ],
)
async def test_a_stream_that_breaks_off_is_an_error_after_what_has_come(driver: Any, pieces: Any, body: Any) -> None:
    stream = pieces(body)
    came: list[str] = []

    async def read(client: Any) -> None:
        items = ask(client)
        while True:
            came.append((await driver.first(items)).text)

    with pytest.raises(APIConnectionError, match="broke off"):
        await driver.use(answer(stream), read)
    assert came[0] == "a"
    assert stream.closed


async def test_an_ingest_that_ends_without_a_document_is_an_error(driver: Any, pieces: Any) -> None:
    with pytest.raises(APIConnectionError, match="before its end"):
        await driver.collect(answer(pieces([event(PROGRESS, "progress"), DONE])), learn)


async def test_what_happens_after_the_end_does_not_matter(driver: Any, pieces: Any, wire: Any) -> None:
    reset = httpx.ReadError("reset")
    assert await texts(driver, pieces([LAST, DONE, reset])) == [""]
    stream = pieces([event(wire["document"], "done"), reset])
    assert len(await driver.collect(answer(stream), learn)) == 1


async def test_what_is_not_a_stream_is_no_answer(driver: Any) -> None:
    page = lambda request: httpx.Response(200, html="<p>Welcome</p>")  # noqa: E731
    with pytest.raises(APIResponseError, match="text/html"):
        await driver.collect(page, ask)


async def test_an_event_of_another_shape_is_no_answer(driver: Any, pieces: Any) -> None:
    with pytest.raises(APIResponseError, match="CompletionChunk: text"):
        await driver.collect(answer(pieces([event({**CHUNK, "text": 5}), DONE])), ask)
    with pytest.raises(APIResponseError, match="not an error body"):
        await driver.collect(answer(pieces([event("?", "error")])), ask)


async def test_nothing_is_sent_before_the_first_piece_is_asked_for(driver: Any) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise AssertionError("a request was sent")

    async def abandon(client: Any) -> None:
        ask(client)
        await driver.close(ask(client))

    await driver.use(handler, abandon)


async def test_closing_a_stream_closes_the_connection(driver: Any, pieces: Any) -> None:
    stream = pieces([chunks("a")] * 1000)

    async def read_one(client: Any) -> None:
        items = ask(client)
        assert (await driver.first(items)).text == "a"
        assert not stream.closed
        await driver.close(items)
        await driver.close(items)
        assert stream.closed

    await driver.use(answer(stream), read_one)
    assert stream.num_sent == 1


def test_leaving_a_with_block_closes_the_connection(pieces: Any) -> None:
    stream = pieces([chunks("a")] * 1000)
    with Client(transport=httpx.MockTransport(answer(stream))) as client:
        with client.stream("ses_1", "Q") as items:
            assert next(items).text == "a"
        assert stream.closed


async def test_leaving_an_async_with_block_closes_the_connection(pieces: Any) -> None:
    stream = pieces([chunks("a")] * 1000)
    async with AsyncClient(transport=httpx.MockTransport(answer(stream))) as client:
        async with client.stream("ses_1", "Q") as items:
            assert (await anext(items)).text == "a"
        assert stream.closed


def test_leaving_a_loop_closes_the_connection(pieces: Any) -> None:
    stream = pieces([chunks("a")] * 1000)
    with Client(transport=httpx.MockTransport(answer(stream))) as client:
        for _ in client.stream("ses_1", "Q"):
            break
        gc.collect()
        assert stream.closed


async def test_leaving_an_async_loop_closes_the_connection(pieces: Any) -> None:
    stream = pieces([chunks("a")] * 1000)
    async with AsyncClient(transport=httpx.MockTransport(answer(stream))) as client:
        async for _ in client.stream("ses_1", "Q"):
            break
        gc.collect()
        for _ in range(10):
            await asyncio.sleep(0)
        assert stream.closed


async def test_a_cancelled_task_closes_the_connection(contract: Any) -> None:
    contract.endless = True
    async with AsyncClient(contract.url) as client:
        session = await client.sessions.create()

        async def read_all() -> None:
            async for _ in client.stream(session.id, "Q"):
                pass

        task = asyncio.create_task(read_all())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(contract.client_left.wait, 10)


def test_the_server_notices_that_a_reader_has_gone(contract: Any) -> None:
    contract.endless = True
    with Client(contract.url) as client:
        session = client.sessions.create()
        with client.stream(session.id, "Q") as items:
            assert next(items).text == " 48"
        assert contract.client_left.wait(10)


async def test_a_stream_waits_for_none_of_those_that_are_open(driver: Any, contract: Any, wire: Any) -> None:
    contract.sessions["ses_1"] = wire["session"]

    async def hold_many(client: Any) -> None:
        streams = [ask(client) for _ in range(101)]
        assert {(await driver.first(stream)).text for stream in streams} == {" 48"}
        for stream in streams:
            await driver.close(stream)

    await driver.use(None, hold_many, base_url=contract.url, work_timeout=10)


def test_a_stream_read_to_its_end_gives_the_connection_back(contract: Any) -> None:
    with Client(contract.url) as client:
        session = client.sessions.create()
        for _ in range(3):
            assert "".join(chunk.text for chunk in client.stream(session.id, "Q")) == " 4819203."
        pool = client._http._transport._pool  # type: ignore[attr-defined]
        assert [connection.is_idle() for connection in pool.connections] == [True]
