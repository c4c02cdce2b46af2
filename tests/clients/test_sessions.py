"""Versions, forks, state files and documents once only or later, as both clients ask for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from titans_client import Ingestion, SessionList

INGESTION: dict[str, Any] = {
    "id": "ing_1_a",
    "object": "ingestion",
    "session": "ses_1",
    "status": "learning",
    "committed_bytes": 400,
    "tokens": 100,
    "tokens_learnt": 64,
    "version": None,
    "created_at": 1760000000.0,
    "error": None,
}
Asked = tuple[str, str, dict[str, str], bytes]


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (lambda c: c.sessions.list(5, "ses_9"), ("GET", "/v1/sessions?limit=5&after=ses_9", {}, b"")),
        (lambda c: c.sessions.versions("ses_1"), ("GET", "/v1/sessions/ses_1/versions", {}, b"")),
        (
            lambda c: c.sessions.restore("ses_1", 2, if_version=3),
            ("POST", "/v1/sessions/ses_1/restore", {"if-match": '"3"'}, b'{"version":2}'),
        ),
        (
            lambda c: c.sessions.fork("ses_1", 2, ttl_seconds=9),
            ("POST", "/v1/sessions/ses_1/fork", {}, b'{"version":2,"ttl_seconds":9}'),
        ),
        (lambda c: c.sessions.fork("ses_1"), ("POST", "/v1/sessions/ses_1/fork", {}, b"{}")),
        (lambda c: c.sessions.create(ttl_seconds=60), ("POST", "/v1/sessions", {}, b'{"ttl_seconds":60}')),
        (lambda c: c.sessions.export_state("ses_1", 1), ("GET", "/v1/sessions/ses_1/state?version=1", {}, b"")),
        (
            lambda c: c.sessions.import_state("ses_1", b"state", if_version=0),
            ("PUT", "/v1/sessions/ses_1/state", {"if-match": '"0"'}, b"state"),
        ),
        (
            lambda c: c.ingest_later("ses_1", "text", key="k", if_version=1),
            (
                "POST",
                "/v1/sessions/ses_1/documents",
                {"idempotency-key": "k", "if-match": '"1"', "prefer": "respond-async"},
                b"text",
            ),
        ),
        (
            lambda c: c.ingest("ses_1", "text", key="k", if_version=1),
            ("POST", "/v1/sessions/ses_1/documents", {"idempotency-key": "k", "if-match": '"1"'}, b"text"),
        ),
        (lambda c: c.ingestion("ing_1_a"), ("GET", "/v1/ingestions/ing_1_a", {}, b"")),
        (lambda c: c.cancel_ingestion("ing_1_a"), ("DELETE", "/v1/ingestions/ing_1_a", {}, b"")),
    ],
)
async def test_every_call_asks_for_what_the_server_offers(
    driver: Any, wire: dict[str, dict[str, Any]], action: Callable[[Any], Any], expected: Asked
) -> None:
    asked: list[Asked] = []

    def answer(request: httpx.Request) -> httpx.Response:
        shown = {name: request.headers[name] for name in expected[2] if name in request.headers}
        asked.append((request.method, request.url.raw_path.decode(), shown, request.read()))
        document = wire["document"] if "prefer" not in request.headers else INGESTION
        session = wire["session"]
        listing = {"data": [session], "has_more": False}
        versions = {"data": [{"version": 1, "tokens_seen": 7, "created_at": 1.5}]}
        bodies = {"documents": document, "ing_1_a": INGESTION, "sessions": listing, "versions": versions}
        name = request.url.path.rpartition("/")[2]
        body = session if request.method == "POST" and name == "sessions" else bodies.get(name, session)
        return httpx.Response(200, json=body)

    await driver.use(answer, action)
    assert asked == [expected]


async def test_answers_are_models(driver: Any, wire: dict[str, dict[str, Any]]) -> None:
    listing = {"object": "list", "data": [wire["session"]], "has_more": True}
    listed = await driver.use(lambda _: httpx.Response(200, json=listing), lambda c: c.sessions.list())
    assert isinstance(listed, SessionList)
    assert ([x.id for x in listed.data], listed.has_more) == (["ses_1"], True)
    later = await driver.use(lambda _: httpx.Response(202, json=INGESTION), lambda c: c.ingestion("ing_1_a"))
    assert isinstance(later, Ingestion)
    assert json.loads(later.model_dump_json()) == INGESTION
    blob = await driver.use(lambda _: httpx.Response(200, content=b"\0\1"), lambda c: c.sessions.export_state("s"))
    assert blob == b"\0\1"


async def test_a_state_is_imported_from_a_path(driver: Any, wire: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"state")
    sent: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.read())
        return httpx.Response(200, json=wire["session"])

    async def answer_async(request: httpx.Request) -> httpx.Response:
        sent.append(await request.aread())
        return httpx.Response(200, json=wire["session"])

    handler = answer if driver.kind == "sync" else answer_async
    await driver.use(handler, lambda c: c.sessions.import_state("ses_1", tmp_path / "state"))
    assert sent == [b"state"]
