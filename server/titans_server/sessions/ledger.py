"""Changes of sessions, each carried through against whoever else changes them. Correct with any number of servers."""

import asyncio
import random
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace

from titans_server import failpoints
from titans_server.errors import StateCorrupted, VersionConflict
from titans_server.sessions.history import Edit
from titans_server.sessions.log import unpack
from titans_server.sessions.record import Entries, SessionRecord
from titans_server.sessions.store import Commit, SessionStore

_ATTEMPTS = 30
_PAUSE = 0.01  # seconds; grows with every attempt


class Ledger:
    """The store's sessions, read and changed."""

    def __init__(self, store: SessionStore) -> None:
        self.store = store

    async def change(
        self, session_id: str, edit: Callable[[SessionRecord], Edit], known: SessionRecord | None = None
    ) -> SessionRecord:
        """Make an edit on the newest record, again and again until no other commit came between.

        `known`: the record as the caller has just read it, which saves reading it again; the commit tells if it is old.
        Raises what `edit` raises, SessionNotFound, VersionConflict where others are always faster.
        """
        for attempt in range(_ATTEMPTS):
            record = known or await self.store.get(session_id)
            known = None
            edited = edit(record)
            if edited.record is record:
                return record
            try:
                return await self._commit(record, edited.record, edited.append)
            except VersionConflict:
                await asyncio.sleep(random.uniform(0, _PAUSE * (attempt + 1)))
        raise VersionConflict(f"session {session_id} changes too fast")

    async def delete(self, session_id: str, check: Callable[[SessionRecord], None]) -> None:
        """Forget a session whose newest record passes a check: no commit comes between the two.

        Raises what `check` raises, SessionNotFound, StateCorrupted, VersionConflict where others are always faster.
        """
        for attempt in range(_ATTEMPTS):
            record = await self.store.get(session_id)
            check(record)
            try:
                return await self.store.delete(session_id, record.write_id)
            except VersionConflict:
                await asyncio.sleep(random.uniform(0, _PAUSE * (attempt + 1)))
        raise VersionConflict(f"session {session_id} changes too fast")

    async def read(self, session_id: str, entries: Entries) -> list[int]:
        """The tokens of log entries. Raises StateCorrupted where one is missing, torn, or not as long as it was."""
        found = await self.store.read_log(session_id, [number for number, _ in entries])
        tokens: list[int] = []
        for (number, num_tokens), entry in zip(entries, found, strict=True):
            if entry is None:
                raise StateCorrupted(f"entry {number} of session {session_id}'s log is missing")
            part = unpack(number, entry)
            if len(part) != num_tokens:
                raise StateCorrupted(f"entry {number} of session {session_id}'s log has {len(part)} tokens")
            tokens += part
        return tokens

    async def _commit(self, old: SessionRecord, new: SessionRecord, append: Mapping[int, bytes]) -> SessionRecord:
        new = replace(new, revision=old.revision + 1, write_id=secrets.token_hex(8))
        drop = new.dropped_since(old)
        release = frozenset(old.snapshots().keys() - new.snapshots().keys())
        point = frozenset(new.snapshots().keys() - old.snapshots().keys())
        if append:
            failpoints.reach("before_append")
        await self.store.commit(Commit(new, append, drop, release, point, old.write_id))
        if append:
            failpoints.reach("after_append")
        return new
