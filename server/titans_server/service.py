"""The use cases, on one engine and one store. Knows neither HTTP nor torch."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from titans.tokenizer import Tokenizer

from titans_server.answering import Answers
from titans_server.engine import Engine
from titans_server.errors import InvalidState, SessionBusy, SessionNotFound, StateCorrupted, VersionConflict
from titans_server.events import AnswerPiece, CompletionChunk, DocumentLearnt, IngestionStatus, Progress
from titans_server.ingesting import Ingestions, Terms
from titans_server.learning import Learning, check_match
from titans_server.observer import Observer
from titans_server.prompts import CompletionRequest
from titans_server.reading import SEPARATOR
from titans_server.sessions import codec, history
from titans_server.sessions.cache import StateCache
from titans_server.sessions.history import Writing
from titans_server.sessions.ledger import Ledger
from titans_server.sessions.log import pack
from titans_server.sessions.record import Parent, SessionRecord, Version
from titans_server.sessions.store import Commit, SessionStore
from titans_server.sessions.store import Usage as Occupied
from titans_server.states import Moment, SnapshotPolicy, States
from titans_server.writers import Writers

_ATTEMPTS = 5  # to fork a session whose snapshots move meanwhile
_MAX_TOKENS = 1 << 62  # of a state that is imported: the model fails where it counts past 64 bits


@dataclass(frozen=True)
class ServedModel:
    """What the service knows of the model."""

    name: str
    fingerprint: str
    tokenizer: Tokenizer
    loaded_at: int  # seconds since the epoch


@dataclass(frozen=True)
class Limits:
    """Bounds that an operator sets."""

    max_prompt_tokens: int
    max_waiting_writers: int
    num_kept_versions: int


class SessionService:
    """Sessions on one engine and one store. Lives on the event loop, from `start` to `close`."""

    def __init__(
        self,
        engine: Engine,
        store: SessionStore,
        model: ServedModel,
        cache: StateCache,
        *,
        limits: Limits,
        policy: SnapshotPolicy,
        observer: Observer | None = None,
    ) -> None:
        observer = observer or Observer()
        self._store = store
        self._limits = limits
        self._ledger = Ledger(store)
        self._states = States(engine, self._ledger, model.fingerprint, cache, policy=policy, observer=observer)
        self._writers = Writers(limits.max_waiting_writers)
        self._answers = Answers(
            engine,
            self._ledger,
            self._states,
            model.tokenizer,
            self._writers,
            max_prompt_tokens=limits.max_prompt_tokens,
            num_kept_versions=limits.num_kept_versions,
            observer=observer,
        )
        learning = Learning(
            engine,
            self._ledger,
            self._states,
            model.tokenizer.encode(SEPARATOR),
            num_kept_versions=limits.num_kept_versions,
            observer=observer,
        )
        self._ingestions = Ingestions(self._ledger, self._states, learning, model.tokenizer, self._writers)
        self.model = model

    def start(self) -> None:
        """Begin with what nobody asks for: snapshots of idle sessions, work that servers left, sweeping."""
        self._states.start()
        self._ingestions.start()

    def retire(self) -> None:
        """Start no more work that no client waits for."""
        self._ingestions.retire()

    async def close(self) -> None:
        """Hand over what is under way, and write down the states that are in memory alone."""
        await self._ingestions.close()
        await self._states.close()

    async def create(
        self, metadata: Mapping[str, str], *, ttl_seconds: int | None = None, owner: str = ""
    ) -> SessionRecord:
        """A new session that has read nothing."""
        now = time.time()
        record = SessionRecord(
            id=_new_id(),
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            created_at=now,
            updated_at=now,
            versions=(Version(0, 0, now, secrets.token_hex(8)),),
            owner=owner,
            ttl_seconds=ttl_seconds,
            metadata=dict(metadata),
        )
        await self._store.create(Commit(record))
        return record

    async def get(self, session_id: str) -> SessionRecord:
        """A session's record. Raises SessionNotFound."""
        _check_id(session_id)
        return await self._store.get(session_id)

    async def is_listed(self, session_id: str, owner: str) -> bool:
        """Whether a session is an owner's, also one whose record cannot be read."""
        return await self._store.is_listed(session_id, owner)

    async def sessions_of(self, owner: str, limit: int, after: str | None) -> Sequence[SessionRecord]:
        """An owner's sessions, newest first. Raises SessionNotFound where `after` is none of them."""
        return await self._store.list(owner, limit, after)

    async def usage(self, owner: str) -> Occupied:
        """What an owner's sessions take in the store."""
        return await self._store.usage(owner)

    async def delete(self, session_id: str, if_match: int | None = None) -> None:
        """Forget a session, also one whose record cannot be read. Raises SessionNotFound, VersionConflict.

        Raises StateCorrupted where its version is asked for and cannot be read. It waits for no writer: a document may
        take hours, and whoever learns one, here or elsewhere, finds that the session is gone.
        """
        _check_id(session_id)
        if if_match is None:
            await self._store.delete(session_id)
        else:
            await self._ledger.delete(session_id, lambda record: check_match(record, if_match))
        self._states.forget(session_id)

    async def fork(
        self, session_id: str, number: int | None, metadata: Mapping[str, str] | None, ttl_seconds: int | None
    ) -> SessionRecord:
        """A new session that goes on from a version of another one; the snapshot is shared, the log's end copied."""
        await self.get(session_id)
        for _ in range(_ATTEMPTS - 1):
            try:
                return await self._fork(session_id, number, metadata, ttl_seconds)
            except (VersionConflict, StateCorrupted):  # its snapshot or log has moved on; what is torn stays so
                continue
        return await self._fork(session_id, number, metadata, ttl_seconds)

    async def restore(self, session_id: str, number: int, if_match: int | None) -> SessionRecord:
        """Make what an older version was the newest, after what was accepted before.

        Raises VersionNotFound, VersionConflict, StateMismatch, SessionBusy, Overloaded.
        """
        record = await self.get(session_id)
        self._check_may_change(record, if_match)
        self._check_stays(record, number)
        write_id = secrets.token_hex(8)

        def edit(record: SessionRecord) -> history.Edit:
            if record.made_by(write_id) is None:
                check_match(record, if_match)
            return history.restore(record, number, write_id, self._limits.num_kept_versions)

        async with self._writers.turn(session_id):
            await self._ingestions.settle(session_id)
            return await self._ledger.change(session_id, edit)

    async def export_state(self, session_id: str, number: int | None) -> tuple[SessionRecord, Version, bytes]:
        """A version's state as a file that `import_state` reads, anywhere. Raises VersionNotFound."""
        record, version, state = await self._states.read(session_id, number)
        return record, version, await asyncio.to_thread(codec.encode, state, self.model.fingerprint)

    async def import_state(self, session_id: str, blob: bytes, if_match: int | None) -> SessionRecord:
        """Make a state that was exported the session's newest version.

        Raises StateMismatch for another model's, InvalidState for one that is torn or not of this model's shape.
        """
        self._check_may_change(await self.get(session_id), if_match)
        try:
            state = await asyncio.to_thread(
                codec.decode,
                blob,
                fingerprint=self.model.fingerprint,
                like=self._states.empty,
                most=codec.MOST_IMPORTED,
            )
        except StateCorrupted as error:
            raise InvalidState(error.message) from error
        if not 0 <= int(state.position) < _MAX_TOKENS:
            raise InvalidState(f"the state has read {int(state.position)} tokens, which is not possible")
        write_id = secrets.token_hex(8)

        def edit(record: SessionRecord) -> history.Edit:
            if record.made_by(write_id) is None:
                check_match(record, if_match)
            writing = Writing(record.head, write_id, (), state.num_bytes, self._limits.num_kept_versions)
            return history.replace_state(record, writing, snapshot)

        async with self._writers.turn(session_id):
            await self._ingestions.settle(session_id)
            check_match(await self.get(session_id), if_match)
            snapshot = await self._states.store(session_id, state)  # not before: what waits for an hour is swept
            record = await self._ledger.change(session_id, edit)
            self._states.keep_newest(record, write_id, state)
            return record

    def max_state_bytes(self) -> int:
        """More than any state file of this model has, in whatever numbers it was written."""
        return 4 * self._states.empty.num_bytes + (1 << 20)

    def ingest(
        self, session_id: str, pieces: AsyncIterator[str], terms: Terms | None = None
    ) -> AsyncGenerator[Progress | DocumentLearnt, None]:
        """Learn a document that arrives in pieces: see `Ingestions.learn`."""
        return self._ingestions.learn(session_id, pieces, terms or Terms())

    async def accept(self, session_id: str, pieces: AsyncIterator[str], terms: Terms) -> IngestionStatus:
        """Take a document in, to be learnt afterwards: see `Ingestions.accept`."""
        return await self._ingestions.accept(session_id, pieces, terms)

    async def ingestion(self, ingestion_id: str) -> IngestionStatus:
        """How far a document has come. Raises IngestionNotFound."""
        return await self._ingestions.status(ingestion_id)

    async def cancel_ingestion(self, ingestion_id: str) -> IngestionStatus:
        """Stop a document. Raises IngestionNotFound."""
        return await self._ingestions.cancel(ingestion_id)

    async def complete(self, session_id: str, request: CompletionRequest) -> AsyncGenerator[CompletionChunk, None]:
        """`answer`, in the native endpoint's words."""
        chunk = CompletionChunk(f"cmpl_{secrets.token_hex(12)}", session_id, 0, self.model.name, "")
        async with aclosing(self.answer(session_id, request)) as pieces:
            async for x in pieces:
                yield replace(chunk, version=x.version, text=x.text, finish_reason=x.finish_reason, usage=x.usage)

    async def moment(self, session_id: str) -> Moment:
        """What a session is now, for several answers that are to be of the same version."""
        return await self._states.newest(session_id)

    async def answer(
        self, session_id: str | None, request: CompletionRequest, moment: Moment | None = None
    ) -> AsyncGenerator[AnswerPiece, None]:
        """An answer, in pieces, of a session or of none: see `Answers.answer`."""
        if session_id is not None and moment is None:
            await self.get(session_id)
        async with aclosing(self._answers.answer(session_id, request, moment)) as pieces:
            async for piece in pieces:
                yield piece

    async def prepare(self, request: CompletionRequest) -> CompletionRequest:
        """The request with its prompt in tokens. Raises InvalidRequest where it is not one for this model."""
        return await self._answers.prepare(request)

    async def check(self) -> None:
        """Whether requests can be served. Raises StoreUnavailable."""
        await self._store.ping()

    def _check_may_change(self, record: SessionRecord, if_match: int | None) -> None:
        """Raise StateMismatch, VersionConflict where a version is asked for that the session leaves before its turn."""
        self._states.check(record)
        check_match(record, if_match)
        if if_match is not None and any(x.accepted for x in record.drafts):
            raise VersionConflict(f"session {record.id} is about to leave version {if_match}: documents are accepted")

    def _check_stays(self, record: SessionRecord, number: int) -> None:
        """Raise VersionNotFound, or SessionBusy where what is accepted would push the version out before its turn."""
        newer, coming = record.version - record.kept(number).number, sum(x.accepted for x in record.drafts)
        if coming and newer + coming >= self._limits.num_kept_versions:
            raise SessionBusy(
                f"so many documents are accepted that version {number} would be gone once they are learnt: cancel them"
            )

    async def _fork(
        self, session_id: str, number: int | None, metadata: Mapping[str, str] | None, ttl_seconds: int | None
    ) -> SessionRecord:
        parent = await self._store.get(session_id)
        version = parent.head if number is None else parent.kept(number)
        tokens = await self._ledger.read(parent.id, version.entries)
        tokens = tokens[len(tokens) - version.num_to_replay :]
        now, log = time.time(), {0: pack(0, tokens)} if tokens else {}
        record = replace(
            parent,
            id=_new_id(),
            created_at=now,
            updated_at=now,
            versions=(replace(version, entries=((0, len(tokens)),) if tokens else ()),),
            revision=0,
            write_id="",
            next_entry=len(log),
            ttl_seconds=ttl_seconds,
            drafts=(),
            outcomes=(),
            parent=Parent(parent.id, version.number),
            metadata=dict(parent.metadata if metadata is None else metadata),
        )
        await self._store.create(Commit(record, log))
        return record


def _check_id(session_id: str) -> None:
    if not session_id.isascii() or not session_id.replace("_", "").replace("-", "").isalnum():
        raise SessionNotFound(f"there is no session {session_id!r}")


def _new_id() -> str:
    return f"ses_{secrets.token_urlsafe(16)}"
