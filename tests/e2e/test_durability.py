"""What is acknowledged is there: through kills, restarts, another model, torn files, a lost Redis, a second server.

The servers are real processes on real sockets.
"""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.numpy
from httpx_sse import EventSource
from support.models import TinyCheckpoint, write_tiny_checkpoint
from support.servers import LiveServer, ServerProcess, Upload, free_port
from titans_server.sessions.memory import MemoryStore
from titans_server.sessions.open import open_store
from titans_server.sessions.store import SessionRecord
from titans_server.settings import Settings

FIRST = "The keeper of the lighthouse kept a key under the third stone. " * 12
SECOND = "Years later nobody remembered the stone, nor the key. " * 15
ASK = {"prompt": "where is the key", "max_tokens": 64, "temperature": 0}
ENDED_BY_SIGTERM = {0, 143, -15}


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "redis":
        return str(request.getfixturevalue("redis_url"))
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/titans.db"


@pytest.fixture(scope="module")
def environment(checkpoint: TinyCheckpoint) -> dict[str, str]:
    return checkpoint.environment | {"TITANS_RESIDENT_BYTES": "0"}  # the session used last stays in memory, no other


@pytest.fixture(scope="module")
def shared(
    store: str, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    with ServerProcess(store, tmp_path_factory.mktemp("server") / "log", environment) as server:
        yield server


@pytest.fixture
def server(shared: ServerProcess) -> ServerProcess:
    """A server that tests share and may stop, as each one finds it running."""
    if not shared.is_running():
        shared.start()
    return shared


on_sqlite = pytest.mark.parametrize("store", ["sqlite"], indirect=True)
on_redis = pytest.mark.parametrize("store", ["redis"], indirect=True)


def create(server: ServerProcess) -> str:
    return str(server.http.post("/v1/sessions").raise_for_status().json()["id"])


def learn(server: ServerProcess, session: str, text: str) -> httpx.Response:
    return server.http.post(f"/v1/sessions/{session}/documents", content=text, headers={"Content-Type": "text/plain"})


def ask(server: ServerProcess, session: str, **fields: Any) -> httpx.Response:
    return server.http.post(f"/v1/sessions/{session}/completions", json=ASK | fields)


def show(server: ServerProcess, session: str) -> dict[str, Any]:
    shown: dict[str, Any] = server.http.get(f"/v1/sessions/{session}").raise_for_status().json()
    return shown


def look(server: ServerProcess, session: str) -> tuple[dict[str, Any], str]:
    """All that can be seen of a session: its record, and what it answers."""
    return show(server, session), ask(server, session).raise_for_status().json()["text"]


def with_first(server: ServerProcess) -> str:
    """A session that has read FIRST."""
    session = create(server)
    assert learn(server, session, FIRST).json()["version"] == 1
    return session


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def stored(store: str, session: str) -> dict[str, Any]:
    """The state's tensors in the store, to the bit."""

    async def load() -> bytes:
        opened = open_store(store)
        await opened.open()
        try:
            return await opened.load(await opened.get(session))
        finally:
            await opened.close()

    parts = safetensors.numpy.load(asyncio.run(load()))
    assert parts
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in parts.items()}


def test_what_is_acknowledged_survives_a_kill_and_goes_on_bit_for_bit(server: ServerProcess) -> None:
    uninterrupted = with_first(server)
    learn(server, uninterrupted, SECOND).raise_for_status()
    session = with_first(server)
    before = look(server, session)
    assert (before[0]["version"], before[0]["tokens_seen"]) == (1, len(FIRST))
    assert before[1] != ask(server, uninterrupted).json()["text"], "the answer tells the states apart"

    server.kill()
    server.start()

    assert look(server, session) == before
    learn(server, session, SECOND).raise_for_status()
    assert stored(server.store, session) == stored(server.store, uninterrupted)
    assert ask(server, session).json()["text"] == ask(server, uninterrupted).json()["text"]


def test_a_kill_in_the_middle_of_a_document_leaves_the_session_as_it_was(server: ServerProcess) -> None:
    session = with_first(server)
    before = look(server, session)
    with Upload(server, session) as upload:
        upload.begin(SECOND)
        server.kill()
    server.start()
    assert look(server, session) == before
    assert learn(server, session, SECOND).json()["version"] == 2


def test_what_is_under_way_is_finished_after_sigterm(server: ServerProcess) -> None:
    asked, session = with_first(server), with_first(server)
    expected = ask(server, asked, max_tokens=500).json()
    body = ASK | {"max_tokens": 500, "stream": True}
    with (
        Upload(server, session) as upload,
        server.http.stream("POST", f"/v1/sessions/{asked}/completions", json=body) as response,
    ):
        upload.begin(SECOND[:500])
        events = EventSource(response).iter_sse()
        chunks = [next(events).json()]
        server.ask_to_stop()
        upload.send(SECOND[500:])
        name, learnt = upload.finish()
        *rest, done = events
        chunks += [event.json() for event in rest if event.data]  # a ping is read as an event without any
    assert server.wait() in ENDED_BY_SIGTERM

    assert done.data == "[DONE]"
    assert "".join(chunk["text"] for chunk in chunks) == expected["text"]
    assert chunks[-1]["usage"] == expected["usage"]
    assert (name, learnt["version"], learnt["bytes"]) == ("done", 2, len(SECOND))
    server.start()
    assert show(server, session)["version"] == 2
    assert show(server, session)["tokens_seen"] == learnt["tokens_seen"]
    whole = with_first(server)
    learn(server, whole, SECOND).raise_for_status()
    assert stored(server.store, session) == stored(server.store, whole)


@on_sqlite
def test_what_does_not_end_in_time_after_sigterm_is_given_up_whole(
    server: ServerProcess, environment: dict[str, str], tmp_path: Path
) -> None:
    session = with_first(server)
    before = look(server, session)
    hasty = environment | {"TITANS_DRAIN_SECONDS": "1"}
    with ServerProcess(server.store, tmp_path / "log", hasty) as other, Upload(other, session) as upload:
        upload.begin(SECOND)
        assert other.terminate() in ENDED_BY_SIGTERM
    assert look(server, session) == before
    assert learn(server, session, SECOND).json()["version"] == 2


def test_a_session_of_another_model_is_refused_and_left_as_it_is(server: ServerProcess, tmp_path: Path) -> None:
    session, unread = with_first(server), create(server)
    before, state = look(server, session), stored(server.store, session)
    server.terminate()

    other = write_tiny_checkpoint(tmp_path, seed=1)
    with ServerProcess(server.store, tmp_path / "log", other.environment) as stranger:
        assert show(stranger, session) == before[0]
        for theirs in (session, unread):
            for response in (
                learn(stranger, theirs, SECOND),
                ask(stranger, theirs),
                ask(stranger, theirs, memory="write"),
            ):
                assert code(response) == (409, "state_mismatch")
        own = with_first(stranger)

    server.start()
    assert look(server, session) == before
    assert stored(server.store, session) == state
    assert code(ask(server, own)) == (409, "state_mismatch")
    assert learn(server, session, SECOND).json()["version"] == 2


def test_a_commit_between_record_and_state_does_not_disturb_an_answer(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overtaken(MemoryStore):
        """Another server's commit comes first, once."""

        num_loads = 0

        async def load(self, record: SessionRecord) -> bytes:
            self.num_loads += 1
            if self.num_loads == 1:
                current, state = self._find(record.id)
                assert state is not None
                await self.commit(replace(current, version=current.version + 1, write_id="other"), state)
            return await super().load(record)

    store = Overtaken()
    monkeypatch.setattr("titans_server.app.open_store", lambda _: store)
    settings = Settings(
        port=free_port(),
        body=checkpoint.body,
        memory=checkpoint.memory,
        dtype="float32",
        threads=1,
        resident_bytes=0,
    )
    with LiveServer(settings) as live, httpx.Client(base_url=live.url, timeout=60) as http:
        paths = [http.post("/v1/sessions").headers["Location"] for _ in range(2)]
        for path in paths:  # the second pushes the first out of memory
            http.post(path + "/documents", content=FIRST, headers={"Content-Type": "text/plain"}).raise_for_status()
        answer = http.post(paths[0] + "/completions", json=ASK)
    assert (answer.status_code, answer.json().get("version"), store.num_loads) == (200, 2, 2)


def truncated(state: bytes) -> bytes:
    return state[: len(state) // 2]


def flipped(state: bytes) -> bytes:
    middle = len(state) // 2
    return state[:middle] + bytes([state[middle] ^ 1]) + state[middle + 1 :]


@on_sqlite
@pytest.mark.parametrize("damage", [truncated, flipped])
def test_a_damaged_state_is_refused_and_left_as_it_is(server: ServerProcess, damage: Callable[[bytes], bytes]) -> None:
    session = with_first(server)
    before = look(server, session)
    healthy = with_first(server)  # the session used last: the other one has to be read again
    folder = Path(server.store.removeprefix("sqlite:///") + ".states")
    (file,) = folder.glob(f"{session}-*.state")
    state = file.read_bytes()
    file.write_bytes(damage(state))

    for response in (learn(server, session, SECOND), ask(server, session), ask(server, session, memory="write")):
        assert code(response) == (500, "state_corrupted")
    assert show(server, session) == before[0]
    assert file.read_bytes() == damage(state)
    assert list(folder.glob(f"{session}-*")) == [file]
    assert ask(server, healthy).json()["text"] == before[1]
    assert learn(server, healthy, SECOND).json()["version"] == 2

    file.write_bytes(state)
    assert look(server, session) == before
    assert learn(server, session, SECOND).json()["version"] == 2


def test_a_redis_that_dies_is_told_and_comes_back_with_everything(
    start_redis: Callable[[], Any], environment: dict[str, str], tmp_path: Path
) -> None:
    redis = start_redis()
    with ServerProcess(redis.url, tmp_path / "log", environment) as server:
        cold, session = with_first(server), with_first(server)
        before = [look(server, cold), look(server, session)]
        with Upload(server, session) as upload:
            upload.begin(SECOND)
            redis.kill()
            for response in (
                learn(server, cold, SECOND),
                ask(server, session),
                ask(server, cold),
                server.http.get(f"/v1/sessions/{session}"),
                server.http.post("/v1/sessions"),
                server.http.get("/health/ready"),
            ):
                assert code(response) == (503, "store_unavailable")
                assert int(response.headers["Retry-After"]) > 0
            assert server.http.get("/health/live").status_code == 200
            name, error = upload.finish()
            assert (name, error["error"]["code"]) == ("error", "store_unavailable")

        redis.start()
        assert [look(server, cold), look(server, session)] == before
        assert learn(server, session, SECOND).json()["version"] == 2
        assert server.http.get("/health/ready").status_code == 200


@on_redis
def test_two_servers_serve_the_same_sessions(
    server: ServerProcess, environment: dict[str, str], tmp_path: Path
) -> None:
    with ServerProcess(server.store, tmp_path / "log", environment) as twin:
        session, through_one = create(server), create(server)
        for i, writer in enumerate([server, twin, server, twin]):
            document = f"Chapter {i}. {SECOND}"
            assert learn(writer, session, document).json()["version"] == i + 1
            assert show(server, session) == show(twin, session)
            learn(server, through_one, document).raise_for_status()
        assert look(server, session) == look(twin, session)
        assert stored(server.store, session) == stored(server.store, through_one)

        with Upload(server, session) as one, Upload(twin, session) as other:
            one.begin(FIRST)
            other.begin(SECOND)
            assert one.finish()[0] == "done"
            name, error = other.finish()
        assert (name, error["error"]["code"]) == ("error", "version_conflict")

        acknowledged = 5
        with ThreadPoolExecutor(2) as pool:
            for _ in range(5):
                both = list(pool.map(lambda writer: learn(writer, session, SECOND), (server, twin)))
                refused = [response for response in both if response.status_code != 200]
                assert {code(response) for response in refused} <= {(412, "version_conflict")}
                assert len(refused) < 2, "one of them is first"
                acknowledged += 2 - len(refused)
                assert show(server, session)["version"] == show(twin, session)["version"] == acknowledged
        assert look(server, session) == look(twin, session)
