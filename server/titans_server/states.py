"""Sessions' states: from memory, or from a snapshot and the log that follows it; and the snapshots that are due."""

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from titans.state import State

from titans_server import failpoints
from titans_server.engine import Engine
from titans_server.errors import StateCorrupted, StateMismatch, StoreUnavailable, TitansError, VersionConflict
from titans_server.observer import Observer
from titans_server.sessions import codec, history
from titans_server.sessions.cache import Held, StateCache
from titans_server.sessions.ledger import Ledger
from titans_server.sessions.record import SessionRecord, Snapshot, Version

log = logging.getLogger(__name__)

Moment = tuple[SessionRecord, State]  # what a session was when it was looked at

_ATTEMPTS = 5  # to read a session that others write
_MAX_EVICTED = 16  # states that wait for their snapshots after they had to leave memory; more are let go without


@dataclass(frozen=True)
class SnapshotPolicy:
    """When a state is written down, so that its tokens need not be read again."""

    tokens: int  # learnt since the last snapshot
    idle_seconds: float  # without anybody asking for the state
    entries: int = 64  # of the log since the last snapshot


class States:
    """What a session's versions are in tensors. Lives on the event loop, which owns the cache too."""

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        fingerprint: str,
        cache: StateCache,
        *,
        policy: SnapshotPolicy,
        observer: Observer,
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._fingerprint = fingerprint
        self._cache = cache
        self._policy = policy
        self._observer = observer
        self._loads: dict[str, asyncio.Task[State]] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # snapshots that are due, and of what had to leave memory
        self._due: set[str] = set()  # sessions with a snapshot under way because the log is long: one a session
        self._one_snapshot = asyncio.Lock()  # at a time: nobody waits for it
        self._idle: asyncio.Task[None] | None = None  # from `start` to `close`
        self.empty = engine.new_state()

    def start(self) -> None:
        """Begin to write down what nobody asks for any more."""
        self._idle = asyncio.create_task(self._watch_idle())

    def check(self, record: SessionRecord) -> None:
        """Raise StateMismatch for a session of another model."""
        if record.fingerprint != self._fingerprint:
            raise StateMismatch(
                f"session {record.id} was made by model {record.model} ({record.fingerprint}); "
                f"this server runs {self._fingerprint}"
            )

    async def newest(self, session_id: str, known: SessionRecord | None = None) -> Moment:
        """A session's record and its state. Raises StateMismatch, SessionNotFound, StateCorrupted.

        `known`: its record as the caller has just read it, which saves reading it again.
        """
        record, _, state = await self.read(session_id, None, known)
        return record, state

    async def read(
        self, session_id: str, number: int | None, known: SessionRecord | None = None
    ) -> tuple[SessionRecord, Version, State]:
        """A session's record, one of its versions (None: the newest) and that one's state. Raises VersionNotFound."""
        for _ in range(_ATTEMPTS):
            record = known or await self._ledger.store.get(session_id)
            known = None
            version = record.head if number is None else record.kept(number)
            with suppress(VersionConflict):  # a commit came between record and snapshot
                return record, version, await self.at(record, version)
        raise VersionConflict(f"session {session_id} moves on faster than it can be read")

    async def at(self, record: SessionRecord, version: Version) -> State:
        """The state of a version. Raises VersionConflict where it is kept no more, StateMismatch, StateCorrupted."""
        self.check(record)
        if not version.tokens:
            return self.empty
        return self._cache.get(record.id, version) or await self._load(record, version)

    def keep(self, session_id: str, version: Version, state: State) -> None:
        """Hold the state of a session's newest version in memory. What has to leave gets its snapshot first."""
        kept, left = self._cache.put(session_id, version, state)
        if session_id not in self._due and self.is_due(version.snapshot, state, len(version.entries)):
            self._due.add(session_id)
            self._spawn(self._store_due(kept))
        for held in left:
            if not held.is_stored and len(self._tasks) < _MAX_EVICTED:
                self._spawn(self._store_evicted(held))

    def keep_newest(self, record: SessionRecord, write_id: str, state: State) -> None:
        """`keep` the state that a write made, unless the session has gone on from there already."""
        if record.head.write_id == write_id:
            self.keep(record.id, record.head, state)

    def forget(self, session_id: str) -> None:
        """A session is gone."""
        self._cache.drop(session_id)

    async def store(self, session_id: str, state: State) -> Snapshot:
        """Write a state down as a snapshot that nothing points at yet."""
        blob = await asyncio.to_thread(codec.encode, state, self._fingerprint)
        digest = await asyncio.to_thread(codec.sha256, blob)
        failpoints.reach("before_blob")
        name = await self._ledger.store.write_blob(session_id, blob)
        failpoints.reach("after_blob")
        return Snapshot(name, digest, len(blob), int(state.position))

    def is_due(self, since: Snapshot | None, state: State, num_entries: int) -> bool:
        """Whether a state that goes on from a snapshot is to be written down, so that a replay stays short."""
        num_tokens = int(state.position) - (since.tokens if since else 0)
        return num_tokens >= self._policy.tokens or (num_entries >= self._policy.entries and num_tokens > 0)

    async def load_snapshot(self, snapshot: Snapshot) -> State | None:
        """A state as it was written down; None where the blob is gone. Raises StateCorrupted, StateMismatch."""
        blob = await self._ledger.store.read_blob(snapshot.blob)
        if blob is None:
            return None
        if await asyncio.to_thread(codec.sha256, blob) != snapshot.sha256:
            raise StateCorrupted(f"the snapshot {snapshot.blob} was altered or torn")
        return await asyncio.to_thread(codec.decode, blob, fingerprint=self._fingerprint, like=self.empty)

    async def close(self) -> None:
        """Write down what only the log has, so that the next server need not read it again."""
        if self._idle is not None:
            self._idle.cancel()
            await asyncio.gather(self._idle, return_exceptions=True)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for held in self._cache:
            if not await self._snapshot(held):
                break  # each of the others would wait as long, and the server has to end

    async def _load(self, record: SessionRecord, version: Version) -> State:
        """One load a version, however many ask."""
        key = f"{record.id}@{version.write_id}"
        task = self._loads.get(key)
        if task is None:
            task = self._loads[key] = asyncio.create_task(self._load_once(record, version))
            task.add_done_callback(lambda _: self._loads.pop(key, None))
        return await asyncio.shield(task)

    async def _load_once(self, record: SessionRecord, version: Version) -> State:
        with self._observer.working("load"):
            try:
                state = await self._recover(record, version)
            except StateCorrupted:
                newer = await self._ledger.store.get(record.id)
                kept = newer.made_by(version.write_id)
                if kept != version:  # another server's commit took it away, or it was given a snapshot, meanwhile
                    raise VersionConflict(f"session {record.id} has moved on from version {version.number}") from None
                raise
        if version == record.head:
            self.keep(record.id, version, state)
        return state

    async def _recover(self, record: SessionRecord, version: Version) -> State:
        """The snapshot, and the tokens that follow it, learnt again."""
        state = self.empty
        if version.snapshot is not None:
            loaded = await self.load_snapshot(version.snapshot)
            if loaded is None:
                raise StateCorrupted(f"the snapshot of session {record.id} at version {version.number} is missing")
            state = loaded
        state = await self._engine.place(state)
        if not version.num_to_replay:
            return state
        tokens = (await self._ledger.read(record.id, version.entries))[-version.num_to_replay :]
        if len(tokens) < version.num_to_replay:
            raise StateCorrupted(f"the log of session {record.id} is too short for version {version.number}")
        half = max(0, len(tokens) // 2 - (int(state.position) + len(tokens) // 2) % self._engine.window)
        state = await self._engine.ingest(state, tokens[:half], urgent=True) if half else state
        failpoints.reach("during_replay")
        return await self._engine.ingest(state, tokens[half:], urgent=True)

    async def _store_due(self, held: Held) -> None:
        try:
            await self._snapshot(held, is_recent=True)
        finally:
            self._due.discard(held.session_id)

    async def _store_evicted(self, held: Held) -> None:
        failpoints.reach("during_eviction")
        await self._snapshot(held)

    async def _snapshot(self, held: Held, *, is_recent: bool = False) -> bool:
        """Give a version its snapshot, unless it has one. Whatever goes wrong, the log has it all.

        Returns whether the store is there.
        """
        if held.is_stored:
            return True
        async with self._one_snapshot:
            try:
                record = await self._ledger.store.get(held.session_id)
                if history.lacking(record, held.version, is_recent=is_recent):  # no other server was faster
                    snapshot = await self.store(held.session_id, held.state)
                    attach = partial(history.attach, version=held.version, snapshot=snapshot, is_recent=is_recent)
                    record = await self._ledger.change(held.session_id, attach, known=record)
            except (StoreUnavailable, VersionConflict) as error:
                log.warning("no snapshot of session %s: %s", held.session_id, error)
                held.used_at = time.monotonic()  # another try once it has been idle again
                return not isinstance(error, StoreUnavailable)
            except TitansError as error:  # another server has deleted it, or nobody can read it
                log.warning("no snapshot of session %s, nor another try: %s", held.session_id, error)
                self._cache.drop(held.session_id)
            except Exception:
                log.exception("no snapshot of session %s, nor another try: a fault of the server's", held.session_id)
                self._cache.drop(held.session_id)
            else:
                held.is_stored = True
                held.version = record.made_by(held.version.write_id) or held.version
            return True

    async def _watch_idle(self) -> None:
        while True:
            await asyncio.sleep(self._policy.idle_seconds / 4)
            for held in self._cache:
                if held.used_at + self._policy.idle_seconds < time.monotonic():
                    await self._snapshot(held)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
