"""Several answers to one request: made together, told as they come or all at once."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from fastapi import Response

from titans_server.api.deps import AppContext, Replying, own_session, room
from titans_server.api.large import LargeResponse
from titans_server.api.openai.convert import AnswerForm, Json, WholeAnswer, total
from titans_server.api.openai.schemas import Asked, CreateAnswer, Memory
from titans_server.errors import InvalidRequest, ModelNotFound
from titans_server.events import AnswerPiece
from titans_server.prompts import CompletionRequest
from titans_server.service import SessionService

MAX_SCORES = 1 << 19  # of tokens, of one request: a hundred bytes each, until they are taken

T = TypeVar("T")
Pieces = AsyncGenerator[tuple[int, AnswerPiece], None]  # each with the number of its answer


async def respond(
    form: type[AnswerForm], body: CreateAnswer, reply: Replying, context: AppContext, header: str | None
) -> Any:
    """The response. What a client may have got wrong is found before a stream begins."""
    session_id, prepared = await prepare(body, body.memory, reply, context, header)
    choices = [choice for each in prepared for choice in choices_of(each, body.n)]
    check_number(choices, context.settings.max_requests)
    check_scores(body, choices)
    moment = None  # the same for all of them
    if session_id is not None and len(choices) > 1:
        moment = await context.service.moment(session_id)
    pieces = merged([context.service.answer(session_id, choice, moment) for choice in choices])
    answer_form = form(context.service.model, with_logprobs=body.num_logprobs is not None)
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        told = partial(streamed, form=answer_form, num_answers_each=body.n, with_usage=with_usage)
        return await reply.stream_answer(pieces, told)
    return await reply.whole(whole(pieces, answer_form, len(choices), body.n))


async def prepare(
    body: Asked, memory: Memory | None, reply: Replying, context: AppContext, header: str | None
) -> tuple[str | None, list[CompletionRequest]]:
    """The session that is asked, and what; None: it is written where there is one. Raises what is wrong with either."""
    service = context.service
    check_model(service, body.model)
    session_id = named_session(body.session, header)
    if session_id is not None:
        await own_session(session_id, reply.caller, service)
    if session_id is None and memory == "write":
        raise InvalidRequest("there is no session that could learn this: name one", param="memory")
    memory = memory or ("read" if session_id is None else "write")
    if memory == "write":
        await room(reply.caller, service)
    requests = body.to_requests(context.settings.max_completion_tokens, memory)
    return session_id, [await service.prepare(replace(request, if_match=reply.if_match)) for request in requests]


def check_scores(body: Asked, choices: Sequence[CompletionRequest]) -> None:
    """Raises InvalidRequest where more would have to be told of tokens than is kept for one reader."""
    if body.num_logprobs is None:
        return
    num_scores = sum(choice.num_told for choice in choices) * (1 + body.num_logprobs)
    if num_scores > MAX_SCORES:
        param = "top_logprobs" if "top_logprobs" in type(body).model_fields else "logprobs"
        message = f"tokens times (1 + {param}) may come to {num_scores}, at most {MAX_SCORES} are told of at once"
        raise InvalidRequest(message, param=param)


def check_number(choices: Sequence[CompletionRequest], max_requests: int) -> None:
    """Raises InvalidRequest where they could never be under way together: to wait for that is of no use."""
    if len(choices) > max_requests:
        raise InvalidRequest(f"prompts times n is at most {max_requests} on this server", param="n")


def check_model(service: SessionService, name: str) -> None:
    """Raises ModelNotFound unless it is the one that is served."""
    if name != service.model.name:
        raise ModelNotFound(f"there is no model {name!r}; this server runs {service.model.name!r}", param="model")


def named_session(in_body: str | None, in_header: str | None) -> str | None:
    """The session that a request names, None for none. Raises InvalidRequest where it names two."""
    if in_body is not None and in_header is not None and in_body != in_header:
        raise InvalidRequest("the body and X-Session-ID name two sessions", param="session")
    return in_header if in_body is None else in_body


def choices_of(request: CompletionRequest, num_choices: int) -> Iterator[CompletionRequest]:
    """The same request several times; each has a seed of its own, which follows from the one given."""
    seed = request.sampling.seed
    for i in range(num_choices):
        own_seed = None if seed is None else (seed + i) % (1 << 63)
        yield replace(request, sampling=replace(request.sampling, seed=own_seed))


async def whole(pieces: Pieces, form: AnswerForm, num_answers: int, num_answers_each: int) -> Response:
    """All the answers in one object."""
    answers, are_told = [WholeAnswer(form) for _ in range(num_answers)], False
    async with aclosing(pieces) as source:
        async for index, piece in source:
            answers[index].add(piece)
            if piece.tokens:
                are_told = True
                await asyncio.sleep(0)  # an echoed prompt comes a window at a time, and others have to be served
    usages = {i: answer.usage for i, answer in enumerate(answers) if answer.usage is not None}

    def made() -> Response:
        return json_response(form.whole(answers, total(usages, num_answers_each)))

    return await asyncio.to_thread(made) if are_told else made()


def json_response(text: str) -> Response:
    """JSON that is ready: FastAPI would take a dict apart first, value by value."""
    return LargeResponse(text, media_type="application/json")


async def streamed(
    pieces: Pieces, form: AnswerForm, num_answers_each: int, *, with_usage: bool
) -> AsyncGenerator[Json, None]:
    """Chunks as they come; with usage, that is null in all but one more."""
    begun: set[int] = set()
    usages = {}
    async with aclosing(pieces) as source:
        async for index, piece in source:
            chunk = form.chunk(index, piece, first=index not in begun)
            begun.add(index)
            if piece.usage is not None:
                usages[index] = piece.usage
            yield chunk | ({"usage": None} if with_usage else {})
    if with_usage:
        yield form.last_chunk(total(usages, num_answers_each))


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """What all the sources yield, each with its source's number, as it comes; the first to fail ends it all."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:
            async for only in source:
                yield 0, only
        return
    items: asyncio.Queue[tuple[int, T] | None] = asyncio.Queue()  # bounded by what the sources have to give

    async def read(number: int, source: AsyncGenerator[T, None]) -> None:
        async with aclosing(source):
            async for item in source:
                items.put_nowait((number, item))

    async def read_all() -> None:
        tasks = [asyncio.create_task(read(number, source)) for number, source in enumerate(sources)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            items.put_nowait(None)

    reading = asyncio.create_task(read_all())
    try:
        while (item := await items.get()) is not None:
            yield item
        await reading
    finally:
        reading.cancel()
