"""Sessions in this process's memory: for tests, and for trying things out. Nothing survives it."""

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from titans_server.errors import VersionConflict
from titans_server.sessions.record import SessionRecord, moved_on, not_found, swept, taken
from titans_server.sessions.store import Commit, Usage


@dataclass
class _Kept:
    record: SessionRecord
    log: dict[int, bytes] = field(default_factory=dict)


class MemoryStore:
    """Dictionaries. No method waits for anything, so none can be cut off halfway."""

    name = "memory"

    def __init__(self) -> None:
        self._sessions: dict[str, _Kept] = {}
        self._blobs: dict[str, bytes] = {}
        self._unused_since: dict[str, float] = {}  # blobs that no record points at

    async def open(self) -> None:
        """Nothing to do."""

    async def create(self, commit: Commit) -> None:
        """Keep a new session."""
        record = commit.record
        if any(name not in self._blobs for name in record.snapshots()):
            raise VersionConflict(f"a snapshot for session {record.id} is there no more")
        if self._sessions.setdefault(record.id, _Kept(record, dict(commit.append))).record != record:
            raise taken(record.id)
        self._point(record)

    async def get(self, session_id: str) -> SessionRecord:
        """The record as of the last commit."""
        return self._find(session_id).record

    async def commit(self, commit: Commit) -> None:
        """Move a session on by one revision."""
        record = commit.record
        kept = self._find(record.id)
        if record.is_replaced_at(kept.record.revision, kept.record.write_id, commit.replaces):
            if not commit.point <= self._blobs.keys():
                raise swept(record.id)
            kept.record = record
            kept.log.update(commit.append)
            for number in commit.drop:
                kept.log.pop(number, None)
            self._point(record)
            self._release(commit.release)

    async def read_log(self, session_id: str, numbers: Sequence[int]) -> Sequence[bytes | None]:
        """Log entries by number."""
        kept = self._sessions.get(session_id)
        return [kept.log.get(number) if kept else None for number in numbers]

    async def write_blob(self, session_id: str, data: bytes) -> str:
        """Keep a blob."""
        name = f"{session_id}/{uuid.uuid4().hex}"
        self._blobs[name], self._unused_since[name] = data, time.time()
        return name

    async def read_blob(self, name: str) -> bytes | None:
        """A blob."""
        return self._blobs.get(name)

    async def delete(self, session_id: str, write_id: str | None = None) -> None:
        """Forget a session."""
        record = self._find(session_id).record
        if write_id not in {None, record.write_id}:
            raise moved_on(session_id)
        self._remove(record)

    async def is_listed(self, session_id: str, owner: str) -> bool:
        """Whether a session is the owner's."""
        return any(record.id == session_id for record in self._of(owner))

    async def list(self, owner: str, limit: int, after: str | None = None) -> Sequence[SessionRecord]:
        """An owner's sessions, newest first."""
        records = sorted(self._of(owner), key=lambda record: (record.created_at, record.id), reverse=True)
        names = [record.id for record in records]
        if after is not None and after not in names:
            raise not_found(after)
        start = 0 if after is None else 1 + names.index(after)
        return records[start : start + limit]

    async def usage(self, owner: str) -> Usage:
        """What the owner's sessions take."""
        records = self._of(owner)
        return Usage(len(records), sum(record.stored_bytes for record in records))

    async def due(self) -> Sequence[str]:
        """Sessions with an accepted document that nobody works on."""
        now = time.time()
        return [x.record.id for x in self._sessions.values() if (x.record.due_at or now) < now]

    async def sweep(self) -> None:
        """Delete sessions that have expired and blobs that nothing has pointed at for an hour."""
        now = time.time()
        for kept in list(self._sessions.values()):
            if kept.record.is_expired(now):
                self._remove(kept.record)
        for name in [name for name, since in self._unused_since.items() if since < now - 3600]:
            del self._blobs[name], self._unused_since[name]

    async def ping(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do: what was kept stays for as long as the object does."""

    def _of(self, owner: str) -> Sequence[SessionRecord]:
        now, records = time.time(), (kept.record for kept in self._sessions.values())
        return [record for record in records if record.owner == owner and not record.is_expired(now)]

    def _find(self, session_id: str) -> _Kept:
        kept = self._sessions.get(session_id)
        if kept is None or kept.record.is_expired(time.time()):
            raise not_found(session_id)
        return kept

    def _remove(self, record: SessionRecord) -> None:
        del self._sessions[record.id]
        self._release(record.snapshots())

    def _point(self, record: SessionRecord) -> None:
        for name in record.snapshots():
            self._unused_since.pop(name, None)

    def _release(self, names: Iterable[str]) -> None:
        for name in names:
            if not any(name in kept.record.snapshots() for kept in self._sessions.values()):
                self._blobs.pop(name, None)
