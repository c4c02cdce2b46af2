"""The endpoints. docs/api.md says the same to a user, and a test compares the two."""

from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from titans_server.api.deps import Context, From, OwnSession, OwnSessionToDelete, Reply, RoomForAnother, Service, room
from titans_server.api.preconditions import IfMatch, show
from titans_server.api.schemas import Completion, CreateCompletion, CreateSession, Session, SessionList
from titans_server.errors import InvalidRequest
from titans_server.events import CompletionChunk
from titans_server.prompts import CompletionRequest
from titans_server.service import SessionService

router = APIRouter()
SESSION = "/v1/sessions/{session_id}"
Limit = Annotated[int, Query(ge=1, le=100)]


@router.post("/v1/sessions", status_code=201, dependencies=[RoomForAnother])
async def create_session(
    service: Service, caller: From, response: Response, body: CreateSession | None = None
) -> Session:
    """Create a session that has read nothing."""
    body = body or CreateSession()
    record = await service.create(body.metadata, ttl_seconds=body.ttl_seconds, owner=caller.owner)
    return show(record, response, is_new=True)


@router.get("/v1/sessions")
async def list_sessions(service: Service, caller: From, limit: Limit = 20, after: str | None = None) -> SessionList:
    """Show the caller's sessions, newest first."""
    records = await service.sessions_of(caller.owner, limit + 1, after)
    return SessionList(data=[Session.of(record) for record in records[:limit]], has_more=len(records) > limit)


@router.get(SESSION)
async def get_session(session_id: OwnSession, service: Service, response: Response) -> Session:
    """Show a session."""
    return show(await service.get(session_id), response)


@router.delete(SESSION, status_code=204)
async def delete_session(session_id: OwnSessionToDelete, service: Service, if_match: IfMatch) -> None:
    """Forget a session and its states."""
    await service.delete(session_id, if_match)


@router.post(SESSION + "/completions", response_model=None, responses={200: {"model": Completion}})
async def create_completion(
    session_id: OwnSession, body: CreateCompletion, service: Service, context: Context, reply: Reply
) -> Any:
    """Answer a prompt from what the session has read."""
    limit = context.settings.max_completion_tokens
    if body.max_tokens > limit and "max_tokens" in body.model_fields_set:
        raise InvalidRequest(f"max_tokens is at most {limit}", param="max_tokens")
    if body.memory == "write":
        await room(reply.caller, service)
    request = replace(body.to_request(), max_tokens=min(body.max_tokens, limit), if_match=reply.if_match)
    if body.stream:
        return await reply.stream_answer(service.complete(session_id, request))
    return await reply.whole(_complete(service, session_id, request))


async def _complete(service: SessionService, session_id: str, request: CompletionRequest) -> Completion:
    text, last = [], None
    async with aclosing(service.complete(session_id, request)) as chunks:
        async for last in chunks:
            text.append(last.text)
    assert isinstance(last, CompletionChunk)
    assert last.finish_reason is not None
    assert last.usage is not None
    return Completion(
        id=last.id,
        session=last.session,
        version=last.version,
        model=last.model,
        text="".join(text),
        finish_reason=last.finish_reason,
        usage=last.usage,
    )
