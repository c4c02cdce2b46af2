"""Sessions in this process's memory: for tests, and for trying things out. Nothing survives it."""

from titans_server.sessions.store import SessionRecord, not_found, taken


class MemoryStore:
    """A dictionary. No method waits for anything, so none can be cut off halfway."""

    name = "memory"

    def __init__(self) -> None:
        self._sessions: dict[str, tuple[SessionRecord, bytes | None]] = {}

    async def open(self) -> None:
        """Nothing to do."""

    async def create(self, record: SessionRecord) -> None:
        """Keep a new session at version 0."""
        kept, _ = self._sessions.setdefault(record.id, (record, None))
        if kept != record:
            raise taken(record.id)

    async def get(self, session_id: str) -> SessionRecord:
        """The record as of the last commit."""
        return self._find(session_id)[0]

    async def load(self, record: SessionRecord) -> bytes:
        """The state that belongs to `record`."""
        current, state = self._find(record.id)
        record.check_current(current.version, current.write_id)
        return record.check_state(state)

    async def commit(self, record: SessionRecord, state: bytes) -> None:
        """Move the session on by one version."""
        current, _ = self._find(record.id)
        if record.needs_commit(current.version, current.write_id):
            self._sessions[record.id] = (record, state)

    async def delete(self, session_id: str) -> None:
        """Forget a session."""
        self._find(session_id)
        del self._sessions[session_id]

    async def ping(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do: what was kept stays for as long as the object does."""

    def _find(self, session_id: str) -> tuple[SessionRecord, bytes | None]:
        try:
            return self._sessions[session_id]
        except KeyError:
            raise not_found(session_id) from None
