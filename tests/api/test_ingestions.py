"""Documents once only, and later: idempotency keys, 202, progress, cancel; and the kinds of bodies that are read."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from support.servers import LiveServer
from titans_server.sessions.record import SessionRecord

TEXT = "The keeper kept a key under the third stone, and told nobody of it. " * 6
HALF = TEXT.encode() * 8
FILE = b"--b\r\nContent-Disposition: form-data; name=f; filename=f\r\n"


def learn(http: httpx.Client, session: str, content: Any, **headers: str) -> httpx.Response:
    headers = {"Content-Type": "text/plain"} | headers
    return http.post(f"/v1/sessions/{session}/documents", content=content, headers=headers)


def later(http: httpx.Client, session: str, content: Any, **headers: str) -> httpx.Response:
    return learn(http, session, content, Prefer="wait=5, respond-async", **headers)


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def version(http: httpx.Client, session: str) -> int:
    return int(http.get(f"/v1/sessions/{session}").json()["version"])


def ended(http: httpx.Client, place: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while (status := http.get(place).json())["status"] in {"receiving", "learning"}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return dict(status)


class SlowBody:
    """A body whose second half is sent when it is let go."""

    def __init__(self, first: str, rest: str) -> None:
        self._parts = first, rest
        self.go = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        yield self._parts[0].encode()
        assert self.go.wait(60)
        yield self._parts[1].encode()


def test_a_document_with_a_key_is_learnt_once(http: httpx.Client, session: str) -> None:
    key = {"Idempotency-Key": "first"}
    learnt = learn(http, session, TEXT, **key).json()
    assert (learnt["version"], learnt["replayed"]) == (1, False)
    learn(http, session, "another").raise_for_status()
    assert learn(http, session, TEXT, **key).json() == learnt | {"replayed": True}
    assert learn(http, session, TEXT, **key, **{"If-Match": '"0"'}).json() == learnt | {"replayed": True}
    again = later(http, session, TEXT, **key)
    assert (again.status_code, again.json()["status"], again.json()["version"]) == (202, "done", 1)
    for other in (TEXT + "x", TEXT[:-1], "y"):
        assert code(learn(http, session, other, **key)) == (422, "idempotency_key_reused")
        assert code(later(http, session, other, **key)) == (422, "idempotency_key_reused")
    assert version(http, session) == 2
    elsewhere = http.post("/v1/sessions").json()["id"]
    assert learn(http, elsewhere, TEXT, **key).json()["replayed"] is False


def test_a_document_that_was_taken_back_is_learnt_anew(http: httpx.Client, session: str) -> None:
    learn(http, session, TEXT).raise_for_status()
    key = {"Idempotency-Key": "second"}
    first = learn(http, session, "the second", **key).json()
    http.post(f"/v1/sessions/{session}/restore", json={"version": 1}).raise_for_status()
    assert learn(http, session, "the second", **key, **{"If-Match": '"1"'}).status_code == 412
    again = learn(http, session, "the second", **key).json()
    assert again == first | {"version": 4, "ingestion": again["ingestion"], "seconds": again["seconds"]}
    assert version(http, session) == 4
    assert learn(http, session, "the second", **key).json() == again | {"replayed": True}


@pytest.mark.parametrize("key", ["", "x" * 256, "two words"])
def test_a_key_that_is_none_is_refused(http: httpx.Client, session: str, key: str) -> None:
    assert code(learn(http, session, TEXT, **{"Idempotency-Key": key})) == (422, "invalid_request")


def test_of_two_keys_neither_is_taken(http: httpx.Client, session: str) -> None:
    headers = [("Idempotency-Key", "one"), ("Idempotency-Key", "other"), ("Content-Type", "text/plain")]
    refused = http.post(f"/v1/sessions/{session}/documents", content=TEXT, headers=headers)
    assert code(refused) == (422, "invalid_request")
    assert "one Idempotency-Key, not several" in refused.json()["error"]["message"]
    assert version(http, session) == 0


def test_the_same_key_waits_while_its_document_is_on_its_way(http: httpx.Client, session: str) -> None:
    body, key = SlowBody(TEXT, TEXT), {"Idempotency-Key": "slow"}
    answers: list[httpx.Response] = []
    sender = threading.Thread(target=lambda: answers.append(learn(http, session, iter(body), **key)))
    sender.start()
    path = f"/v1/sessions/{session}"
    while not (ingestions := http.get(path).json()["ingestions"]):
        time.sleep(0.05)
    refused = learn(http, session, TEXT, **key)
    assert code(refused) == (409, "ingestion_in_flight")
    assert int(refused.headers["Retry-After"]) > 0
    status = http.get(f"/v1/ingestions/{ingestions[0]}").json()
    assert (status["status"], status["session"], status["version"]) == ("receiving", session, None)
    assert 0 < status["committed_bytes"] <= len(TEXT)
    body.go.set()
    sender.join()
    assert (answers[0].json()["version"], answers[0].json()["ingestion"]) == (1, ingestions[0])
    assert http.get(f"/v1/ingestions/{ingestions[0]}").json()["status"] == "done"


def test_a_document_that_waits_and_makes_no_sense_is_told_so_before_its_turn(http: httpx.Client, session: str) -> None:
    body, answers = SlowBody(TEXT, TEXT), list[httpx.Response]()
    sender = threading.Thread(target=lambda: answers.append(learn(http, session, iter(body))))
    sender.start()
    while not http.get(f"/v1/sessions/{session}").json()["ingestions"]:
        time.sleep(0.05)
    try:
        with httpx.Client(base_url=http.base_url, timeout=20) as client:
            for nonsense in (b"\xff", TEXT.encode() * 9 + b"\xff"):
                assert code(learn(client, session, nonsense)) == (422, "invalid_utf8")
            assert len(http.get(f"/v1/sessions/{session}").json()["ingestions"]) == 1
    finally:
        body.go.set()
        sender.join()
    assert (answers[0].status_code, answers[0].json()["version"]) == (200, 1)


def test_a_document_that_broke_off_goes_on_though_its_first_bytes_are_no_text(http: httpx.Client, session: str) -> None:
    headers = {"Content-Type": "application/json", "Idempotency-Key": "cut"}
    head, text = b'{"text": "', TEXT * 8

    def cut() -> Iterator[bytes]:
        yield head + text[: len(text) // 2].encode()
        while not http.get(f"/v1/sessions/{session}").json()["ingestions"]:
            time.sleep(0.05)
        raise ConnectionError

    def whole() -> Iterator[bytes]:
        yield head
        time.sleep(0.3)  # it arrives by itself
        yield text.encode() + b'"}'

    with pytest.raises(ConnectionError):
        learn(http, session, cut(), **headers)
    while (answer := learn(http, session, whole(), **headers)).status_code == 409:
        time.sleep(0.05)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["version"], answer.json()["bytes"]) == (1, len(text))


def test_an_accepted_document_is_learnt_afterwards(http: httpx.Client, session: str) -> None:
    accepted = later(http, session, TEXT)
    assert accepted.status_code == 202
    assert accepted.headers["Preference-Applied"] == "respond-async"
    status = ended(http, accepted.headers["Location"])
    assert (status["status"], status["version"], status["committed_bytes"]) == ("done", 1, len(TEXT))
    whole = http.post("/v1/sessions").json()["id"]
    learn(http, whole, TEXT).raise_for_status()
    states = [http.get(f"/v1/sessions/{each}/state").content for each in (session, whole)]
    assert len(states[0]) == len(states[1])
    assert http.get(f"/v1/sessions/{session}").json()["ingestions"] == []


def test_accepted_documents_are_learnt_in_the_order_in_which_they_came(http: httpx.Client, session: str) -> None:
    places = [later(http, session, f"{i} {TEXT}").headers["Location"] for i in range(4)]
    assert learn(http, session, "the last").json()["version"] == 5
    assert [ended(http, place)["version"] for place in places] == [1, 2, 3, 4]


def test_a_cancelled_document_leaves_the_session_as_it_was(http: httpx.Client, session: str) -> None:
    places = [later(http, session, TEXT * 8).headers["Location"] for _ in range(2)]
    cancelled = http.delete(places[1])
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert ended(http, places[0])["status"] == "done"
    assert http.delete(places[0]).json()["status"] == "done"
    assert version(http, session) == 1
    assert learn(http, session, "more").json()["version"] == 2
    assert http.get(places[1]).json()["status"] == "cancelled"


def test_a_document_is_as_old_at_its_end_as_it_was_at_its_beginning(http: httpx.Client, session: str) -> None:
    learnt, cancelled = [later(http, session, TEXT * 8).json() for _ in range(2)]
    http.delete(f"/v1/ingestions/{cancelled['id']}").raise_for_status()
    for accepted, status in [(learnt, "done"), (cancelled, "cancelled")]:
        at_the_end = ended(http, f"/v1/ingestions/{accepted['id']}")
        assert (at_the_end["status"], at_the_end["created_at"]) == (status, accepted["created_at"])


def test_whoever_sends_a_document_hears_that_it_was_cancelled(http: httpx.Client, session: str) -> None:
    body = SlowBody(TEXT, TEXT * 8)
    answers: list[httpx.Response] = []
    sender = threading.Thread(target=lambda: answers.append(learn(http, session, iter(body))))
    sender.start()
    while not (ingestions := http.get(f"/v1/sessions/{session}").json()["ingestions"]):
        time.sleep(0.05)
    http.delete(f"/v1/ingestions/{ingestions[0]}").raise_for_status()
    body.go.set()
    sender.join()
    assert code(answers[0]) == (409, "ingestion_cancelled")
    assert version(http, session) == 0


@pytest.mark.parametrize("ingestion", ["ing_none_1", "x", "ing_", "ing__"])
def test_an_unknown_ingestion_is_not_found(http: httpx.Client, session: str, ingestion: str) -> None:
    known = f"ing_{session.removeprefix('ses_')}_000000000000"
    for name in (ingestion, known):
        assert code(http.get(f"/v1/ingestions/{name}")) == (404, "ingestion_not_found")
        assert code(http.delete(f"/v1/ingestions/{name}")) == (404, "ingestion_not_found")


@pytest.mark.parametrize("send", [learn, later])
def test_an_empty_or_broken_document_leaves_nothing(
    http: httpx.Client, session: str, send: Callable[..., httpx.Response]
) -> None:
    key = {"Idempotency-Key": "k"}
    assert code(send(http, session, b"", **key)) == (422, "empty_document")
    assert code(send(http, session, TEXT.encode() + b"\xff", **key)) == (422, "invalid_utf8")
    while http.get(f"/v1/sessions/{session}").json()["ingestions"]:
        time.sleep(0.02)
    assert send(http, session, TEXT, **key).is_success


@pytest.mark.parametrize("send", [learn, later])
@pytest.mark.parametrize(
    ("kind", "first", "rest", "refusal"),
    [
        ("text/plain", HALF, b"\xff", (422, "invalid_utf8")),
        ("text/plain", HALF, HALF * 6, (413, "document_too_large")),
        (
            "multipart/form-data; boundary=b",
            FILE + b"\r\n" + HALF,
            b"\r\n" + FILE + b"Content-Type: text/plain; charset=latin-1\r\n\r\n",
            (415, "unsupported_media_type"),
        ),
    ],
)
def test_a_document_that_is_refused_half_way_leaves_nothing(
    http: httpx.Client,
    session: str,
    send: Callable[..., httpx.Response],
    kind: str,
    first: bytes,
    rest: bytes,
    refusal: tuple[int, str],
) -> None:
    begun: list[str] = []

    def body() -> Iterator[bytes]:
        yield first
        while not begun:
            begun.extend(http.get(f"/v1/sessions/{session}").json()["ingestions"])
        yield rest

    key = {"Idempotency-Key": "k"}
    assert code(send(http, session, body(), **key, **{"Content-Type": kind})) == refusal
    deadline = time.monotonic() + 20
    while http.get(f"/v1/sessions/{session}").json()["ingestions"]:
        assert time.monotonic() < deadline, "it waits for what can never be"
        time.sleep(0.02)
    assert code(http.get(f"/v1/ingestions/{begun[0]}")) == (404, "ingestion_not_found")
    assert send(http, session, TEXT, **key).is_success


def test_lines_and_forms_are_one_document(http: httpx.Client) -> None:
    texts = ["First, naïve.", "", 'Second: "quoted".\nNew line.', "Third."]
    expected = "\n\n".join(text for text in texts if text)
    lines = "\n".join(json.dumps({"text": text}) for text in texts) + "\r\n\n"
    files = [("a", ("a.txt", texts[0].encode(), "text/plain; charset=utf-8"))]
    files += [("b", ("b.json", json.dumps({"text": texts[2]}).encode(), "application/json"))]
    files += [("c", ("c.md", texts[3].encode(), "application/octet-stream"))]
    digests = []
    for kind in ("text", "lines", "form"):
        session = http.post("/v1/sessions").json()["id"]
        path = f"/v1/sessions/{session}/documents"
        if kind == "form":
            learnt = http.post(path, files=files)
        else:
            body = expected if kind == "text" else lines
            content_type = "text/plain" if kind == "text" else "application/x-ndjson"
            learnt = http.post(path, content=body.encode(), headers={"Content-Type": content_type})
        assert learnt.is_success, learnt.text
        digests.append((learnt.json()["bytes"], learnt.json()["tokens"]))
    assert digests == [(len(expected.encode()), digests[0][1])] * 3


def test_a_form_that_is_none_is_refused(http: httpx.Client, session: str) -> None:
    path = f"/v1/sessions/{session}/documents"
    good = {"Content-Type": "multipart/form-data; boundary=xyz"}
    head = b'--xyz\r\nContent-Disposition: form-data; name="a"'
    for content, headers in (
        (head + b"\r\n\r\nvalue\r\n--xyz--\r\n", good),
        (head + b'; filename="a"\r\n\r\nends early', good),
        (b"no form at all", good),
        (b"--xyz--", {"Content-Type": "multipart/form-data"}),
    ):
        assert code(http.post(path, content=content, headers=headers)) == (422, "invalid_form")
    lines = {"Content-Type": "application/x-ndjson"}
    assert code(http.post(path, content=b'{"text": "a"}\n{"txt": "b"}', headers=lines)) == (422, "invalid_json")
    assert version(http, session) == 0


def test_a_short_document_reads_its_record_three_times(
    server: LiveServer, http: httpx.Client, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose it is, what it is at, and again when its turn has come: the commit itself says if that is old."""
    store, read = server.context.service._store, list[str]()
    get = store.get

    async def counted(session_id: str) -> SessionRecord:
        read.append(session_id)
        return await get(session_id)

    monkeypatch.setattr(store, "get", counted)
    assert learn(http, session, "a few words").json()["version"] == 1
    assert read.count(session) == 3
