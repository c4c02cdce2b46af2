"""What is acknowledged is there: through kills, restarts, another model, torn files, a lost Redis, a second server.

The servers are real processes on real sockets.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy
import pytest
import safetensors.numpy
from httpx_sse import EventSource
from support.models import TinyCheckpoint, write_tiny_checkpoint
from support.servers import ServerProcess, Upload

T = TypeVar("T")

FIRST = "The keeper of the lighthouse kept a key under the third stone. " * 12
SECOND = "Years later nobody remembered the stone, nor the key. " * 15
SHORT = FIRST[:300]  # no snapshot is due of it
ASK = {"prompt": "where is the key", "max_tokens": 64, "temperature": 0}
ENDED_BY_SIGTERM = {0, 143, -15}


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "redis":
        return str(request.getfixturevalue("redis_url"))
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/titans.db"


@pytest.fixture(scope="module")
def environment(checkpoint: TinyCheckpoint) -> dict[str, str]:
    return checkpoint.environment | {
        "TITANS_RESIDENT_BYTES": "0",  # the session used last stays in memory, no other
        "TITANS_SNAPSHOT_TOKENS": "500",  # a document and a half
    }


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


def create(server: ServerProcess) -> str:
    return str(server.http.post("/v1/sessions").raise_for_status().json()["id"])


def learn(server: ServerProcess, session: str, text: str, **headers: str) -> httpx.Response:
    headers = {"Content-Type": "text/plain"} | headers
    return server.http.post(f"/v1/sessions/{session}/documents", content=text, headers=headers)


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
    return response.status_code, response.json().get("error", {"code": ""})["code"]


def eventually(ask: Callable[[], T], is_there: Callable[[T], bool], seconds: float = 60) -> T:
    """The first answer that is the one waited for."""
    deadline = time.monotonic() + seconds
    while not is_there(answer := ask()):
        assert time.monotonic() < deadline, answer
        time.sleep(0.1)
    return answer


def state_of(server: ServerProcess, session: str) -> dict[str, Any]:
    """The session's state, by the names of its tensors."""
    blob = server.http.get(f"/v1/sessions/{session}/state").raise_for_status().content
    return safetensors.numpy.load(blob)


def assert_close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        numpy.testing.assert_allclose(x, theirs[name], rtol=1e-3, atol=1e-4, err_msg=name)


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert {name: x.tobytes() for name, x in ours.items()} == {name: x.tobytes() for name, x in theirs.items()}


def test_what_is_acknowledged_survives_a_kill_by_replay(server: ServerProcess) -> None:
    uninterrupted = with_first(server)
    learn(server, uninterrupted, SECOND).raise_for_status()
    session = with_first(server)
    before, state = look(server, session), state_of(server, session)
    assert (before[0]["version"], before[0]["tokens_seen"]) == (1, len(FIRST))
    assert before[1] != ask(server, uninterrupted).json()["text"], "the answer tells the states apart"

    server.kill()
    server.start()

    assert look(server, session)[1] == before[1]
    assert show(server, session)["version"] == 1
    assert_close(state_of(server, session), state)
    learn(server, session, SECOND).raise_for_status()
    assert_close(state_of(server, session), state_of(server, uninterrupted))
    assert ask(server, session).json()["text"] == ask(server, uninterrupted).json()["text"]


def test_what_is_written_down_on_sigterm_is_read_back_bit_for_bit(server: ServerProcess) -> None:
    session = with_first(server)
    before, state = look(server, session), state_of(server, session)
    server.terminate()
    server.start()
    assert_equal(state_of(server, session), state)
    assert look(server, session)[1] == before[1]


def test_a_kill_in_the_middle_of_a_document_leaves_the_session_as_it_was(server: ServerProcess) -> None:
    session = with_first(server)
    before = look(server, session)
    with Upload(server, session) as upload:
        upload.begin(SECOND)
        server.kill()
    server.start()
    after = look(server, session)
    assert (after[0]["version"], after[0]["tokens_seen"], after[1]) == (1, before[0]["tokens_seen"], before[1])
    assert learn(server, session, SECOND).json()["version"] == 2


def test_a_document_with_a_key_goes_on_after_a_kill_from_what_was_committed(server: ServerProcess) -> None:
    whole, session = with_first(server), with_first(server)
    expected = learn(server, whole, SECOND).json()
    with Upload(server, session, key="chapter-2") as upload:
        upload.begin(SECOND[:600])
        (ingestion,) = show(server, session)["ingestions"]
        committed = server.http.get(f"/v1/ingestions/{ingestion}").json()
        assert (committed["status"], committed["committed_bytes"] > 0) == ("receiving", True)
        server.kill()
    server.start()

    def again() -> httpx.Response:
        return learn(server, session, SECOND, **{"Idempotency-Key": "chapter-2"})

    learnt = eventually(again, lambda response: code(response) != (409, "ingestion_in_flight")).json()
    assert {x: learnt[x] for x in ("version", "tokens", "bytes", "tokens_seen")} == {
        x: expected[x] for x in ("version", "tokens", "bytes", "tokens_seen")
    }
    assert (learnt["ingestion"], learnt["replayed"]) == (ingestion, False)
    assert_close(state_of(server, session), state_of(server, whole))
    assert again().json() == learnt | {"replayed": True}
    other = learn(server, session, FIRST, **{"Idempotency-Key": "chapter-2"})
    assert code(other) == (422, "idempotency_key_reused")
    assert show(server, session)["version"] == 2


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
    assert_close(state_of(server, session), state_of(server, whole))


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
    assert look(server, session)[1] == before[1]
    assert show(server, session)["version"] == 1
    assert learn(server, session, SECOND).json()["version"] == 2


def test_a_session_of_another_model_is_refused_and_left_as_it_is(server: ServerProcess, tmp_path: Path) -> None:
    session, unread = with_first(server), create(server)
    before, state = look(server, session), state_of(server, session)
    server.terminate()

    other = write_tiny_checkpoint(tmp_path, seed=1)
    with ServerProcess(server.store, tmp_path / "log", other.environment) as stranger:
        shown = show(stranger, session)
        for theirs in (session, unread):
            for response in (
                learn(stranger, theirs, SECOND),
                ask(stranger, theirs),
                ask(stranger, theirs, memory="write"),
            ):
                assert code(response) == (409, "state_mismatch")
        own = with_first(stranger)

    server.start()
    assert look(server, session) == (shown, before[1])
    assert_equal(state_of(server, session), state)
    assert code(ask(server, own)) == (409, "state_mismatch")
    assert learn(server, session, SECOND).json()["version"] == 2


def truncated(state: bytes) -> bytes:
    return state[: len(state) // 2]


def flipped(state: bytes) -> bytes:
    middle = len(state) // 2
    return state[:middle] + bytes([state[middle] ^ 1]) + state[middle + 1 :]


@on_sqlite
@pytest.mark.parametrize("damage", [truncated, flipped])
def test_a_damaged_state_is_refused_and_left_as_it_is(server: ServerProcess, damage: Callable[[bytes], bytes]) -> None:
    session, healthy = create(server), create(server)
    learn(server, session, SHORT).raise_for_status()
    before = look(server, session)
    learn(server, healthy, SHORT).raise_for_status()  # the session used last: the other one has left memory
    folder = Path(server.store.removeprefix("sqlite:///") + ".states")
    (file,) = eventually(lambda: list(folder.glob(f"{session}-*.state")), lambda files: len(files) == 1)
    eventually(lambda: show(server, session)["stored_bytes"], lambda size: size == file.stat().st_size)
    state = file.read_bytes()
    file.write_bytes(damage(state))

    shown = show(server, session)
    for response in (learn(server, session, SECOND), ask(server, session), ask(server, session, memory="write")):
        assert code(response) == (500, "state_corrupted")
    assert show(server, session) == shown
    assert file.read_bytes() == damage(state)
    assert list(folder.glob(f"{session}-*")) == [file]
    assert ask(server, healthy).json()["text"] == before[1]
    assert learn(server, healthy, SECOND).json()["version"] == 2

    file.write_bytes(state)
    assert look(server, session)[1] == before[1]
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
        assert [look(server, cold)[1], look(server, session)[1]] == [text for _, text in before]
        assert learn(server, session, SECOND).json()["version"] == 2
        assert server.http.get("/health/ready").status_code == 200


def test_two_servers_serve_the_same_sessions(
    server: ServerProcess, environment: dict[str, str], tmp_path: Path
) -> None:
    with ServerProcess(server.store, tmp_path / "log", environment) as twin:
        session, through_one = create(server), create(server)
        for i, writer in enumerate([server, twin, server, twin]):
            document = f"Chapter {i}. {SECOND}"
            assert learn(writer, session, document).json()["version"] == i + 1
            assert show(server, session)["version"] == show(twin, session)["version"] == i + 1
            learn(server, through_one, document).raise_for_status()
        assert ask(server, session).json()["text"] == ask(twin, session).json()["text"]
        assert_close(state_of(twin, session), state_of(server, through_one))

        with ThreadPoolExecutor(4) as pool:  # whoever comes second learns again, after the first
            documents = [(writer, f"{i} {SECOND}") for i in range(3) for writer in (server, twin)]
            learnt = list(pool.map(lambda x: learn(x[0], session, x[1]).raise_for_status().json(), documents))
        assert sorted(x["version"] for x in learnt) == list(range(5, 11))
        assert len({x["tokens_seen"] for x in learnt}) == 6
        assert show(twin, session)["tokens_seen"] == max(x["tokens_seen"] for x in learnt)
        assert_close(state_of(server, session), state_of(twin, session))


def test_an_accepted_document_is_learnt_by_another_server_within_seconds_of_a_kill(
    server: ServerProcess, environment: dict[str, str], tmp_path: Path
) -> None:
    whole, long = create(server), SECOND * 12
    learn(server, whole, long).raise_for_status()
    with ServerProcess(server.store, tmp_path / "log", environment) as doomed:
        session = create(doomed)
        accepted = learn(doomed, session, long, Prefer="respond-async", **{"Idempotency-Key": "long"})
        assert (accepted.status_code, accepted.headers["Preference-Applied"]) == (202, "respond-async")
        doomed.kill()
    place = accepted.headers["Location"]
    # a lease of 3 s, a look every second, and the document itself; and whatever else the machine has to do
    done = eventually(lambda: server.http.get(place).json(), lambda status: status["status"] == "done", 120)
    assert (done["version"], done["committed_bytes"]) == (1, len(long))
    assert_close(state_of(server, session), state_of(server, whole))
