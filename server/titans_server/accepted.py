"""Documents that were accepted: learnt afterwards, whatever happens to their server, by this one or by the next."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from titans_server.engine import StepFailed
from titans_server.errors import (
    IngestionCancelled,
    Overloaded,
    SessionBusy,
    SessionNotFound,
    ShuttingDown,
    StateCorrupted,
    StateMismatch,
    StoreUnavailable,
    TitansError,
    VersionConflict,
)
from titans_server.learning import Learning, SessionCorrupted, Work
from titans_server.leases import Leases
from titans_server.retries import Retries
from titans_server.sessions import history
from titans_server.sessions.history import Portion
from titans_server.sessions.ledger import Ledger
from titans_server.sessions.record import Draft, Outcome, SessionRecord
from titans_server.writers import Writers

log = logging.getLogger(__name__)

_WAIT_SECONDS = 60.0  # for another server's documents that came first
_MIN_PAUSE, _MAX_PAUSE = 0.5, 10.0  # seconds from one try to the next
_MAX_FAULTS, _MAX_FAULT_PAUSE = 10, 60.0  # of the model on one document, none of which came further: some three minutes


class Accepted:
    """The accepted documents that this server works on, a task each. Lives on the event loop.

    An error that nobody foresaw is one document's: that is tried again, the others go on.
    """

    def __init__(
        self,
        ledger: Ledger,
        learning: Learning,
        writers: Writers,
        leases: Leases,
        *,
        works: dict[str, Work],
    ) -> None:
        """`works`: all that this server works on, by ingestion; shared with whoever takes documents in."""
        self._ledger = ledger
        self._learning = learning
        self._writers = writers
        self._leases = leases
        self._works = works
        self._queues = Writers()  # a session's documents wait in one line: its first one waits for a place
        self._places = asyncio.Semaphore(learning.max_accepted)  # however many wait, others find room
        self._tasks: set[asyncio.Task[None]] = set()  # ended by `close`
        self._is_retiring = False

    def begin(self, work: Work) -> None:
        """Learn a document that is in the log whole; nobody waits for it."""
        task = asyncio.create_task(self._finish(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def adopt(self, session_id: str, draft: Draft) -> None:
        """Learn a document that another server left, unless this one works on it already."""
        if draft.ingestion not in self._works:
            log.info("going on with ingestion %s", draft.ingestion)
            work = self._works[draft.ingestion] = self._taken(session_id, draft)
            self.begin(work)

    def sessions(self) -> set[str]:
        """Those with a document that this server works on, or that waits for it to."""
        return {work.session_id for work in self._works.values() if work.draft.accepted}

    def retire(self) -> None:
        """Begin with no other document. Those that are waiting stay accepted, for another server."""
        self._is_retiring = True

    async def close(self) -> None:
        """Stop. The documents stay accepted."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def after_others(self, session_id: str, ingestion: str) -> SessionRecord:
        """The session, when no document that came first is left: learn those that were accepted and nobody works on.

        Raises SessionBusy where another server takes too long; what is learnt here takes as long as it does.
        """
        return await self._after(session_id, lambda record: _before(record, ingestion))

    async def settle(self, session_id: str) -> None:
        """The same with what is under way now, before the session is put back. Also raises Overloaded.

        Where the session is damaged nothing can follow it, and maybe that is why it is put back.
        """
        now = {draft.ingestion for draft in (await self._ledger.store.get(session_id)).drafts}
        try:
            await self._after(session_id, lambda record: [x for x in record.drafts if x.ingestion in now])
        except SessionCorrupted:
            pass
        except VersionConflict as error:  # of a document's, not of whoever asks
            raise SessionBusy(error.message) from error

    async def _after(self, session_id: str, others: Callable[[SessionRecord], Sequence[Draft]]) -> SessionRecord:
        deadline = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < deadline:
            record = await self._ledger.store.get(session_id)
            first = next((x for x in others(record) if self._has_to_end(x)), None)
            if first is None:
                return record
            if not self._leases.is_elsewhere(first):
                mine = self._works.setdefault(first.ingestion, self._taken(record.id, first))
                began = time.monotonic()
                try:
                    with suppress(IngestionCancelled):  # that one was, not ours
                        async with self._leases.held(mine):
                            await self._learn(mine)
                finally:
                    self._works.pop(mine.draft.ingestion, None)
                deadline += time.monotonic() - began
            else:
                await asyncio.sleep(0.1)
        raise SessionBusy(f"another server writes to session {session_id}")

    def _has_to_end(self, draft: Draft) -> bool:
        """Whether what comes after a document waits for it: not for one that broke off, or is still taken in."""
        return draft.accepted or (self._leases.is_elsewhere(draft) and not draft.is_async)

    async def _finish(self, work: Work) -> None:
        """Learn it, however often that takes, unless it cannot be."""
        retries = Retries(log, f"ingestion {work.draft.ingestion} waits", first=_MIN_PAUSE, most=_MAX_PAUSE)
        try:
            while (error := await self._try(work)) is not None:
                self._learning.observer.put_off(error.code if isinstance(error, TitansError) else "internal_error")
                await retries.pause(error)
        finally:
            self._works.pop(work.draft.ingestion, None)

    async def _try(self, work: Work) -> Exception | None:
        """Why it needs another try; None where it needs none."""
        try:
            async with self._place(work.session_id):
                if self._is_retiring:
                    await self._leases.release(work)
                    return None
                record = await self._ledger.store.get(work.session_id)
                draft = record.draft(work.draft.ingestion)
                if draft is None or self._leases.is_elsewhere(draft):
                    return None  # another server has learnt it, or does: it had time for that while this one waited
                earlier = filter(self._leases.is_elsewhere, _before(record, draft.ingestion))
                if any(map(self._has_to_end, earlier)):
                    return SessionBusy(f"another server writes to session {work.session_id}")
                async with self._leases.held(work):
                    await self.after_others(work.session_id, work.draft.ingestion)
                    await self._learn(work)
        except (StoreUnavailable, StateCorrupted, Overloaded, SessionBusy, VersionConflict) as error:
            return error
        except TitansError as error:  # the session is gone, the server ends, or somebody cancelled it
            log.info("ingestion %s is given up: %s", work.draft.ingestion, error)
        except Exception as error:
            return error
        return None

    @asynccontextmanager
    async def _place(self, session_id: str) -> AsyncIterator[None]:
        """One of the places, as the session's writer. Who waits for either holds neither: both may take hours."""
        async with self._queues.turn(session_id, bounded=False):
            while True:
                async with self._writers.turn(session_id, bounded=False):
                    if not self._places.locked():
                        async with self._places:
                            yield
                        return
                async with self._places:
                    if self._writers.is_free(session_id):
                        async with self._writers.turn(session_id, bounded=False):
                            yield
                        return

    async def _learn(self, work: Work) -> None:
        """Learn it, as the session's writer. Raises StoreUnavailable, Overloaded, ShuttingDown; else it has ended.

        Raises StateCorrupted where the session is damaged: it may be put back from a backup, and the document goes on.
        Raises StateMismatch where it is another model's, whose servers go on.
        Raises VersionConflict where it stands on the version it is to follow, and others were faster.
        """
        draft = (await self._ledger.store.get(work.session_id)).draft(work.draft.ingestion)
        if draft is None:
            return  # whoever had the session before has learnt it already
        if not draft.accepted:
            log.warning("ingestion %s is left to be sent again: the store has lost its end", draft.ingestion)
            return
        work.draft, work.learner = replace(draft, server=self._leases.server), None
        try:
            await self._learn_despite_faults(work, Portion((), draft.num_bytes, draft.sha256, is_last=True))
        except (StoreUnavailable, SessionCorrupted, StateMismatch, Overloaded, ShuttingDown):
            raise
        except (IngestionCancelled, SessionNotFound):
            pass
        except TitansError as error:
            if isinstance(error, VersionConflict) and await self._may_follow(work.session_id, draft):
                raise
            outcome = Outcome(draft.ingestion, "failed", draft.created_at, code=error.code, message=error.message)
            await self._ledger.change(work.session_id, lambda record: history.end(record, outcome))

    async def _learn_despite_faults(self, work: Work, whole: Portion) -> None:
        """Learn it, again where the model fails: on another session's tokens, maybe, or for want of memory.

        Raises StepFailed where it goes on failing at the same place.
        """
        what = f"the model failed on ingestion {work.draft.ingestion}"
        retries = Retries(log, what, first=_MIN_PAUSE, most=_MAX_FAULT_PAUSE)
        num_faults = furthest = 0
        while True:
            try:
                with self._learning.admitted():
                    async for _ in self._learning.learn(work, whole):
                        pass
                return
            except StepFailed as error:
                num_faults = num_faults + 1 if work.num_learnt <= furthest else 1
                furthest = max(furthest, work.num_learnt)
                if num_faults >= _MAX_FAULTS:
                    raise
                await retries.pause(error)
                work.learner = None  # it has given away what the model failed on

    async def _may_follow(self, session_id: str, draft: Draft) -> bool:
        return draft.if_match in {None, (await self._ledger.store.get(session_id)).version}

    def _taken(self, session_id: str, draft: Draft) -> Work:
        return Work(session_id, replace(draft, server=self._leases.server))


def _before(record: SessionRecord, ingestion: str) -> list[Draft]:
    """The drafts that came before one; all, where the record does not have it."""
    names = [x.ingestion for x in record.drafts]
    return list(record.drafts[: names.index(ingestion)] if ingestion in names else record.drafts)
