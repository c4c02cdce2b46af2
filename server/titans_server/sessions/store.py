"""What every store promises. A store is a compare-and-set register a session, not a lock service.

It keeps three things: a small record, which every commit replaces; numbered log entries, which are added in the same
commit; and blobs, which are durable before a commit points at them. Entries and blobs never change. What the record
no longer points at goes; what nothing points at is swept. `tests/sessions/test_store.py` holds every store to this.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from titans_server.sessions.record import SessionRecord


@dataclass(frozen=True)
class Commit:
    """A step of a session from one revision to the next: done whole, or not at all."""

    record: SessionRecord  # as it is to be
    append: Mapping[int, bytes] = field(default_factory=dict)  # new log entries, by number
    drop: frozenset[int] = frozenset()  # log entries that the record no longer points at
    release: frozenset[str] = frozenset()  # blobs that it no longer points at
    point: frozenset[str] = frozenset()  # the session's own blobs that it points at from now on
    replaces: str = ""  # the `write_id` of the record whose place it takes


@dataclass(frozen=True)
class Usage:
    """What an owner's sessions take."""

    sessions: int
    num_bytes: int


class SessionStore(Protocol):
    """A place that keeps sessions.

    Every method raises StoreUnavailable where the store cannot be reached or cannot write (disk full, memory
    full); nothing has changed then, or it has changed whole. A caller may be cancelled at any time: what it
    asked for is then done whole or not at all, and the store goes on. Sessions past their `expires_at` are not found.
    """

    @property
    def name(self) -> str:
        """What kind of store this is: "memory", "sqlite", "redis"."""

    async def open(self) -> None:
        """Connect, make what is missing, and take over what an older format left.

        The first call; making the object touches nothing outside. Raises StoreUnavailable for a format or a setting
        that cannot be lived with.
        """

    async def create(self, commit: Commit) -> None:
        """Keep a new session. Blobs that its record points at may be other sessions', and are shared from now on.

        Raises VersionConflict where another record has its id (the same one again is kept already), or where a blob
        is there no more.
        """

    async def get(self, session_id: str) -> SessionRecord:
        """The record as of the last commit. Raises SessionNotFound, and StateCorrupted for one that is unreadable."""

    async def commit(self, commit: Commit) -> None:
        """Move a session to `commit.record.revision` from the one before, as `commit.replaces` left it.

        Raises VersionConflict where it stands at another, also one of the same number, as after a failover that lost
        commits; SessionNotFound where it is gone. A commit whose `write_id` is the session's last is done already: it
        answers at once. Raises StoreUnavailable where a blob of `point` was swept meanwhile: nothing has changed, and
        what the blob was to replace is there.
        """

    async def read_log(self, session_id: str, numbers: Sequence[int]) -> Sequence[bytes | None]:
        """Log entries by number; None for those that are not there."""

    async def write_blob(self, session_id: str, data: bytes) -> str:
        """Keep a blob that a commit of the session will point at, durably. Returns its name.

        One that no commit points at within an hour is swept.
        """

    async def read_blob(self, name: str) -> bytes | None:
        """A blob; None where it is not there."""

    async def delete(self, session_id: str, write_id: str | None = None) -> None:
        """Forget a session and all that is its alone, also one that is unreadable.

        Raises SessionNotFound, and VersionConflict where its last commit is another than the one that is given.
        """

    async def is_listed(self, session_id: str, owner: str) -> bool:
        """Whether a session is the owner's, by what the store knows beside the record."""

    async def list(self, owner: str, limit: int, after: str | None = None) -> Sequence[SessionRecord]:
        """An owner's sessions, newest first: at most `limit` that come after the session `after`.

        One that is unreadable is left out, which is logged; `after` may name it.
        Raises SessionNotFound where `after` is none of the owner's.
        """

    async def usage(self, owner: str) -> Usage:
        """What the owner's sessions take; a blob that several of them share counts for each."""

    async def due(self) -> Sequence[str]:
        """Sessions with an accepted document whose server has not been heard of, by their `due_at`."""

    async def sweep(self) -> None:
        """Delete sessions that have expired, and what crashes left that nothing points at."""

    async def ping(self) -> None:
        """Do nothing, where the store can be reached."""

    async def close(self) -> None:
        """Finish what has begun, then let go of files and connections."""
