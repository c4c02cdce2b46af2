"""What every store promises. A store is a compare-and-set register a session, not a lock service.

A commit is atomic and durable: it either moves the session from one version to the next, state and record
together, or changes nothing. `tests/sessions/test_store.py` holds every store to this.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from titans_server.errors import SessionNotFound, StateCorrupted, VersionConflict


def sha256(state: bytes) -> str:
    """What goes into `SessionRecord.state_sha256`: lower-case hexadecimal."""
    return hashlib.sha256(state).hexdigest()


@dataclass(frozen=True)
class SessionRecord:
    """What is known of a session without loading its state."""

    id: str
    model: str
    fingerprint: str  # of the model that made the state
    created_at: float  # seconds since the epoch
    updated_at: float
    version: int = 0  # commits so far; 0: created, nothing read yet, no state stored
    tokens_seen: int = 0
    state_bytes: int = 0
    state_sha256: str = ""  # of the stored state; empty at version 0
    write_id: str = ""  # of the commit that made this version; every commit has another
    owner: str = ""  # "": nobody in particular
    metadata: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """ASCII; `from_json` reads it back, equal."""
        return json.dumps(vars(self) | {"metadata": dict(self.metadata)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> "SessionRecord":
        """The inverse of `to_json`. Raises StateCorrupted where the text is nothing that it wrote."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise StateCorrupted("the store holds a session record that cannot be read") from error

    def needs_commit(self, version: int, write_id: str) -> bool:
        """Whether a session that stands at `version`, made by `write_id`, is still to be moved to this record.

        False where this very commit is done already. Raises VersionConflict where the session is not at the
        version before.
        """
        assert self.version > 0 and self.write_id
        if (version, write_id) == (self.version, self.write_id):
            return False
        if version != self.version - 1:
            raise VersionConflict(f"session {self.id} is at version {version}, not at {self.version - 1}")
        return True

    def check_current(self, version: int, write_id: str) -> None:
        """Raise VersionConflict unless a session that stands at `version`, made by `write_id`, is this one."""
        if (version, write_id) != (self.version, self.write_id):
            raise VersionConflict(f"session {self.id} is at version {version}, no longer at {self.version}")

    def check_state(self, state: bytes | None) -> bytes:
        """The state, where it is the one that was committed. Raises StateCorrupted if not, or if there is none."""
        if state is None:
            raise StateCorrupted(f"the state of session {self.id} at version {self.version} is missing")
        if sha256(state) != self.state_sha256:
            raise StateCorrupted(f"the state of session {self.id} at version {self.version} was altered or torn")
        return state


def not_found(session_id: str) -> SessionNotFound:
    """The error for a session that the store does not have."""
    return SessionNotFound(f"no session {session_id}")


def taken(session_id: str) -> VersionConflict:
    """The error for a new session whose id another one has."""
    return VersionConflict(f"there is a session {session_id} already")


class SessionStore(Protocol):
    """A place that keeps sessions.

    Every method raises StoreUnavailable where the store cannot be reached or cannot write (disk full, memory
    full); nothing has changed then, or it has changed whole. A caller may be cancelled at any time: what it
    asked for is then done whole or not at all, and the store goes on.
    """

    @property
    def name(self) -> str:
        """What kind of store this is: "memory", "sqlite", "redis"."""

    async def open(self) -> None:
        """Connect, and make what is missing. The first call; making the object touches nothing outside."""

    async def create(self, record: SessionRecord) -> None:
        """Keep a new session at version 0.

        Raises VersionConflict where another record has its id; the same one again is kept already.
        """

    async def get(self, session_id: str) -> SessionRecord:
        """The record as of the last commit. Raises SessionNotFound."""

    async def load(self, record: SessionRecord) -> bytes:
        """The state that belongs to `record`, a version of at least 1.

        Raises SessionNotFound where the session is gone, VersionConflict where a later commit has replaced it,
        and StateCorrupted where the bytes are missing or not those of `record.state_sha256`.
        """

    async def commit(self, record: SessionRecord, state: bytes) -> None:
        """Move the session to `record.version` from the one before, with its state.

        Raises VersionConflict where it stands at another version, SessionNotFound where it is gone. A commit
        whose `write_id` is the session's last is done already: it answers at once.
        """

    async def delete(self, session_id: str) -> None:
        """Forget a session and its state. Raises SessionNotFound."""

    async def ping(self) -> None:
        """Do nothing, where the store can be reached."""

    async def close(self) -> None:
        """Finish what has begun, then let go of files and connections."""
