"""Answers: find a session's state, generate from it, and commit what was said where it is to be learnt."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from titans.state import State
from titans.tokenizer import Tokenizer

from titans_server import failpoints
from titans_server.engine import Engine, Finish, Read
from titans_server.errors import InvalidRequest
from titans_server.events import AnswerPiece, Usage
from titans_server.learning import check_match
from titans_server.observer import Asked, Observer
from titans_server.prompts import CompletionRequest, encode, num_characters, prepare
from titans_server.sessions import history
from titans_server.sessions.history import Writing
from titans_server.sessions.ledger import Ledger
from titans_server.sessions.record import SessionRecord
from titans_server.states import Moment, States
from titans_server.stopping import AnswerText
from titans_server.writers import Writers

_SHORT = 1_024  # characters of a prompt that are made tokens at once, in a fraction of a millisecond


class Answers:
    """Answers of the sessions on one engine. Lives on the event loop."""

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        states: States,
        tokenizer: Tokenizer,
        writers: Writers,
        *,
        max_prompt_tokens: int,
        num_kept_versions: int,
        observer: Observer,
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._states = states
        self._tokenizer = tokenizer
        self._writers = writers
        self._max_prompt_tokens = max_prompt_tokens
        self._num_kept = num_kept_versions
        self._observer = observer
        self._long_prompt = asyncio.Lock()  # held by the one that is made tokens: the cores are the engine's

    async def prepare(self, request: CompletionRequest) -> CompletionRequest:
        """The request with its prompt in tokens. Raises InvalidRequest where it is not one for this model."""
        if num_characters(request.prompt) <= _SHORT:
            return prepare(request, self._tokenizer, self._max_prompt_tokens)
        async with self._long_prompt:
            return await asyncio.to_thread(prepare, request, self._tokenizer, self._max_prompt_tokens)

    async def answer(
        self, session_id: str | None, request: CompletionRequest, moment: Moment | None = None
    ) -> AsyncGenerator[AnswerPiece, None]:
        """An answer, in pieces; the last one says how it ended. Closing the iterator stops it.

        `moment`: what the session is taken to be, unless the answer is to be learnt; None: what it is now. Without a
        session the model answers as one of which no document was read; nothing is kept of it. Raises VersionConflict
        where the session is not at the version that is asked for.
        """
        if session_id is None:
            if request.memory == "write":
                raise InvalidRequest("there is no session that could learn this: name one", param="memory")
            version, state = 0, self._states.empty
        else:
            if request.memory == "write":
                async with aclosing(self._answer_and_learn(session_id, request)) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            record, state = moment or await self._states.newest(session_id)
            check_match(record, request.if_match)
            version = record.version
        async with aclosing(self._answer(state, request, [])) as pieces:
            async for piece in pieces:
                yield replace(piece, version=version)

    async def _answer_and_learn(self, session_id: str, request: CompletionRequest) -> AsyncGenerator[AnswerPiece, None]:
        """In a task of its own: whoever takes the answer slowly holds up no other writer."""
        pieces: asyncio.Queue[AnswerPiece | None] = asyncio.Queue()  # bounded by the answer's length

        async def learn() -> None:
            try:
                async with self._writers.turn(session_id):
                    with self._engine.admitted():
                        await self._learn_answer(session_id, request, pieces)
            finally:
                pieces.put_nowait(None)

        learning = asyncio.create_task(learn())
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await learning
        finally:
            learning.cancel()
            await asyncio.gather(learning, return_exceptions=True)

    async def _learn_answer(
        self, session_id: str, request: CompletionRequest, told: "asyncio.Queue[AnswerPiece | None]"
    ) -> None:
        record, state = await self._states.newest(session_id)
        check_match(record, request.if_match)
        said: list[int] = []
        async with aclosing(self._answer(state, request, said, admitted=True)) as pieces:
            async for piece in pieces:
                if piece.finish_reason is not None:
                    with self._observer.working("ingest", len(said)):
                        state = await self._engine.ingest(state, said, urgent=True, admitted=True)
                    record = await self._write(record, state, said)
                told.put_nowait(replace(piece, version=record.version))

    async def _answer(
        self, state: State, request: CompletionRequest, said: list[int], *, admitted: bool = False
    ) -> AsyncGenerator[AnswerPiece, None]:
        """Generate, and collect in `said` the tokens of prompt and answer."""
        prompt = encode((await self.prepare(request)).prompt, self._tokenizer)
        said.extend(prompt)
        finish: Finish = "stop"
        sampling = request.sampling
        text = AnswerText(self._tokenizer, request.stops, with_tokens=sampling.num_logprobs is not None)
        asked = Asked(len(prompt), request.max_tokens, sampling.temperature, sampling.top_p)
        with self._observer.answering(asked) as telling:
            tokens = self._engine.generate(
                state,
                prompt,
                max_tokens=request.max_tokens,
                sampling=sampling,
                recall=request.memory != "off",
                echo=request.echo,
                admitted=admitted,
                telling=telling,
            )
            async with aclosing(tokens):
                async for drawn in tokens:
                    if isinstance(drawn, Read):
                        if piece := text.echo(drawn.drawn):
                            yield AnswerPiece(piece, text.take_tokens())
                        continue
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
        writing = Writing(record.head, secrets.token_hex(8), tokens, state.num_bytes, self._num_kept)
        with self._observer.working("commit"):
            record = await self._ledger.change(record.id, lambda record: history.write(record, writing))
        failpoints.reach("after_commit")
        self._states.keep_newest(record, writing.write_id, state)
        return record
