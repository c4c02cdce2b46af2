"""Documents into sessions: as they are sent, or accepted first and learnt afterwards, by this server or the next.

What is here of a document is its draft in the session's record. A draft has a lease, which its server renews: others
leave it alone meanwhile. Leases save work; what keeps histories apart is the compare-and-set of every commit.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from titans.tokenizer import Tokenizer

from titans_server.errors import (
    IngestionCancelled,
    IngestionInFlight,
    IngestionNotFound,
    InvalidRequest,
    KeyReused,
    Overloaded,
    SessionBusy,
    SessionNotFound,
    ShuttingDown,
    StoreUnavailable,
    TitansError,
    VersionConflict,
)
from titans_server.events import DocumentLearnt, Fault, IngestionStatus, Progress
from titans_server.learning import Learning, Work, check_match, replayed
from titans_server.reading import Document
from titans_server.sessions import history
from titans_server.sessions.history import Portion
from titans_server.sessions.ledger import Ledger
from titans_server.sessions.record import Draft, Outcome, SessionRecord
from titans_server.states import States
from titans_server.writers import Writers

log = logging.getLogger(__name__)

_BEAT_SECONDS = history.LEASE_SECONDS / 3
_WATCH_SECONDS = 1.0  # from one look for work that a dead server left to the next
_WAIT_SECONDS = 60.0  # for another server's documents that came first
_SWEEP_SECONDS = 600.0


@dataclass(frozen=True)
class Terms:
    """What a client asks for besides the document."""

    key: str = ""  # Idempotency-Key
    if_match: int | None = None  # the version that the session has to be at


class Ingestions:
    """The documents that this server works on. Lives on the event loop."""

    def __init__(
        self, ledger: Ledger, states: States, learning: Learning, tokenizer: Tokenizer, writers: Writers
    ) -> None:
        self._ledger = ledger
        self._states = states
        self._learning = learning
        self._tokenizer = tokenizer
        self._writers = writers
        self._server = secrets.token_hex(6)
        self._works: dict[str, Work] = {}  # by ingestion
        self._tasks: set[asyncio.Task[None]] = set()  # what nobody waits for; ended by `close`
        self._watch: asyncio.Task[None] | None = None  # from `start` to `close`

    def start(self) -> None:
        """Begin to look for work that other servers left."""
        self._watch = asyncio.create_task(self._take_over())

    async def learn(
        self, session_id: str, pieces: AsyncIterator[str], terms: Terms
    ) -> AsyncGenerator[Progress | DocumentLearnt, None]:
        """Learn a document as it arrives; the last event says that it is a version, durably.

        A document is a version whole, or none. Where it breaks off, what is durable of it stays if it has a key: the
        next one with this key goes on from there. Otherwise it is forgotten.
        """
        record = await self._checked(session_id, terms)
        document = Document(self._tokenizer, pieces)
        if done := record.done(terms.key):
            await document.rest()
            yield replayed(session_id, done, document.sha256)
            return
        work = self._begin(record, terms, is_async=False)
        try:
            async with self._writers.turn(session_id), self._held(work):
                await self._after_others(work)
                async with aclosing(self._learn(work, document)) as events:
                    async for event in events:
                        yield event
            assert work.learnt is not None
            yield work.learnt
        except InvalidRequest:
            work.draft = replace(work.draft, key="")  # nobody can go on with it
            raise
        finally:
            self._leave(work)

    async def accept(self, session_id: str, pieces: AsyncIterator[str], terms: Terms) -> IngestionStatus:
        """Take a document in; once this returns it is durable, and will be learnt whatever happens to this server."""
        record = await self._checked(session_id, terms)
        document = Document(self._tokenizer, pieces)
        known = record.done(terms.key) or next(
            (x for x in record.drafts if terms.key == x.key != "" and x.accepted), None
        )
        if known is not None:
            await document.rest()
            if document.sha256 != known.sha256:
                raise KeyReused("the Idempotency-Key was used for another document")
            return self._status(record, known.ingestion)
        work = self._begin(record, terms, is_async=True)
        try:
            async with self._held(work):
                await self._receive(work, document)
        except InvalidRequest:
            work.draft = replace(work.draft, key="")
            raise
        finally:
            if not work.draft.accepted:
                self._leave(work)
        self._spawn(self._finish(work))
        return self._status(await self._ledger.store.get(session_id), work.draft.ingestion)

    async def status(self, ingestion: str) -> IngestionStatus:
        """How far a document has come. Raises IngestionNotFound."""
        return self._status(await self._record_of(ingestion), ingestion)

    async def cancel(self, ingestion: str) -> IngestionStatus:
        """Stop a document before it is a version; one that has ended stays as it is. Raises IngestionNotFound."""
        record = await self._record_of(ingestion)
        outcome = Outcome(ingestion, "cancelled", time.time())
        record = await self._ledger.change(record.id, lambda record: history.end(record, outcome))
        if ingestion in self._works:
            self._works[ingestion].cancelled = True
        return self._status(record, ingestion)

    async def close(self) -> None:
        """Stop working, and let other servers go on at once."""
        works = list(self._works.values())
        tasks = [*self._tasks, *([self._watch] if self._watch else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(self._release(work) for work in works))

    async def _checked(self, session_id: str, terms: Terms) -> SessionRecord:
        record = await self._ledger.store.get(session_id)
        self._states.check(record)
        if not record.done(terms.key):
            check_match(record, terms.if_match)
        return record

    def _begin(self, record: SessionRecord, terms: Terms, *, is_async: bool) -> Work:
        """Take a document on: a new one, or one that was broken off. Raises IngestionInFlight. Nothing awaits here."""
        draft = next((x for x in record.drafts if terms.key and x.key == terms.key), None)
        works = [x.draft for x in self._works.values() if x.session_id == record.id]
        is_here = any(terms.key and x.key == terms.key for x in works)
        is_elsewhere = draft and draft.server != self._server and draft.lease_until > time.time()
        if is_here or is_elsewhere or (draft and draft.accepted):
            raise IngestionInFlight("a document with this Idempotency-Key is being worked on")
        if draft is None:
            ingestion = f"ing_{record.id.removeprefix('ses_')}_{secrets.token_hex(6)}"
            draft = Draft(ingestion, self._server, 0.0, time.time(), terms.key)
        draft = replace(draft, server=self._server, is_async=is_async, if_match=terms.if_match)
        work = self._works[draft.ingestion] = Work(record.id, draft)
        return work

    async def _learn(self, work: Work, document: Document) -> AsyncGenerator[Progress, None]:
        async with aclosing(self._portions(work, document)) as portions:
            async for portion in portions:
                if not portion.is_last:
                    await self._append(work, portion)
                async with aclosing(self._learning.learn(work, portion)) as events:
                    async for progress in events:
                        yield progress

    async def _receive(self, work: Work, document: Document) -> None:
        async with aclosing(self._portions(work, document)) as portions:
            async for portion in portions:
                await self._append(work, portion)

    async def _portions(self, work: Work, document: Document) -> AsyncGenerator[Portion, None]:
        """What is new of a document. Raises KeyReused where it begins otherwise than what is here of it."""
        await document.skip(work.draft.num_bytes, work.draft.sha256 or document.sha256)
        async with aclosing(document.portions(self._learning.stride)) as portions:
            async for portion in portions:
                work.check()
                if not portion.num_bytes:
                    raise InvalidRequest("the document is empty", code="empty_document")
                yield portion

    async def _append(self, work: Work, portion: Portion) -> None:
        record = await self._ledger.change(
            work.session_id, lambda record: history.append(record, work.draft, self._learning.separator, portion)
        )
        draft = record.draft(work.draft.ingestion)
        assert draft is not None
        work.draft = draft

    async def _finish(self, work: Work) -> None:
        """Learn an accepted document, however often that takes, unless it cannot be."""
        pause = 0.5
        try:
            while not await self._tried(work):
                await asyncio.sleep(pause)
                pause = min(10.0, 2 * pause)
        finally:
            self._works.pop(work.draft.ingestion, None)

    async def _tried(self, work: Work) -> bool:
        """Whether an accepted document needs no further try."""
        try:
            async with self._held(work), self._writers.turn(work.session_id, bounded=False):
                await self._after_others(work)
                await self._learn_accepted(work)
        except (StoreUnavailable, Overloaded, SessionBusy, VersionConflict) as error:
            log.warning("ingestion %s waits: %s", work.draft.ingestion, error)
            return False
        except TitansError as error:  # the session is gone, the server ends, or somebody cancelled it
            log.info("ingestion %s is given up: %s", work.draft.ingestion, error)
        return True

    async def _learn_accepted(self, work: Work) -> None:
        """Learn it, as the session's writer. Raises StoreUnavailable, Overloaded, ShuttingDown; else it has ended."""
        draft = (await self._ledger.store.get(work.session_id)).draft(work.draft.ingestion)
        if draft is None:
            return  # whoever had the session before has learnt it already
        work.draft, work.learner = replace(draft, server=self._server), None
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

    async def _after_others(self, work: Work) -> None:
        """Return when no document that came first is left: learn those that were accepted and nobody works on.

        Raises SessionBusy where another server takes too long.
        """
        deadline = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < deadline:
            record = await self._ledger.store.get(work.session_id)
            earlier = [x for x in _before(record, work.draft.ingestion) if x.accepted or not x.is_async]
            theirs = [x for x in earlier if x.server != self._server and x.lease_until > time.time()]
            ours = [x for x in earlier if x.accepted and x not in theirs]
            if not theirs and not ours:
                return
            if ours and ours[0] == earlier[0]:
                mine = self._works.setdefault(ours[0].ingestion, Work(record.id, replace(ours[0], server=self._server)))
                async with self._held(mine):
                    await self._learn_accepted(mine)
                self._works.pop(ours[0].ingestion, None)
            else:
                await asyncio.sleep(0.1)
        raise SessionBusy(f"another server writes to session {work.session_id}")

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
            await asyncio.sleep(_WATCH_SECONDS)

    async def _adopt(self, session_id: str) -> None:
        try:
            record = await self._ledger.store.get(session_id)
            self._states.check(record)
        except TitansError:
            return  # gone, or another model's: not for this server
        for draft in record.drafts:
            if draft.accepted and draft.lease_until < time.time() and draft.ingestion not in self._works:
                log.info("going on with ingestion %s", draft.ingestion)
                work = self._works[draft.ingestion] = Work(session_id, replace(draft, server=self._server))
                self._spawn(self._finish(work))

    @asynccontextmanager
    async def _held(self, work: Work) -> AsyncIterator[None]:
        """Hold the draft's lease meanwhile; where it was another server's, it is taken."""
        if work.draft.entries:
            await self._renew(work)
        beating = asyncio.create_task(self._beat(work))
        try:
            yield
        finally:
            beating.cancel()

    async def _beat(self, work: Work) -> None:
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            try:
                await self._renew(work)
            except IngestionCancelled:
                work.cancelled = True
            except TitansError as error:
                log.warning("cannot renew the lease on ingestion %s: %s", work.draft.ingestion, error)

    async def _renew(self, work: Work) -> None:
        edit = lambda record: history.renew(record, work.draft.ingestion, self._server)  # noqa: E731
        await self._ledger.change(work.session_id, edit)

    def _leave(self, work: Work) -> None:
        """The document is no longer worked on here. Not awaited: whoever leaves may be cancelled already."""
        self._works.pop(work.draft.ingestion, None)
        if work.learnt is None and work.draft.entries:
            self._spawn(self._release(work))

    async def _release(self, work: Work) -> None:
        """Let others go on with a draft, or forget it where nobody could."""
        draft = work.draft
        stays = draft.key or draft.accepted

        def edit(record: SessionRecord) -> history.Edit:
            if stays:
                return history.renew(record, draft.ingestion, self._server, seconds=0)
            return history.discard(record, draft.ingestion)

        try:
            await self._ledger.change(work.session_id, edit)
        except TitansError as error:
            log.info("ingestion %s is left as it is: %s", draft.ingestion, error)

    async def _record_of(self, ingestion: str) -> SessionRecord:
        session = ingestion.removeprefix("ing_").rpartition("_")[0]
        try:
            record = await self._ledger.store.get(f"ses_{session}")
        except SessionNotFound:
            raise IngestionNotFound(f"no ingestion {ingestion}") from None
        if record.outcome(ingestion) is None and record.draft(ingestion) is None:
            raise IngestionNotFound(f"no ingestion {ingestion}")
        return record

    def _status(self, record: SessionRecord, ingestion: str) -> IngestionStatus:
        outcome, draft = record.outcome(ingestion), record.draft(ingestion)
        if outcome is not None:
            error = Fault(outcome.code, outcome.message) if outcome.code else None
            learnt, version = (outcome.tokens, outcome.version) if outcome.status == "done" else (0, None)
            done = (outcome.num_bytes, outcome.tokens, learnt, version, outcome.created_at, error)
            return IngestionStatus(ingestion, record.id, outcome.status, *done)
        assert draft is not None
        work = self._works.get(ingestion)
        is_worked_on = work is not None or draft.lease_until > time.time()
        status: Literal["receiving", "interrupted", "learning"] = "receiving" if is_worked_on else "interrupted"
        if draft.accepted:
            status = "learning"
        num_learnt = work.num_learnt if work else 0
        return IngestionStatus(
            ingestion, record.id, status, draft.num_bytes, draft.tokens, num_learnt, None, draft.created_at
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _before(record: SessionRecord, ingestion: str) -> list[Draft]:
    """The drafts that came before one; all, where the record does not have it."""
    names = [x.ingestion for x in record.drafts]
    return list(record.drafts[: names.index(ingestion)] if ingestion in names else record.drafts)
