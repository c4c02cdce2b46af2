"""What servers that are gone left: their accepted documents, and what nothing in the store points at."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from titans_server.accepted import Accepted
from titans_server.errors import SessionNotFound
from titans_server.retries import Retries
from titans_server.sessions.record import SessionRecord
from titans_server.sessions.store import SessionStore
from titans_server.states import States

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0  # from one look for documents to the next
_SWEEP_SECONDS = 600.0
_MAX_PAUSE = 10.0  # seconds from a look that failed to the next
_MAX_BROKEN_PAUSE = 60.0  # the same, of a session that cannot be read


class TakeOver:
    """Looks for what was left, and goes on with it. Lives on the event loop, from `start` to `close`.

    A session that cannot be read has a task of its own, which tries again at growing intervals: no other waits for it.
    """

    def __init__(self, store: SessionStore, states: States, accepted: Accepted) -> None:
        self._store = store
        self._states = states
        self._accepted = accepted
        self._loops: list[asyncio.Task[None]] = []  # ended by `stop`, as are the next ones
        self._adopting: dict[str, asyncio.Task[None]] = {}  # by session

    def start(self) -> None:
        """Begin."""
        look = _repeat(self._look, "cannot look for work that was left", _LOOK_SECONDS, _MAX_PAUSE)
        sweep = _repeat(self._store.sweep, "cannot sweep the store", _SWEEP_SECONDS, _SWEEP_SECONDS)
        self._loops = [asyncio.create_task(look), asyncio.create_task(sweep)]

    def stop(self) -> None:
        """Look for nothing more. What was taken over is the accepted documents' affair."""
        for task in (*self._loops, *self._adopting.values()):
            task.cancel()

    async def close(self) -> None:
        """Stop, and wait until nothing is looked for."""
        self.stop()
        await asyncio.gather(*self._loops, *self._adopting.values(), return_exceptions=True)

    async def _look(self) -> None:
        due = await self._store.due()
        busy = self._accepted.sessions()
        for session_id in due:
            if session_id not in busy and session_id not in self._adopting:
                self._adopting[session_id] = asyncio.create_task(self._adopt(session_id))

    async def _adopt(self, session_id: str) -> None:
        """Go on with a session's accepted documents, once it can be read."""
        try:
            record = await self._readable(session_id)
            for draft in record.drafts if record else ():
                if draft.accepted and draft.lease_until >= time.time():
                    break  # whoever learns it goes on with those that follow
                if draft.accepted:
                    self._accepted.adopt(session_id, draft)
        finally:
            self._adopting.pop(session_id, None)

    async def _readable(self, session_id: str) -> SessionRecord | None:
        """A session of this server's model; None where it is gone or no longer due. However long that takes."""
        what = f"cannot go on with session {session_id}"
        retries = Retries(log, what, first=_LOOK_SECONDS, most=_MAX_BROKEN_PAUSE)
        while True:
            try:
                record = await self._store.get(session_id)
                if record.due_at is None or record.due_at > time.time():
                    return None  # another server has learnt it, or does
                self._states.check(record)
                return record
            except SessionNotFound:
                return None
            except Exception as error:
                await retries.pause(error)


async def _repeat(work: Callable[[], Awaitable[None]], what: str, seconds: float, most: float) -> None:
    """Do something every so many seconds, for ever; where it fails, up to `most` seconds later."""
    retries = Retries(log, what, first=seconds, most=most)
    while True:
        try:
            await work()
        except Exception as error:
            await retries.pause(error)
        else:
            retries = Retries(log, what, first=seconds, most=most)
            await asyncio.sleep(seconds)
