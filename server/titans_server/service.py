"""The use cases: load a session, run it, commit it. Knows neither HTTP nor torch."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from titans.sampling import SamplingParams
from titans.state import State
from titans.tokenizer import StreamEncoder, Tokenizer

from titans_server.engine import Engine, Finish
from titans_server.errors import InvalidRequest, SessionBusy, SessionNotFound, StateMismatch, VersionConflict
from titans_server.events import CompletionChunk, DocumentLearnt, Progress, Usage
from titans_server.sessions import codec
from titans_server.sessions.cache import StateCache
from titans_server.sessions.store import SessionRecord, SessionStore
from titans_server.stopping import AnswerText

SEPARATOR = "\n\n"  # stands between two documents of a session
_STRIDE = 4  # windows that a document hands to the engine at once


@dataclass(frozen=True)
class ServedModel:
    """What the service knows of the model."""

    name: str
    fingerprint: str
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Limits:
    """Bounds that an operator sets."""

    max_prompt_tokens: int
    max_waiting_writers: int


@dataclass(frozen=True)
class CompletionRequest:
    """An answer that is asked for."""

    prompt: str
    max_tokens: int
    sampling: SamplingParams
    stops: tuple[str, ...] = ()
    memory: Literal["read", "write", "off"] = "read"


@dataclass
class _Writer:
    """One writer a session at a time."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_users: int = 0


class SessionService:
    """Sessions on one engine and one store. Lives on the event loop."""

    def __init__(
        self, engine: Engine, store: SessionStore, model: ServedModel, cache: StateCache, limits: Limits
    ) -> None:
        self._engine = engine
        self._store = store
        self._cache = cache
        self._limits = limits
        self._empty = engine.new_state()
        self._writers: dict[str, _Writer] = {}
        self._loads: dict[str, asyncio.Task[State]] = {}
        self.model = model

    async def create(self, metadata: Mapping[str, str]) -> SessionRecord:
        """A new session that has read nothing."""
        now = time.time()
        session_id = f"ses_{secrets.token_urlsafe(16)}"
        record = SessionRecord(
            id=session_id,
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            created_at=now,
            updated_at=now,
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
            document = _Document(self.model.tokenizer, pieces, after=record.tokens_seen, window=self._engine.window)
            async with aclosing(document.strides()) as strides:
                async for tokens in strides:
                    state = await self._engine.ingest(state, tokens)
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
        """An answer, in pieces; the last one says how it ended. Closing the iterator stops it."""
        await self.get(session_id)
        if request.memory != "write":
            record, state = await self._open(session_id)
            async with aclosing(self._answer(record, state, request, [])) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        async with self._writer(session_id):
            record, state = await self._open(session_id)
            said: list[int] = []
            async with aclosing(self._answer(record, state, request, said)) as chunks:
                async for chunk in chunks:
                    if chunk.finish_reason is not None:
                        state = await self._engine.ingest(state, said)
                        record = await self._commit(record, state, len(said))
                        chunk = replace(chunk, version=record.version)
                    yield chunk

    async def check(self) -> None:
        """Whether requests can be served. Raises StoreUnavailable."""
        await self._store.ping()

    async def _answer(
        self, record: SessionRecord, state: State, request: CompletionRequest, said: list[int]
    ) -> AsyncGenerator[CompletionChunk, None]:
        """Generate, and collect in `said` the tokens of prompt and answer."""
        prompt = self.model.tokenizer.encode(request.prompt)
        if not prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if len(prompt) > self._limits.max_prompt_tokens:
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens, at most {self._limits.max_prompt_tokens} are taken: "
                "post long texts as documents",
                code="prompt_too_long",
                param="prompt",
            )
        said.extend(prompt)
        text = AnswerText(self.model.tokenizer, request.stops)
        chunk = CompletionChunk(f"cmpl_{secrets.token_hex(12)}", record.id, record.version, self.model.name, "")
        finish: Finish = "stop"
        tokens = self._engine.generate(
            state,
            prompt,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            recall=request.memory != "off",
        )
        async with aclosing(tokens):
            async for token in tokens:
                if isinstance(token, str):
                    finish = token
                    break
                said.append(token)
                if piece := text.feed(token):
                    yield replace(chunk, text=piece)
                if text.stopped:
                    break
        usage = Usage(len(prompt), len(said) - len(prompt), len(said))
        rest = text.finish()
        yield replace(chunk, text=rest, finish_reason="stop" if text.stopped else finish, usage=usage)

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
        blob = await self._store.load(record)
        state = await asyncio.to_thread(codec.decode, blob, fingerprint=self.model.fingerprint, like=self._empty)
        self._cache.put(record.id, record.write_id, state)
        return state

    async def _commit(self, record: SessionRecord, state: State, num_tokens: int) -> SessionRecord:
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
        self._cache.put(record.id, record.write_id, state)
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


class _Document:
    """A document on its way into a session: text in, strides of tokens out, in bounded memory."""

    def __init__(self, tokenizer: Tokenizer, pieces: AsyncIterator[str], *, after: int, window: int) -> None:
        self._tokenizer = tokenizer
        self._pieces = pieces
        self._position = after
        self._window = window
        self.num_bytes = 0
        self.num_tokens = 0
        self.num_learnt = 0

    @property
    def bytes_learnt(self) -> int:
        """The share of the bytes so far that the learnt tokens stand for."""
        return self.num_bytes * self.num_learnt // max(1, self.num_tokens)

    async def strides(self) -> AsyncGenerator[list[int], None]:
        """Tokens to ingest: all but the last end on a window's boundary, however the text arrived."""
        encoder, tokens = StreamEncoder(self._tokenizer), list[int]()
        async for piece in self._pieces:
            if not self.num_bytes and self._position and piece:
                tokens += self._count(self._tokenizer.encode(SEPARATOR))
            self.num_bytes += len(piece.encode())
            tokens += self._count(await asyncio.to_thread(encoder.feed, piece))
            while len(tokens) >= (size := self._stride()):
                self._position += size
                yield tokens[:size]
                tokens = tokens[size:]
        tokens += self._count(await asyncio.to_thread(encoder.finish))
        while tokens and self.num_bytes:
            size = min(len(tokens), self._stride())
            self._position += size
            yield tokens[:size]
            tokens = tokens[size:]

    def _stride(self) -> int:
        return _STRIDE * self._window - self._position % self._window

    def _count(self, tokens: list[int]) -> list[int]:
        self.num_tokens += len(tokens)
        return tokens
