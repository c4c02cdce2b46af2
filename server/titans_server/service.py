"""The use cases: load a session, run it, commit it. Knows neither HTTP nor torch."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace

from titans.state import State
from titans.tokenizer import Tokenizer

from titans_server.engine import Engine, Finish
from titans_server.errors import InvalidRequest, SessionBusy, SessionNotFound, StateMismatch, VersionConflict
from titans_server.events import AnswerPiece, CompletionChunk, DocumentLearnt, Progress, Usage
from titans_server.observer import Asked, Observer
from titans_server.prompts import CompletionRequest, encode, prepare
from titans_server.reading import Document
from titans_server.sessions import codec
from titans_server.sessions.cache import StateCache
from titans_server.sessions.store import SessionRecord, SessionStore
from titans_server.stopping import AnswerText


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


@dataclass
class _Writer:
    """One writer a session at a time."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_users: int = 0


class SessionService:
    """Sessions on one engine and one store. Lives on the event loop."""

    def __init__(
        self,
        engine: Engine,
        store: SessionStore,
        model: ServedModel,
        cache: StateCache,
        limits: Limits,
        *,
        observer: Observer | None = None,
    ) -> None:
        self._engine = engine
        self._observer = observer or Observer()
        self._store = store
        self._cache = cache
        self._limits = limits
        self._empty = engine.new_state()
        self._writers: dict[str, _Writer] = {}
        self._loads: dict[str, asyncio.Task[State]] = {}
        self.model = model

    async def create(self, metadata: Mapping[str, str], *, owner: str = "") -> SessionRecord:
        """A new session that has read nothing."""
        now = time.time()
        session_id = f"ses_{secrets.token_urlsafe(16)}"
        record = SessionRecord(
            id=session_id,
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            created_at=now,
            updated_at=now,
            owner=owner,
            metadata=dict(metadata),
        )
        await self._store.create(record)
        return record

    async def get(self, session_id: str) -> SessionRecord:
        """A session's record. Raises SessionNotFound."""
        if not session_id.isascii() or not session_id.replace("_", "").replace("-", "").isalnum():
            raise SessionNotFound(f"there is no session {session_id!r}")
        return await self._store.get(session_id)

    async def delete(self, session_id: str) -> None:
        """Forget a session. Raises SessionNotFound."""
        await self.get(session_id)
        async with self._writer(session_id):
            await self._store.delete(session_id)
            self._cache.drop(session_id)

    async def ingest(
        self, session_id: str, pieces: AsyncIterator[str]
    ) -> AsyncGenerator[Progress | DocumentLearnt, None]:
        """Learn a document that arrives in pieces; the last event says that it is durable.

        Learnt whole or not at all: any error, and closing the iterator early, leaves the session as it was.
        """
        started = time.monotonic()
        await self.get(session_id)
        async with self._writer(session_id):
            record, state = await self._open(session_id)
            document = Document(self.model.tokenizer, pieces, after=record.tokens_seen, window=self._engine.window)
            async with aclosing(document.strides()) as strides:
                async for tokens in strides:
                    state = await self._ingest(state, tokens)
                    document.num_learnt += len(tokens)
                    yield Progress(document.num_learnt, document.bytes_learnt, time.monotonic() - started)
            if not document.num_learnt:
                raise InvalidRequest("the document is empty", code="empty_document")
            record = await self._commit(record, state, document.num_learnt)
        seconds = time.monotonic() - started
        yield DocumentLearnt(
            session_id, record.version, document.num_learnt, document.num_bytes, record.tokens_seen, seconds
        )

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
            version, state = 0, self._empty
        else:
            await self.get(session_id)
            if request.memory == "write":
                async with aclosing(self._answer_and_learn(session_id, request)) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            record, state = await self._open(session_id)
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
        async with self._writer(session_id):
            record, state = await self._open(session_id)
            said: list[int] = []
            async with aclosing(self._answer(state, request, said)) as pieces:
                async for piece in pieces:
                    if piece.finish_reason is not None:
                        state = await self._ingest(state, said, urgent=True)
                        record = await self._commit(record, state, len(said))
                    yield replace(piece, version=record.version)

    async def _answer(
        self, state: State, request: CompletionRequest, said: list[int]
    ) -> AsyncGenerator[AnswerPiece, None]:
        """Generate, and collect in `said` the tokens of prompt and answer."""
        prompt = encode(self.prepare(request).prompt, self.model.tokenizer)
        said.extend(prompt)
        text = AnswerText(self.model.tokenizer, request.stops)
        finish: Finish = "stop"
        tokens = self._engine.generate(
            state,
            prompt,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            recall=request.memory != "off",
        )
        sampling = request.sampling
        asked = Asked(len(prompt), request.max_tokens, sampling.temperature, sampling.top_p)
        async with aclosing(tokens):
            with self._observer.answering(asked) as telling:
                async for drawn in tokens:
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

    async def _open(self, session_id: str) -> tuple[SessionRecord, State]:
        """A session's record and state, as of its last commit."""
        try:
            return await self._open_once(session_id)
        except VersionConflict:  # a commit came between record and state: the session as it is now will do
            return await self._open_once(session_id)

    async def _open_once(self, session_id: str) -> tuple[SessionRecord, State]:
        """The state from memory where the version is right, else from the store."""
        record = await self._store.get(session_id)
        if record.fingerprint != self.model.fingerprint:
            raise StateMismatch(
                f"session {session_id} was made by model {record.model} ({record.fingerprint}); "
                f"this server runs {self.model.name} ({self.model.fingerprint})"
            )
        if record.version == 0:
            return record, self._empty
        state = self._cache.get(session_id, record.write_id)
        return record, state or await self._load(record)

    async def _load(self, record: SessionRecord) -> State:
        """One load a cold session, however many ask."""
        key = f"{record.id}@{record.write_id}"
        task = self._loads.get(key)
        if task is None:
            task = self._loads[key] = asyncio.create_task(self._load_once(record))
            task.add_done_callback(lambda _: self._loads.pop(key, None))
        return await asyncio.shield(task)

    async def _load_once(self, record: SessionRecord) -> State:
        with self._observer.working("load"):
            blob = await self._store.load(record)
            state = await asyncio.to_thread(codec.decode, blob, fingerprint=self.model.fingerprint, like=self._empty)
        self._cache.put(record.id, record.write_id, state)
        return state

    async def _ingest(self, state: State, tokens: list[int], *, urgent: bool = False) -> State:
        with self._observer.working("ingest", len(tokens)):
            return await self._engine.ingest(state, tokens, urgent=urgent)

    async def _commit(self, record: SessionRecord, state: State, num_tokens: int) -> SessionRecord:
        with self._observer.working("commit"):
            record = await self._commit_once(record, state, num_tokens)
        self._cache.put(record.id, record.write_id, state)
        return record

    async def _commit_once(self, record: SessionRecord, state: State, num_tokens: int) -> SessionRecord:
        blob = await asyncio.to_thread(codec.encode, state, self.model.fingerprint)
        record = replace(
            record,
            version=record.version + 1,
            tokens_seen=record.tokens_seen + num_tokens,
            updated_at=time.time(),
            state_bytes=len(blob),
            state_sha256=codec.sha256(blob),
            write_id=secrets.token_hex(8),
        )
        await self._store.commit(record, blob)
        return record

    @asynccontextmanager
    async def _writer(self, session_id: str) -> AsyncIterator[None]:
        writer = self._writers.setdefault(session_id, _Writer())
        if writer.num_users > self._limits.max_waiting_writers:
            raise SessionBusy(f"{writer.num_users} writers hold or wait for session {session_id}")
        writer.num_users += 1
        try:
            async with writer.lock:
                yield
        finally:
            writer.num_users -= 1
            if not writer.num_users:
                del self._writers[session_id]
