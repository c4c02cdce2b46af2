"""A session's past and copies: If-Match, versions, restore, forks, state files, listing, expiry."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
import safetensors.numpy
from support.records import logged
from support.servers import LiveServer, Upload
from titans_server.sessions import database
from titans_server.sessions.database import Database
from titans_server.sessions.record import SessionRecord
from titans_server.settings import Settings

ASK = {"prompt": "where", "max_tokens": 8, "temperature": 0}


def learn(http: httpx.Client, session: str, text: str, **headers: str) -> httpx.Response:
    headers = {"Content-Type": "text/plain"} | headers
    return http.post(f"/v1/sessions/{session}/documents", content=text, headers=headers)


def show(http: httpx.Client, session: str) -> dict[str, Any]:
    shown: dict[str, Any] = http.get(f"/v1/sessions/{session}").raise_for_status().json()
    return shown


def state(http: httpx.Client, session: str, version: int | None = None) -> dict[str, Any]:
    params = {} if version is None else {"version": version}
    blob = http.get(f"/v1/sessions/{session}/state", params=params).raise_for_status().content
    return {name: numpy.asarray(x) for name, x in safetensors.numpy.load(blob).items()}


def are_close(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """As close as a replay is."""
    return ours.keys() == theirs.keys() and all(
        numpy.allclose(x, theirs[name], rtol=1e-3, atol=1e-4) for name, x in ours.items()
    )


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.fixture
def read(http: httpx.Client, session: str) -> str:
    """A session that has read three documents."""
    for i in range(3):
        learn(http, session, f"document {i} says a thing. ").raise_for_status()
    return session


def test_a_write_is_done_at_the_version_it_names_and_at_no_other(http: httpx.Client, session: str) -> None:
    first = learn(http, session, "one", **{"If-Match": '"0"'})
    assert first.json()["version"] == 1
    path = f"/v1/sessions/{session}"
    stale = {"If-Match": '"0"'}
    for response in (
        learn(http, session, "two", **stale),
        learn(http, session, "two", Prefer="respond-async", **stale),
        learn(http, session, "two", **{"If-Match": '"no version"'}),
        learn(http, session, "two", **{"If-Match": '"0", "1"'}),  # one, not several
        http.post(f"{path}/restore", json={"version": 0}, headers=stale),
        http.post(f"{path}/restore", json={"version": 0}, headers=[("If-Match", '"1"'), ("If-Match", '"99"')]),
        http.put(f"{path}/state", content=http.get(f"{path}/state").content, headers=stale),
        http.delete(path, headers=stale),
    ):
        assert code(response) == (412, "version_conflict")
        assert response.headers["x-should-retry"] == "false"
    assert show(http, session)["version"] == 1
    assert learn(http, session, "two", **{"If-Match": "*"}).json()["version"] == 2
    assert http.delete(path, headers={"If-Match": 'W/"2"'}).status_code == 204  # as a proxy makes of it


ANSWER: dict[str, Any] = {"max_tokens": 2, "memory": "write"}
OPENAI: dict[str, Any] = {"model": "tiny-0"} | ANSWER
MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("memory", ["write", "read"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/sessions/{}/completions", {"prompt": "a"} | ANSWER),
        ("/v1/completions", {"prompt": "a"} | OPENAI),
        ("/v1/chat/completions", {"messages": MESSAGES} | OPENAI),
        ("/v1/responses", {"model": "tiny-0", "input": "a", "max_output_tokens": 2}),
    ],
)
def test_an_answer_is_of_the_version_it_names(
    http: httpx.Client, session: str, path: str, body: dict[str, Any], memory: str
) -> None:
    learn(http, session, "one")
    named = {} if "{}" in path else {"session": session}
    for version, status in (('"0"', 412), ('"no version"', 412), ('"1"', 200)):
        headers = {"If-Match": version}
        response = http.post(path.format(session), json=body | named | {"memory": memory}, headers=headers)
        assert response.status_code == status
        assert status == 200 or code(response) == (412, "version_conflict")
        assert show(http, session)["version"] == (2 if (status, memory) == (200, "write") else 1)


def test_a_conversation_is_changed_at_the_version_it_is_asked_to_be(http: httpx.Client, session: str) -> None:
    learn(http, session, "one")
    path = f"/v1/conversations/{session}"
    stale, items = {"If-Match": '"0"'}, {"items": MESSAGES}
    assert code(http.post(f"{path}/items", json=items, headers=stale)) == (412, "version_conflict")
    assert code(http.delete(path, headers=stale)) == (412, "version_conflict")
    assert show(http, session)["version"] == 1
    assert http.post(f"{path}/items", json=items, headers={"If-Match": '"1"'}).status_code == 200
    assert http.delete(path, headers={"If-Match": '"2"'}).status_code == 200


def test_a_session_that_another_server_writes_to_amid_its_deletion_under_if_match_stays(
    server: LiveServer, http: httpx.Client, read: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, looks = server.context.service._store, list[SessionRecord]()
    get = store.get

    def write() -> None:
        with closing(Database(Path(settings.store.removeprefix("sqlite:///")))) as other:
            other.open()
            other.commit(logged(looks[-1], b"theirs"))

    async def and_then(session_id: str) -> SessionRecord:
        looks.append(await get(session_id))
        if len(looks) == 2:  # the first one is at whose session it is
            await asyncio.to_thread(write)
        return looks[-1]

    with monkeypatch.context() as during:
        during.setattr(store, "get", and_then)
        response = http.delete(f"/v1/sessions/{read}", headers={"If-Match": '"3"'})
    assert code(response) == (412, "version_conflict")
    assert show(http, read)["version"] == 4


def test_the_last_versions_are_kept_and_any_of_them_is_restored(http: httpx.Client, read: str) -> None:
    path = f"/v1/sessions/{read}"
    versions = http.get(f"{path}/versions").json()["data"]
    assert [x["version"] for x in versions] == [3, 2, 1, 0]
    assert [x["tokens_seen"] for x in versions] == sorted((x["tokens_seen"] for x in versions), reverse=True)
    then = state(http, read, version=1)
    response = http.post(f"{path}/restore", json={"version": 1})
    assert (response.status_code, response.headers["ETag"], response.json()["version"]) == (200, '"4"', 4)
    assert response.json()["tokens_seen"] == versions[2]["tokens_seen"]
    assert are_close(state(http, read), then)
    learn(http, read, "document 4").raise_for_status()
    http.post(f"{path}/restore", json={"version": 3}).raise_for_status()  # what the rewind undid
    assert show(http, read)["tokens_seen"] == versions[0]["tokens_seen"]
    for number in (99, -1):
        response = http.post(f"{path}/restore", json={"version": number})
        assert response.status_code in {404, 422}
    for i in range(8):
        learn(http, read, f"another {i}").raise_for_status()
    kept = [x["version"] for x in http.get(f"{path}/versions").json()["data"]]
    assert kept == list(range(14, 6, -1))
    assert code(http.post(f"{path}/restore", json={"version": 3})) == (404, "version_not_found")


def test_a_fork_goes_its_own_way_from_any_version(http: httpx.Client, read: str) -> None:
    response = http.post(f"/v1/sessions/{read}/fork", json={"version": 2, "metadata": {"a": "fork"}})
    assert response.status_code == 201
    fork = response.json()
    assert response.headers["Location"] == f"/v1/sessions/{fork['id']}"
    assert (fork["version"], fork["parent"], fork["metadata"]) == (2, {"session": read, "version": 2}, {"a": "fork"})
    assert are_close(state(http, fork["id"]), state(http, read, version=2))
    before = state(http, read)
    assert learn(http, fork["id"], "its own").json()["version"] == 3
    assert are_close(state(http, read), before)
    http.delete(f"/v1/sessions/{read}").raise_for_status()
    again = http.post(f"/v1/sessions/{fork['id']}/fork").json()
    assert are_close(state(http, again["id"]), state(http, fork["id"]))
    assert code(http.post(f"/v1/sessions/{fork['id']}/fork", json={"version": 77})) == (404, "version_not_found")


def test_a_state_file_makes_another_session_what_one_was(http: httpx.Client, read: str, session: str) -> None:
    exported = http.get(f"/v1/sessions/{read}/state")
    assert exported.headers["ETag"] == '"3"'
    assert f"{read}-3.safetensors" in exported.headers["Content-Disposition"]
    other = http.post("/v1/sessions").json()["id"]
    imported = http.put(f"/v1/sessions/{other}/state", content=exported.content, headers={"If-Match": '"0"'})
    assert (imported.status_code, imported.json()["version"]) == (200, 1)
    assert imported.json()["tokens_seen"] == show(http, read)["tokens_seen"]
    assert are_close(state(http, other), state(http, read))
    answers = [http.post(f"/v1/sessions/{each}/completions", json=ASK).json()["text"] for each in (read, other)]
    assert answers[0] == answers[1]
    assert learn(http, other, "and on").json()["version"] == 2


def test_a_state_file_that_is_not_whole_or_not_this_models_changes_nothing(http: httpx.Client, read: str) -> None:
    path = f"/v1/sessions/{read}/state"
    blob, before = http.get(path).content, show(http, read)
    flipped = blob[:-5] + bytes([blob[-5] ^ 1]) + blob[-4:]
    parts = safetensors.numpy.load(blob)
    broken = parts | {"tail": parts["tail"] * float("nan")}
    header = {"format": "titans-session", "format_version": "1", "fingerprint": before["fingerprint"]}
    nan = safetensors.numpy.save(broken, metadata=header)
    stranger = safetensors.numpy.save(parts, metadata=header | {"fingerprint": "another"})
    reshaped = safetensors.numpy.save(parts | {"tail": parts["tail"][:, :1]}, metadata=header)
    huge = safetensors.numpy.save(parts | {"tail": 0 * parts["tail"] + 1e7}, metadata=header)  # texts make hundreds
    for content in (b"", b"not a state", blob[:-7], flipped, nan, huge, reshaped):
        assert code(http.put(path, content=content)) == (422, "invalid_state")
    assert code(http.put(path, content=stranger)) == (409, "state_mismatch")
    assert code(http.put(path, content=b"\0" * (8 << 20))) == (413, "document_too_large")
    assert show(http, read)["version"] == before["version"]


def test_a_state_file_that_waits_for_a_document_longer_than_an_hour_is_there_afterwards(
    http: httpx.Client, read: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, go = f"/v1/sessions/{read}", threading.Event()
    blob = http.get(f"{path}/state").content

    def slowly() -> Iterator[bytes]:
        yield b"a document that takes its time. "
        assert go.wait(60)
        yield b"its end."

    def document() -> int:
        headers = {"Content-Type": "text/plain"}
        return http.post(f"{path}/documents", content=slowly(), headers=headers).status_code

    with ThreadPoolExecutor(2) as pool:
        learning = pool.submit(document)
        time.sleep(0.5)
        importing = pool.submit(lambda: http.put(f"{path}/state", content=blob))
        time.sleep(0.5)
        assert not importing.done(), "one writer at a time"
        monkeypatch.setattr(database, "_ORPHAN_SECONDS", -60.0)  # as if the hour had passed
        store = Database(Path(settings.store.removeprefix("sqlite:///")))
        with closing(store):
            store.open()
            store.delete_orphans()
            go.set()
            assert learning.result() == 200
            assert importing.result().json()["version"] == 5
            snapshot = store.get(read).head.snapshot
            assert snapshot is not None
            assert store.blobs.read(snapshot.blob) is not None


@pytest.mark.parametrize("change", ["restore", "state"])
def test_a_change_whose_client_leaves_before_its_turn_is_not_made(
    server: LiveServer, http: httpx.Client, read: str, change: str
) -> None:
    path = f"/v1/sessions/{read}/{change}"
    blob = http.get(f"/v1/sessions/{read}/state?version=1").content
    asked: dict[str, Any] = {"method": "POST", "json": {"version": 1}}
    if change == "state":
        asked = {"method": "PUT", "content": blob}
    with Upload(server, read) as upload:
        upload.begin("a long document. " * 500)
        for _ in range(3):  # one may wait, no more: those that left wait no longer
            with pytest.raises(httpx.ReadTimeout):
                http.request(url=path, timeout=0.5, **asked)
        assert upload.finish()[1]["version"] == 4
    time.sleep(0.5)
    assert show(http, read)["version"] == 4
    assert http.request(url=path, **asked).json()["version"] == 5


def test_sessions_are_listed_newest_first_page_by_page(http: httpx.Client) -> None:
    made = [http.post("/v1/sessions").json()["id"] for _ in range(3)]
    first = http.get("/v1/sessions", params={"limit": 2}).json()
    assert ([x["id"] for x in first["data"]], first["has_more"]) == ([made[2], made[1]], True)
    rest = http.get("/v1/sessions", params={"limit": 1, "after": made[1]}).json()
    assert [x["id"] for x in rest["data"]] == [made[0]]
    assert code(http.get("/v1/sessions", params={"after": "ses_none"})) == (404, "session_not_found")
    assert http.get("/v1/sessions", params={"limit": 0}).status_code == 422


def test_a_session_expires(http: httpx.Client) -> None:
    made = http.post("/v1/sessions", json={"ttl_seconds": 1}).json()
    assert made["expires_at"] == made["updated_at"] + 1
    time.sleep(1.1)
    assert http.get(f"/v1/sessions/{made['id']}").status_code == 404
