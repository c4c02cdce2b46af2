"""Documents into sessions: learnt as they are sent, or taken in first and learnt afterwards (`accepted.py`).

What is here of a document is its draft in the session's record, which its server holds by a lease (`leases.py`).
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from typing import Literal

from titans.tokenizer import Tokenizer

from titans_server.accepted import Accepted
from titans_server.errors import (
    DocumentTooLarge,
    IngestionInFlight,
    IngestionNotFound,
    InvalidRequest,
    KeyReused,
    SessionNotFound,
    UnsupportedMediaType,
)
from titans_server.events import DocumentLearnt, Fault, IngestionStatus, Progress
from titans_server.learning import Learning, Work, check_match, replayed
from titans_server.leases import Leases
from titans_server.reading import Document, ahead, arriving
from titans_server.sessions import history
from titans_server.sessions.history import Portion
from titans_server.sessions.ledger import Ledger
from titans_server.sessions.record import Draft, Outcome, SessionRecord
from titans_server.states import States
from titans_server.takeover import TakeOver
from titans_server.writers import Writers

_REFUSALS = (InvalidRequest, DocumentTooLarge, UnsupportedMediaType)  # for what it is: nobody can go on with it


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
        self._works: dict[str, Work] = {}  # by ingestion
        self._leases = Leases(ledger)
        self._accepted = Accepted(ledger, learning, writers, self._leases, works=self._works)
        self._take_over = TakeOver(ledger.store, states, self._accepted)
        self._leaving: set[asyncio.Task[None]] = set()  # releases that nobody waits for; ended by `close`

    def start(self) -> None:
        """Begin to look for work that other servers left."""
        self._take_over.start()

    def retire(self) -> None:
        """Start no more work that no client waits for: another server will, or the next one."""
        self._take_over.stop()
        self._accepted.retire()

    async def close(self) -> None:
        """Stop working, and let other servers go on at once."""
        works = list(self._works.values())
        await self._take_over.close()
        await self._accepted.close()
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await asyncio.gather(*(self._leases.release(work) for work in works))

    async def learn(
        self, session_id: str, pieces: AsyncIterator[str], terms: Terms
    ) -> AsyncGenerator[Progress | DocumentLearnt, None]:
        """Learn a document as it arrives; the last event says that it is a version, durably.

        A document is a version whole, or none. Where it breaks off, what is durable of it stays if it has a key: the
        next one with this key goes on from there. Otherwise it is forgotten.
        """
        record = await self._checked(session_id, terms)
        if done := record.done(terms.key):
            document = Document(self._tokenizer, pieces)
            await document.rest()
            yield replayed(session_id, done, document.sha256)
            return
        work = self._begin(record, terms, is_async=False)
        try:
            async with arriving(pieces) as arrived, AsyncExitStack() as stack:
                async with arrived.waiting():
                    await stack.enter_async_context(self._writers.turn(session_id))
                    await stack.enter_async_context(self._leases.held(work))
                    work.known = await self._accepted.after_others(session_id, work.draft.ingestion)
                with self._learning.admitted():
                    async with aclosing(self._learn(work, Document(self._tokenizer, arrived.pieces()))) as events:
                        async for event in events:
                            yield event
            assert work.learnt is not None
            yield work.learnt
        except _REFUSALS:
            work.draft = replace(work.draft, key="")
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
                raise KeyReused(history.KEY_REUSED)
            return self._status(record, known.ingestion)
        work = self._begin(record, terms, is_async=True)
        try:
            async with self._leases.held(work):
                await self._receive(work, document)
        except _REFUSALS:
            work.draft = replace(work.draft, key="")
            raise
        finally:
            if not work.draft.accepted:
                self._leave(work)
        self._accepted.begin(work)
        assert work.appended is not None
        return self._status(work.appended, work.draft.ingestion)

    async def settle(self, session_id: str) -> None:
        """Learn what the session is learning now, on any server. For its writer. Raises SessionBusy, Overloaded."""
        await self._accepted.settle(session_id)

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
        is_elsewhere = draft and self._leases.is_elsewhere(draft)
        if is_here or is_elsewhere or (draft and draft.accepted):
            raise IngestionInFlight("a document with this Idempotency-Key is being worked on")
        if draft is None:
            ingestion = f"ing_{record.id.removeprefix('ses_')}_{secrets.token_hex(6)}"
            draft = Draft(ingestion, self._leases.server, 0.0, time.time(), terms.key)
        draft = replace(draft, server=self._leases.server, is_async=is_async, if_match=terms.if_match)
        work = self._works[draft.ingestion] = Work(record.id, draft)
        return work

    async def _learn(self, work: Work, document: Document) -> AsyncGenerator[Progress, None]:
        async with aclosing(self._portions(work, document)) as portions, aclosing(ahead(portions)) as coming:
            async for portion in coming:
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
        change = self._ledger.change(
            work.session_id,
            lambda record: history.append(record, work.draft, self._learning.separator, portion),
            known=work.appended,
        )
        work.appended = record = await work.appends(change)
        draft = record.draft(work.draft.ingestion)
        assert draft is not None
        work.draft = draft

    def _leave(self, work: Work) -> None:
        """The document is no longer worked on here. Not awaited: whoever leaves may be cancelled already."""
        self._works.pop(work.draft.ingestion, None)
        if work.learnt is None:
            task = asyncio.create_task(self._let_go(work))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _let_go(self, work: Work) -> None:
        """Its last append may be under way still, and the first of all: whoever is cancelled in it never hears."""
        await work.appends.drain()
        await self._leases.release(work)

    async def _record_of(self, ingestion: str) -> SessionRecord:
        try:
            record = await self._ledger.store.get(session_of(ingestion))
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


def session_of(ingestion: str) -> str:
    """The id of the session that a document goes into, by the document's own."""
    return f"ses_{ingestion.removeprefix('ing_').rpartition('_')[0]}"
