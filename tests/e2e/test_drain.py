"""The end of a server: asked to stop, it says so, finishes what it can, and cuts nobody off."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from httpx_sse import connect_sse
from support.models import TinyCheckpoint
from support.servers import ServerProcess, Upload
from titans_server.sessions.open import open_store
from titans_server.sessions.record import SessionRecord

PLAIN = {"Content-Type": "text/plain"}
LONG = {"prompt": "x", "temperature": 1, "logit_bias": {"2": -100}}


def server_for(checkpoint: TinyCheckpoint, folder: Path, drain_seconds: int) -> ServerProcess:
    environment = checkpoint.environment | {"TITANS_DRAIN_SECONDS": str(drain_seconds)}
    return ServerProcess(f"sqlite:///{folder}/titans.db", folder / "log", environment)


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def ask(server: ServerProcess, max_tokens: int) -> dict[str, Any]:
    return LONG | {"model": server.http.get("/v1/models").json()["data"][0]["id"], "max_tokens": max_tokens}


def test_a_drain_is_told_lets_work_finish_and_takes_no_new(checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    with server_for(checkpoint, tmp_path, drain_seconds=60) as server:
        session = server.http.post("/v1/sessions").json()["id"]
        body = ask(server, 300) | {"stream": True}
        with (
            Upload(server, session) as upload,
            connect_sse(server.http, "POST", "/v1/completions", json=body) as stream,
        ):
            upload.begin("some words to learn " * 20)
            events = stream.iter_sse()
            next(events)
            server.ask_to_stop()

            ready = server.http.get("/health/ready")
            assert code(ready) == (503, "shutting_down")
            assert int(ready.headers["retry-after"]) > 0
            for response in (server.http.post("/v1/sessions"), server.http.post("/v1/completions", json=body)):
                assert code(response) == (503, "shutting_down")
            assert server.http.get("/health/live").status_code == 200
            assert "titans_http_requests_in_flight 3.0" in server.http.get("/metrics").text

            upload.send("and some more")
            assert upload.finish()[0] == "done"
            *rest, last, done = (event for event in events if event.data)
            assert done.data == "[DONE]"
            assert last.json()["choices"][0]["finish_reason"] == "length"
            assert len(rest) > 100
        assert server.wait() == 0


def test_a_stream_under_way_is_picked_up_and_stopped_in_a_drain(checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    with server_for(checkpoint, tmp_path, drain_seconds=60) as server:
        body, headers = ask(server, 4_000) | {"stream": True}, {"Prefer": "resumable"}
        paths = []
        for _ in range(2):
            with connect_sse(server.http, "POST", "/v1/completions", json=body, headers=headers) as stream:
                next(stream.iter_sse())
                paths.append(f"/v1/streams/{stream.response.headers['x-stream-id']}")
        server.ask_to_stop()
        assert server.http.delete(paths[0]).status_code == 204
        assert code(server.http.get("/v1/models")) == (503, "shutting_down")
        with connect_sse(server.http, "GET", paths[1], headers={"Last-Event-ID": "1"}) as stream:
            *_, last, done = (event for event in stream.iter_sse() if event.data)
        assert (last.json()["choices"][0]["finish_reason"], done.data) == ("length", "[DONE]")
        assert server.wait() == 0


def test_what_does_not_end_in_time_is_told_so_and_the_exit_is_clean(checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    with server_for(checkpoint, tmp_path, drain_seconds=1) as server, ThreadPoolExecutor(2) as pool:
        session = server.http.post("/v1/sessions").json()["id"]
        endless = ask(server, 4_000)

        with (
            Upload(server, session) as upload,
            connect_sse(server.http, "POST", "/v1/completions", json=endless | {"stream": True}) as stream,
        ):
            upload.begin("some words to learn " * 20)
            whole = pool.submit(httpx.post, f"{server.url}/v1/completions", json=endless, timeout=60)
            events = stream.iter_sse()
            next(events)
            time.sleep(0.3)
            asked = time.monotonic()
            server.ask_to_stop()
            *_, error, done = (event for event in events if event.data)
            assert (error.event, error.json()["error"]["code"]) == ("error", "shutting_down")
            assert done.data == "[DONE]"
            while (learnt := upload.event())[0] == "progress":
                pass
            assert (learnt[0], learnt[1]["error"]["code"]) == ("error", "shutting_down")
            assert code(whole.result()) == (503, "shutting_down")
        assert server.wait() == 0
        assert time.monotonic() - asked < 60
    assert asyncio.run(stored(server.store, session)).version == 0


def test_a_drain_waits_for_a_document_whose_stream_nobody_reads(checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    with server_for(checkpoint, tmp_path, drain_seconds=60) as server:
        session = server.http.post("/v1/sessions").json()["id"]
        headers = PLAIN | {"Prefer": "resumable"}
        text, path = "words " * 2_735, f"/v1/sessions/{session}/documents"  # all read while its first part is learnt
        with connect_sse(server.http, "POST", path, content=text, headers=headers) as stream:
            assert next(stream.iter_sse()).event == "progress"
        server.ask_to_stop()
        assert server.wait() == 0
    assert asyncio.run(stored(server.store, session)).version == 1


async def stored(url: str, session: str) -> SessionRecord:
    store = open_store(url)
    await store.open()
    try:
        return await store.get(session)
    finally:
        await store.close()
