"""A version's state while other servers' commits come between: its record, its snapshot, its log."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pytest
from support.engines import states_on
from support.records import made
from titans_server.engine import Engine
from titans_server.errors import StateCorrupted, StoreUnavailable, VersionConflict
from titans_server.observer import Observer, Work
from titans_server.sessions import history
from titans_server.sessions.history import Writing
from titans_server.sessions.ledger import Ledger
from titans_server.sessions.memory import MemoryStore
from titans_server.sessions.record import SessionRecord
from titans_server.states import States

TOKENS = list(range(3, 90))


class Overtaken(MemoryStore):
    """Before the log is read the first time, another server writes the newest version down: its log goes."""

    def __init__(self) -> None:
        super().__init__()
        self.other: States | None = None
        self.ledger: Ledger | None = None

    async def read_log(self, session_id: str, numbers: Sequence[int]) -> Sequence[bytes | None]:
        if self.other is not None and self.ledger is not None:
            other, self.other = self.other, None
            _, state = await other.newest(session_id)
            snapshot = await other.store(session_id, state)
            await self.ledger.change(session_id, lambda record: history.attach(record, record.head, snapshot))
        return await super().read_log(session_id, numbers)


class Counting(MemoryStore):
    """Counts the blobs that are written for each session. One's record is torn; one fails as none should."""

    def __init__(self) -> None:
        super().__init__()
        self.num_blobs: Counter[str] = Counter()
        self.torn = self.broken = ""
        self.is_away = False

    async def get(self, session_id: str) -> SessionRecord:
        if session_id == self.torn:
            raise StateCorrupted("torn")
        return await super().get(session_id)

    async def write_blob(self, session_id: str, data: bytes) -> str:
        self.num_blobs[session_id] += 1
        if self.is_away:
            raise StoreUnavailable("away")
        if session_id == self.broken:
            raise RuntimeError("unforeseen")
        return await super().write_blob(session_id, data)


class Slow(Counting):
    """Takes longer to keep a blob than it takes to write the next versions."""

    async def write_blob(self, session_id: str, data: bytes) -> str:
        await asyncio.sleep(0.2)
        return await super().write_blob(session_id, data)


class Loads(Observer):
    """How loads have ended."""

    def __init__(self) -> None:
        self.ended_with: list[type[Exception] | None] = []

    @contextmanager
    def working(self, work: Work, num_tokens: int = 0) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.ended_with.append(type(error))
            raise
        self.ended_with.append(None)


async def written(store: MemoryStore, engine: Engine) -> SessionRecord:
    record = await made(store)
    state = await engine.ingest(engine.new_state(), TOKENS)
    writing = Writing(record.head, "w1", TOKENS, state.num_bytes, 8)
    return await Ledger(store).change(record.id, lambda record: history.write(record, writing))


async def test_a_replay_gives_the_state_that_was_learnt(engine: Engine) -> None:
    store = MemoryStore()
    record = await written(store, engine)
    _, state = await states_on(store, engine).newest(record.id)
    learnt = await engine.ingest(engine.new_state(), TOKENS)
    assert int(state.position) == len(TOKENS)
    for name, x in learnt.parts().items():
        assert x.allclose(state.parts()[name], rtol=1e-3, atol=1e-4), name


async def test_a_log_that_became_a_snapshot_meanwhile_is_read_as_that(engine: Engine) -> None:
    store = Overtaken()
    record = await written(store, engine)
    store.other, store.ledger = states_on(store, engine), Ledger(store)
    loads = Loads()
    now, version, state = await states_on(store, engine, observer=loads).read(record.id, 1)
    assert (now.revision, version.num_to_replay, int(state.position)) == (2, 0, len(TOKENS))
    assert loads.ended_with == [VersionConflict, None], "no damage is told of"


async def test_a_version_that_lost_its_log_is_corrupted(engine: Engine) -> None:
    store = MemoryStore()
    record = await written(store, engine)
    store._sessions[record.id].log.clear()
    with pytest.raises(StateCorrupted, match="missing"):
        await states_on(store, engine).newest(record.id)
    store._sessions[record.id].log[0] = b"torn"
    with pytest.raises(StateCorrupted, match="altered or torn"):
        await states_on(store, engine).newest(record.id)
    assert await store.get(record.id) == record


async def test_a_state_that_several_servers_hold_is_written_down_once(engine: Engine) -> None:
    store = Counting()
    record = await written(store, engine)
    servers = [states_on(store, engine) for _ in range(3)]
    for states in servers:
        await states.newest(record.id)
    for states in servers:
        await states.close()
    assert set(store._blobs) == set((await store.get(record.id)).snapshots()), "none was in vain"
    assert store.num_blobs[record.id] == 1


async def test_a_state_that_cannot_be_written_down_is_tried_once_and_keeps_no_other_from_it(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    store = Counting()
    deleted, torn, broken, whole = [await written(store, engine) for _ in range(4)]
    states = states_on(store, engine, idle_seconds=0.04)
    for record in (deleted, torn, broken, whole):
        await states.newest(record.id)
    await store.delete(deleted.id)  # by another server
    store.torn, store.broken = torn.id, broken.id
    states.start()
    async with asyncio.timeout(60):
        while (await store.get(whole.id)).head.num_to_replay:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)
    assert store.num_blobs == {broken.id: 1, whole.id: 1}
    for record in (deleted, torn, broken):
        lines = [x.getMessage() for x in caplog.records if record.id in x.getMessage()]
        assert len(lines) == 1
        assert "nor another try" in lines[0]
    await states.close()
    assert (await store.get(broken.id)).head.num_to_replay == len(TOKENS), "the log has it"


async def test_a_server_that_ends_does_not_ask_a_store_that_is_away_once_for_every_session(engine: Engine) -> None:
    store = Counting()
    records = [await written(store, engine) for _ in range(4)]
    states = states_on(store, engine)
    for record in records:
        await states.newest(record.id)
    store.is_away = True
    await states.close()
    assert store.num_blobs.total() == 1, "each of them would take as long as the store takes to not answer"


async def test_snapshots_of_a_session_that_is_written_to_all_the_time_keep_its_log_short(engine: Engine) -> None:
    store = Slow()
    record, ledger, states = await made(store), Ledger(store), states_on(store, engine)
    state = engine.new_state()
    for number in range(200):
        state = await engine.ingest(state, TOKENS[:2])
        writing = Writing(record.head, f"w{number}", TOKENS[:2], state.num_bytes, 8)
        record = await ledger.change(record.id, partial(history.write, writing=writing))
        states.keep_newest(record, writing.write_id, state)
        await asyncio.sleep(0.01)
    assert len(states._tasks) <= 1, "no state waits for its snapshot behind another one of its session"
    await states.close()
    record = await store.get(record.id)
    assert store.num_blobs[record.id] <= 200 // 64 + 1
    assert set(store._blobs) == set(record.snapshots()), "none was in vain"
    _, found = await states_on(store, engine).newest(record.id)
    assert int(found.position) == 400
    for name, x in state.parts().items():
        assert x.allclose(found.parts()[name], rtol=1e-3, atol=1e-4), name
