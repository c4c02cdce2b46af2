"""The use cases: load a session, run it, commit it. Knows neither HTTP nor torch."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from titans.state import State
from titans.tokenizer import Tokenizer

from titans_server import failpoints
from titans_server.engine import Engine, Finish, Read
from titans_server.errors import InvalidRequest, InvalidState, SessionNotFound, StateCorrupted, VersionConflict
from titans_server.events import AnswerPiece, CompletionChunk, DocumentLearnt, IngestionStatus, Progress, Usage
from titans_server.ingesting import Ingestions, Terms
from titans_server.learning import Learning, check_match
from titans_server.observer import Asked, Observer
from titans_server.prompts import CompletionRequest, encode, prepare
from titans_server.reading import SEPARATOR
from titans_server.sessions import codec, history
from titans_server.sessions.cache import StateCache
from titans_server.sessions.history import Overtaken, Writing
from titans_server.sessions.ledger import Ledger
from titans_server.sessions.log import pack
from titans_server.sessions.record import Parent, SessionRecord, Version
from titans_server.sessions.store import Commit, SessionStore
from titans_server.sessions.store import Usage as Occupied
from titans_server.states import SnapshotPolicy, States
from titans_server.stopping import AnswerText
from titans_server.writers import Writers

_ATTEMPTS = 5  # to fork a session whose snapshots move meanwhile


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
        self._engine = engine
        self._observer = observer or Observer()
        self._store = store
        self._limits = limits
        self._ledger = Ledger(store)
        self._states = States(engine, self._ledger, model.fingerprint, cache, policy=policy, observer=self._observer)
        self._writers = Writers(limits.max_waiting_writers)
        separator = model.tokenizer.encode(SEPARATOR)
        learning = Learning(
            engine,
            self._ledger,
            self._states,
            separator,
            num_kept_versions=limits.num_kept_versions,
            observer=self._observer,
        )
        self._ingestions = Ingestions(self._ledger, self._states, learning, model.tokenizer, self._writers)
        self.model = model

    def start(self) -> None:
        """Begin with what nobody asks for: snapshots of idle sessions, work that servers left, sweeping."""
        self._states.start()
        self._ingestions.start()

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
        if not session_id.isascii() or not session_id.replace("_", "").replace("-", "").isalnum():
            raise SessionNotFound(f"there is no session {session_id!r}")
        return await self._store.get(session_id)

    async def sessions_of(self, owner: str, limit: int, after: str | None) -> Sequence[SessionRecord]:
        """An owner's sessions, newest first. Raises SessionNotFound where `after` is none of them."""
        return await self._store.list(owner, limit, after)

    async def usage(self, owner: str) -> Occupied:
        """What an owner's sessions take in the store."""
        return await self._store.usage(owner)

    async def delete(self, session_id: str, if_match: int | None = None) -> None:
        """Forget a session. Raises SessionNotFound, VersionConflict."""
        await self.get(session_id)
        async with self._writers.turn(session_id):
            check_match(await self._store.get(session_id), if_match)
            await self._store.delete(session_id)
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
        """Make what an older version was the newest. Raises VersionNotFound, VersionConflict."""
        await self.get(session_id)
        write_id = secrets.token_hex(8)

        def edit(record: SessionRecord) -> history.Edit:
            if record.made_by(write_id) is None:
                check_match(record, if_match)
            return history.restore(record, number, write_id, self._limits.num_kept_versions)

        async with self._writers.turn(session_id):
            return await self._ledger.change(session_id, edit)

    async def export_state(self, session_id: str, number: int | None) -> tuple[SessionRecord, Version, bytes]:
        """A version's state as a file that `import_state` reads, anywhere. Raises VersionNotFound."""
        record, version, state = await self._states.read(session_id, number)
        return record, version, await asyncio.to_thread(codec.encode, state, self.model.fingerprint)

    async def import_state(self, session_id: str, blob: bytes, if_match: int | None) -> SessionRecord:
        """Make a state that was exported the session's newest version.

        Raises StateMismatch for another model's, InvalidState for one that is torn or not of this model's shape.
        """
        self._states.check(await self.get(session_id))
        try:
            state = await asyncio.to_thread(
                codec.decode, blob, fingerprint=self.model.fingerprint, like=self._states.empty
            )
        except StateCorrupted as error:
            raise InvalidState(error.message) from error
        if int(state.position) < 0:
            raise InvalidState("the state has read fewer tokens than none")
        write_id = secrets.token_hex(8)
        snapshot = await self._states.store(session_id, state)

        def edit(record: SessionRecord) -> history.Edit:
            if record.made_by(write_id) is None:
                check_match(record, if_match)
            return history.replace_state(record, self._writing(record.head, write_id, (), state), snapshot)

        async with self._writers.turn(session_id):
            record = await self._ledger.change(session_id, edit)
            self._keep(record, write_id, state)
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

    async def answer(self, session_id: str | None, request: CompletionRequest) -> AsyncGenerator[AnswerPiece, None]:
        """An answer, in pieces; the last one says how it ended. Closing the iterator stops it.

        Without a session the model answers as one of which no document was read; nothing is kept of it.
        """
        if session_id is None:
            if request.memory == "write":
                raise InvalidRequest("there is no session that could learn this: name one", param="memory")
            version, state = 0, self._states.empty
        else:
            await self.get(session_id)
            if request.memory == "write":
                async with aclosing(self._answer_and_learn(session_id, request)) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            record, state = await self._states.newest(session_id)
            version = record.version
        async with aclosing(self._answer(state, request, [])) as pieces:
            async for piece in pieces:
                yield replace(piece, version=version)

    def prepare(self, request: CompletionRequest) -> CompletionRequest:
        """The request with its prompt in tokens. Raises InvalidRequest where it is not one for this model."""
        return prepare(request, self.model.tokenizer, self._limits.max_prompt_tokens)

    async def check(self) -> None:
        """Whether requests can be served. Raises StoreUnavailable."""
        await self._store.ping()

    async def _answer_and_learn(self, session_id: str, request: CompletionRequest) -> AsyncGenerator[AnswerPiece, None]:
        async with self._writers.turn(session_id):
            record, state = await self._states.newest(session_id)
            said: list[int] = []
            async with aclosing(self._answer(state, request, said)) as pieces:
                async for piece in pieces:
                    if piece.finish_reason is not None:
                        with self._observer.working("ingest", len(said)):
                            state = await self._engine.ingest(state, said, urgent=True)
                        record = await self._write(record, state, said)
                    yield replace(piece, version=record.version)

    async def _answer(
        self, state: State, request: CompletionRequest, said: list[int]
    ) -> AsyncGenerator[AnswerPiece, None]:
        """Generate, and collect in `said` the tokens of prompt and answer."""
        prompt = encode(self.prepare(request).prompt, self.model.tokenizer)
        said.extend(prompt)
        text = AnswerText(self.model.tokenizer, request.stops, with_tokens=request.sampling.num_logprobs is not None)
        finish: Finish = "stop"
        tokens = self._engine.generate(
            state,
            prompt,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            recall=request.memory != "off",
            echo=request.echo,
        )
        sampling = request.sampling
        asked = Asked(len(prompt), request.max_tokens, sampling.temperature, sampling.top_p)
        async with aclosing(tokens):
            with self._observer.answering(asked) as telling:
                async for drawn in tokens:
                    if isinstance(drawn, Read):
                        if piece := text.echo(drawn.drawn):
                            yield AnswerPiece(piece, text.take_tokens())
                        continue
                    if request.echo and len(said) == len(prompt) and (piece := text.echo_rest()):
                        yield AnswerPiece(piece, text.take_tokens())
                    if isinstance(drawn, str):
                        finish = drawn
                        break
                    telling.drawn()
                    said.append(drawn.token)
                    if piece := text.feed(drawn):
                        yield AnswerPiece(piece, text.take_tokens())
                    if text.stopped:
                        break
                rest = text.finish()
                finish = "stop" if text.stopped else finish
                telling.finished(finish)
        usage = Usage(len(prompt), len(said) - len(prompt), len(said))
        yield AnswerPiece(rest, text.take_tokens(last=True), finish_reason=finish, usage=usage)

    async def _write(self, record: SessionRecord, state: State, tokens: Sequence[int]) -> SessionRecord:
        """The session after reading some tokens. Raises VersionConflict where another version came first."""
        writing = self._writing(record.head, secrets.token_hex(8), tokens, state)
        try:
            with self._observer.working("commit"):
                record = await self._ledger.change(record.id, lambda record: history.write(record, writing))
        except Overtaken:
            raise VersionConflict(f"session {record.id} moved on from version {record.version} meanwhile") from None
        failpoints.reach("after_commit")
        self._keep(record, writing.write_id, state)
        return record

    def _writing(self, base: Version, write_id: str, tokens: Sequence[int], state: State) -> Writing:
        return Writing(base, write_id, tokens, state.num_bytes, self._limits.num_kept_versions)

    def _keep(self, record: SessionRecord, write_id: str, state: State) -> None:
        if record.head.write_id == write_id:
            self._states.keep(record.id, record.head, state)

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


def _new_id() -> str:
    return f"ses_{secrets.token_urlsafe(16)}"
