"""Documents that were accepted: learnt afterwards, whatever happens to their server, by this one or by the next."""

import asyncio
import logging
import time
from dataclasses import replace

from titans_server.errors import (
    IngestionCancelled,
    Overloaded,
    SessionBusy,
    SessionNotFound,
    ShuttingDown,
    StoreUnavailable,
    TitansError,
    VersionConflict,
)
from titans_server.learning import Learning, Work
from titans_server.leases import Leases
from titans_server.sessions import history
from titans_server.sessions.history import Portion
from titans_server.sessions.ledger import Ledger
from titans_server.sessions.record import Draft, Outcome, SessionRecord
from titans_server.states import States
from titans_server.writers import Writers

log = logging.getLogger(__name__)

_WATCH_SECONDS = 1.0  # from one look for work that a dead server left to the next
_WAIT_SECONDS = 60.0  # for another server's documents that came first
_SWEEP_SECONDS = 600.0
_MAX_PAUSE = 10.0  # seconds from one try to the next


class Accepted:
    """The accepted documents that this server works on, a task each. Lives on the event loop.

    An error that nobody foresaw is logged with its traceback, and is one document's or one session's: that is tried
    again, the others go on.
    """

    def __init__(
        self,
        ledger: Ledger,
        states: States,
        learning: Learning,
        writers: Writers,
        leases: Leases,
        *,
        works: dict[str, Work],
    ) -> None:
        """`works`: all that this server works on, by ingestion; shared with whoever takes documents in."""
        self._ledger = ledger
        self._states = states
        self._learning = learning
        self._writers = writers
        self._leases = leases
        self._works = works
        self._tasks: set[asyncio.Task[None]] = set()  # ended by `close`
        self._watch: asyncio.Task[None] | None = None  # from `start` to `close`

    def start(self) -> None:
        """Begin to look for work that other servers left."""
        self._watch = asyncio.create_task(self._take_over())

    def begin(self, work: Work) -> None:
        """Learn a document that is in the log whole; nobody waits for it."""
        task = asyncio.create_task(self._finish(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop. The documents stay accepted."""
        tasks = [*self._tasks, *([self._watch] if self._watch else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def after_others(self, work: Work) -> SessionRecord:
        """The session, when no document that came first is left: learn those that were accepted and nobody works on.

        Raises SessionBusy where another server takes too long.
        """
        deadline = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < deadline:
            record = await self._ledger.store.get(work.session_id)
            earlier = [x for x in _before(record, work.draft.ingestion) if x.accepted or not x.is_async]
            theirs = [x for x in earlier if self._leases.is_elsewhere(x)]
            ours = [x for x in earlier if x.accepted and x not in theirs]
            if not theirs and not ours:
                return record
            if ours and ours[0] == earlier[0]:
                mine = self._works.setdefault(ours[0].ingestion, self._taken(record.id, ours[0]))
                try:
                    async with self._leases.held(mine):
                        await self._learn(mine)
                finally:
                    self._works.pop(mine.draft.ingestion, None)
            else:
                await asyncio.sleep(0.1)
        raise SessionBusy(f"another server writes to session {work.session_id}")

    async def _finish(self, work: Work) -> None:
        """Learn it, however often that takes, unless it cannot be."""
        pause = 0.5
        try:
            while not await self._tried(work):
                await asyncio.sleep(pause)
                pause = min(_MAX_PAUSE, 2 * pause)
        finally:
            self._works.pop(work.draft.ingestion, None)

    async def _tried(self, work: Work) -> bool:
        """Whether it needs no further try."""
        try:
            async with self._leases.held(work), self._writers.turn(work.session_id, bounded=False):
                await self.after_others(work)
                await self._learn(work)
        except (StoreUnavailable, Overloaded, SessionBusy, VersionConflict) as error:
            log.warning("ingestion %s waits: %s", work.draft.ingestion, error)
            return False
        except TitansError as error:  # the session is gone, the server ends, or somebody cancelled it
            log.info("ingestion %s is given up: %s", work.draft.ingestion, error)
        except Exception:
            log.exception("ingestion %s waits: a fault of the server's", work.draft.ingestion)
            return False
        return True

    async def _learn(self, work: Work) -> None:
        """Learn it, as the session's writer. Raises StoreUnavailable, Overloaded, ShuttingDown; else it has ended."""
        draft = (await self._ledger.store.get(work.session_id)).draft(work.draft.ingestion)
        if draft is None:
            return  # whoever had the session before has learnt it already
        work.draft, work.learner = replace(draft, server=self._leases.server), None
        try:
            async for _ in self._learning.learn(work, Portion((), draft.num_bytes, draft.sha256, is_last=True)):
                pass
        except (StoreUnavailable, Overloaded, ShuttingDown):
            raise
        except (IngestionCancelled, SessionNotFound):
            pass
        except TitansError as error:
            outcome = Outcome(draft.ingestion, "failed", time.time(), code=error.code, message=error.message)
            await self._ledger.change(work.session_id, lambda record: history.end(record, outcome))

    async def _take_over(self) -> None:
        """Go on with what servers that are gone had accepted; now and then, sweep the store."""
        swept = -1e9
        while True:
            try:
                for session_id in await self._ledger.store.due():
                    await self._adopt(session_id)
                if time.monotonic() > swept + _SWEEP_SECONDS:
                    swept = time.monotonic()
                    await self._ledger.store.sweep()
            except TitansError as error:
                log.warning("cannot look for work that was left: %s", error)
            except Exception:
                log.exception("cannot look for work that was left: a fault of the server's")
            await asyncio.sleep(_WATCH_SECONDS)

    async def _adopt(self, session_id: str) -> None:
        try:
            record = await self._ledger.store.get(session_id)
            self._states.check(record)
        except TitansError:
            return  # gone, or another model's: not for this server
        except Exception:
            log.exception("cannot go on with session %s: a fault of the server's", session_id)
            return
        for draft in record.drafts:
            if draft.accepted and draft.lease_until < time.time() and draft.ingestion not in self._works:
                log.info("going on with ingestion %s", draft.ingestion)
                work = self._works[draft.ingestion] = self._taken(session_id, draft)
                self.begin(work)

    def _taken(self, session_id: str, draft: Draft) -> Work:
        return Work(session_id, replace(draft, server=self._leases.server))


def _before(record: SessionRecord, ingestion: str) -> list[Draft]:
    """The drafts that came before one; all, where the record does not have it."""
    names = [x.ingestion for x in record.drafts]
    return list(record.drafts[: names.index(ingestion)] if ingestion in names else record.drafts)
