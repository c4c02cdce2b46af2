"""From a document's tokens to a session's next version: learn, checkpoint, seal; again where another came first."""

import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

from titans.state import State

from titans_server import failpoints
from titans_server.engine import Engine
from titans_server.errors import (
    IngestionCancelled,
    InvalidRequest,
    KeyReused,
    Overloaded,
    StateCorrupted,
    VersionConflict,
)
from titans_server.events import DocumentLearnt, Progress
from titans_server.observer import Observer
from titans_server.retries import Retries
from titans_server.sessions import history
from titans_server.sessions.history import Overtaken, Portion, Writing
from titans_server.sessions.ledger import Ledger
from titans_server.sessions.record import Draft, Outcome, SessionRecord, Snapshot, Version
from titans_server.sessions.uncancelled import Uncancelled
from titans_server.states import States

log = logging.getLogger(__name__)

_MIN_PAUSE, _MAX_PAUSE = 0.5, 10.0  # seconds, until the engine may have room
_ACCEPTED_SHARE = 4  # one of so many places at the engine is for documents that nobody waits for
_STRIDE = 4  # times what the engine reads at once: so much is handed over, for each time is a trip there and back


class SessionCorrupted(StateCorrupted):
    """What a document is to follow cannot be read. The document itself is as it was."""


@dataclass
class Work:
    """A document that this server works on."""

    session_id: str
    draft: Draft  # as the last commit left it; without entries where there was none
    started: float = field(default_factory=time.monotonic)
    num_learnt: int = 0  # tokens, the separator among them
    cancelled: bool = False
    known: SessionRecord | None = None  # as it was read when the document's turn came
    appends: Uncancelled = field(default_factory=Uncancelled)  # carried through, though the client leaves amid one
    appended: SessionRecord | None = None  # as the last append left it: long, where the document is
    learner: "Learner | None" = None
    learnt: DocumentLearnt | None = None  # once it is a version

    def check(self) -> None:
        """Raise IngestionCancelled where somebody asked for that."""
        if self.cancelled:
            raise IngestionCancelled(f"ingestion {self.draft.ingestion} was cancelled")


@dataclass
class Learner:
    """A state half way from one version to the next."""

    record: SessionRecord  # with the version to go on from as its newest
    state: State
    since: Snapshot | None  # the newest one that the state goes on from
    queue: list[int]  # the next tokens that are to be learnt, few at a time: a document may be longer than memory
    logged: deque[tuple[int, int]]  # the log's entries that follow them
    rest: list[int]  # the tokens that follow these

    @property
    def num_waiting(self) -> int:
        """Tokens that are to be learnt, as far as the document is here."""
        return len(self.queue) + sum(num_tokens for _, num_tokens in self.logged) + len(self.rest)

    @property
    def base(self) -> Version:
        """The version to go on from."""
        return self.record.head

    def next(self, stride: int, window: int, *, last: bool) -> list[int]:
        """The next tokens, up to a window's boundary; all but the last ones end on one. None yet: []."""
        size = stride - int(self.state.position) % window
        if len(self.queue) < size and not last:
            return []
        tokens, self.queue = self.queue[:size], self.queue[size:]
        return tokens

    @property
    def num_learnt(self) -> int:
        """Tokens since the base."""
        return int(self.state.position) - self.base.tokens


class Learning:
    """Learns what has been logged, or is the last of a document; a version is the end of it."""

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        states: States,
        separator: Sequence[int],
        *,
        num_kept_versions: int,
        observer: Observer,
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._states = states
        self._num_kept = num_kept_versions
        self.observer = observer
        self.separator = separator

    @property
    def stride(self) -> int:
        """Tokens that are logged and learnt at once, more or less."""
        return _STRIDE * self._engine.largest_block

    @property
    def max_accepted(self) -> int:
        """Accepted documents that are learnt at once: nobody waits for them, as somebody does for all else."""
        return max(1, self._engine.max_requests // _ACCEPTED_SHARE)

    def admitted(self) -> AbstractContextManager[None]:
        """A place for a document at the engine, for all of `learn`. Raises Overloaded."""
        return self._engine.admitted()

    async def learn(self, work: Work, portion: Portion) -> AsyncGenerator[Progress, None]:
        """Learn a portion that has been logged, or the last one, which makes a version; then `work.learnt` is there.

        Raises VersionConflict where the session has left the version that the document is to follow.
        """
        if work.learner is not None:
            work.learner.rest += portion.tokens
        retries = Retries(log, f"ingestion {work.draft.ingestion} waits", first=_MIN_PAUSE, most=_MAX_PAUSE)
        while True:
            try:
                learner = work.learner = work.learner or await self._begin(work, portion)
                while tokens := await self._next(work, learner, last=portion.is_last):
                    work.check()
                    with self.observer.working("ingest", len(tokens)):
                        learner.state = await self._engine.ingest(learner.state, tokens, admitted=True)
                    yield self._progress(work, learner, portion)
                    await self._checkpoint(work, learner)
                if portion.is_last:
                    await self._seal(work, learner, portion)
                return
            except Overtaken:
                work.learner = None
            except Overloaded as error:  # for what another server made of the session has to be learnt before
                if not work.draft.entries:
                    raise
                await retries.pause(error)
                work.check()

    async def _begin(self, work: Work, portion: Portion) -> Learner:
        """From the newest version, or from the document's own checkpoint where that still stands on it."""
        known, work.known = work.known, None
        try:
            record, state = await self._states.newest(work.session_id, None if work.draft.entries else known)
        except StateCorrupted as error:
            raise SessionCorrupted(error.message) from error
        draft = record.draft(work.draft.ingestion) or work.draft
        check_match(record, draft.if_match)
        since = record.head.snapshot
        if draft.snapshot is not None and draft.base == record.version:
            loaded = await self._load_checkpoint(work.session_id, record.head, draft, draft.snapshot)
            if loaded is not None:
                state, since = loaded, draft.snapshot
        skipped = int(state.position) - record.head.tokens
        if not record.head.tokens:  # nothing that a separator could stand between
            skipped += len(self.separator)
        logged = deque(draft.entries)
        while logged and logged[0][1] <= skipped:
            skipped -= logged.popleft()[1]
        queue = [] if draft.entries else list(self.separator)
        if logged and skipped:
            queue = await self._read(work, logged)
        rest = list(portion.tokens) if portion.is_last else []  # another portion is in the log
        return Learner(record, state, since, queue[skipped:], logged, rest)

    async def _load_checkpoint(self, session_id: str, base: Version, draft: Draft, snapshot: Snapshot) -> State | None:
        """A document's checkpoint; None where it is torn or gone: no version may begin from it then."""
        try:
            state = await self._states.load_snapshot(snapshot)
        except StateCorrupted as error:
            log.warning("ingestion %s begins again: %s", draft.ingestion, error)
            state = None
        if state is None:
            forget = partial(history.checkpoint, draft=draft, base=base, snapshot=None)
            await self._ledger.change(session_id, forget)
        return state

    async def _next(self, work: Work, learner: Learner, *, last: bool) -> list[int]:
        while learner.logged and len(learner.queue) < self.stride:
            learner.queue += await self._read(work, learner.logged)
        if not learner.logged:
            learner.queue += learner.rest
            learner.rest = []
        return learner.next(self.stride, self._engine.window, last=last)

    async def _read(self, work: Work, logged: deque[tuple[int, int]]) -> list[int]:
        """The tokens of the first of the log's entries, which is taken out."""
        try:
            tokens = await self._ledger.read(work.session_id, (logged[0],))
        except StateCorrupted:
            record = await self._ledger.store.get(work.session_id)  # raises where it was deleted meanwhile
            work.cancelled |= record.draft(work.draft.ingestion) is None  # maybe on another server
            work.check()
            raise
        logged.popleft()
        return tokens

    def _progress(self, work: Work, learner: Learner, portion: Portion) -> Progress:
        work.num_learnt = learner.num_learnt
        num_tokens = learner.num_learnt + learner.num_waiting
        num_bytes = portion.num_bytes * learner.num_learnt // num_tokens
        return Progress(learner.num_learnt, num_bytes, time.monotonic() - work.started)

    async def _checkpoint(self, work: Work, learner: Learner) -> None:
        """Write the state down where it is due, so that a crash costs the tokens since then and no more."""
        is_logged = learner.num_learnt <= work.draft.tokens  # what has not been is sealed in a moment
        if not is_logged or not self._states.is_due(learner.since, learner.state, 0):
            return
        snapshot = await self._states.store(work.session_id, learner.state)
        await self._ledger.change(
            work.session_id,
            lambda record: history.checkpoint(record, work.draft, learner.base, snapshot),
        )
        learner.since = snapshot

    async def _seal(self, work: Work, learner: Learner, portion: Portion) -> None:
        if portion.num_bytes == 0:
            raise InvalidRequest("the document is empty", code="empty_document")
        draft, write_id = work.draft, secrets.token_hex(8)
        unlogged = () if draft.accepted else portion.tokens
        writing = Writing(learner.base, write_id, unlogged, learner.state.num_bytes, self._num_kept)
        outcome = Outcome(
            draft.ingestion,
            "done",
            draft.created_at,
            key=draft.key,
            sha256=portion.sha256,
            num_bytes=portion.num_bytes,
            seconds=time.monotonic() - work.started,
        )
        with self.observer.working("commit"):
            record = await self._ledger.change(
                work.session_id,
                lambda record: history.seal(record, draft, self.separator, writing, outcome),
                known=None if draft.entries else learner.record,  # what is logged has moved the record on
            )
        failpoints.reach("after_commit")
        self._states.keep_newest(record, write_id, learner.state)
        work.learnt = _result(record, draft, portion.sha256)


def check_match(record: SessionRecord, version: int | None) -> None:
    """Raise VersionConflict unless the session is at a version; None: any will do."""
    if version is not None and record.version != version:
        raise VersionConflict(f"session {record.id} is at version {record.version}, not at {version}")


def replayed(session_id: str, outcome: Outcome, sha256: str) -> DocumentLearnt:
    """What was said when a document was learnt. Raises KeyReused where that was another document."""
    return _learnt(session_id, outcome, sha256, is_replay=True)


def _result(record: SessionRecord, draft: Draft, sha256: str) -> DocumentLearnt:
    """What the session says of a document that was sealed, by this server or by another one, under its key."""
    own, first = record.outcome(draft.ingestion), record.done(draft.key)
    if first is not None and first.ingestion != draft.ingestion:
        return replayed(record.id, first, sha256)
    if own is not None and own.status == "done":
        return _learnt(record.id, own, sha256, is_replay=False)
    raise IngestionCancelled(f"ingestion {draft.ingestion} was cancelled")


def _learnt(session_id: str, outcome: Outcome, sha256: str, *, is_replay: bool) -> DocumentLearnt:
    if outcome.sha256 != sha256:  # maybe learnt by another server, which was sent another end of it
        raise KeyReused(history.KEY_REUSED)
    return DocumentLearnt(
        session_id,
        outcome.version,
        outcome.tokens,
        outcome.num_bytes,
        outcome.tokens_seen,
        outcome.seconds,
        outcome.ingestion,
        is_replay,
    )
