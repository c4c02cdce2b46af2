"""OpenAI's endpoints for answers with a state. docs/api.md says the same to a user, and a test compares the two."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NoReturn

from fastapi import APIRouter, Request

from titans_server.api.deps import (
    Context,
    From,
    OwnSession,
    OwnSessionToDelete,
    Reply,
    Room,
    RoomForAnother,
    Service,
    unless_disconnected,
)
from titans_server.api.openai.answers import check_scores, json_response, prepare
from titans_server.api.openai.convert import Json
from titans_server.api.openai.responses.convert import ResponseForm, ResponseFraming, conversation_object, item_list
from titans_server.api.openai.responses.schemas import AddItems, CreateConversation, CreateResponse, InputItem
from titans_server.api.openai.routes import OpenAIRoute, SessionHeader
from titans_server.api.preconditions import IfMatch
from titans_server.errors import InvalidRequest
from titans_server.ingesting import Terms
from titans_server.service import SessionService

router = APIRouter(route_class=OpenAIRoute)
CONVERSATION = "/v1/conversations/{session_id}"


@router.post("/v1/responses", response_model=None)
async def create_response(body: CreateResponse, reply: Reply, context: Context, session: SessionHeader = None) -> Any:
    """Answer; in a conversation from all that was said in it, which then remembers this, too."""
    session_id, (request,) = await prepare(body, body.memory, reply, context, session)
    check_scores(body, [request])
    form = ResponseForm(body, session_id, context.service.model)
    pieces = context.service.answer(session_id, request)
    if body.stream:
        return await reply.stream_answer(pieces, form.events, ResponseFraming(form))
    return json_response(await reply.whole(form.whole(pieces)))


@router.post("/v1/conversations", dependencies=[RoomForAnother])
async def create_conversation(
    request: Request, service: Service, caller: From, body: CreateConversation | None = None
) -> Json:
    """Create a session, under the name of a conversation; what its items say is learnt."""
    body = body or CreateConversation()
    record = await service.create(body.metadata or {}, owner=caller.owner)
    if body.items:
        try:
            await unless_disconnected(request, _learn(service, record.id, body.items))
        except BaseException:
            await service.delete(record.id)  # nobody has heard of it
            raise
    return conversation_object(record.id, record.created_at, record.metadata)


@router.get(CONVERSATION)
async def get_conversation(session_id: OwnSession, service: Service) -> Json:
    """Show a conversation."""
    record = await service.get(session_id)
    return conversation_object(record.id, record.created_at, record.metadata)


@router.delete(CONVERSATION)
async def delete_conversation(session_id: OwnSessionToDelete, service: Service, if_match: IfMatch) -> Json:
    """Forget a conversation."""
    await service.delete(session_id, if_match)
    return {"id": session_id, "object": "conversation.deleted", "deleted": True}


@router.post(CONVERSATION + "/items", dependencies=[Room])
async def add_items(session_id: OwnSession, body: AddItems, service: Service, reply: Reply) -> Json:
    """Have a conversation learn what items say; the answer comes when that is durable."""
    await reply.whole(_learn(service, session_id, body.items, reply.if_match))
    return item_list(body.items)


@router.get(CONVERSATION + "/items", response_model=None)
async def list_items(session_id: OwnSession) -> NoReturn:
    """Refuse: what was said is learnt, and not kept word by word."""
    raise InvalidRequest("a conversation keeps what it learnt from its items, not their words", code="items_not_kept")


async def _learn(service: SessionService, session_id: str, items: list[InputItem], if_match: int | None = None) -> None:
    async def pieces() -> AsyncGenerator[str, None]:
        for i, item in enumerate(items):
            yield f"\n\n{item.content}" if i else item.content

    async with aclosing(service.ingest(session_id, pieces(), Terms(if_match=if_match))) as events:
        async for _ in events:
            pass
