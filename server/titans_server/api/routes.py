"""The endpoints. docs/api.md says the same to a user, and a test compares the two."""

from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from titans_server.api.deps import Context, From, OwnSession, Reply, Service, Upload
from titans_server.api.documents import reader_for
from titans_server.api.schemas import Completion, CreateCompletion, CreateSession, Session
from titans_server.errors import InvalidRequest
from titans_server.events import CompletionChunk, DocumentLearnt
from titans_server.prompts import CompletionRequest
from titans_server.service import SessionService

router = APIRouter()
SESSION = "/v1/sessions/{session_id}"


@router.post("/v1/sessions", status_code=201)
async def create_session(
    service: Service, caller: From, response: Response, body: CreateSession | None = None
) -> Session:
    """Create a session that has read nothing."""
    record = await service.create((body or CreateSession()).metadata, owner=caller.owner)
    response.headers["Location"] = f"/v1/sessions/{record.id}"
    response.headers["ETag"] = f'"{record.version}"'
    return Session.of(record)


@router.get(SESSION)
async def get_session(session_id: OwnSession, service: Service, response: Response) -> Session:
    """Show a session."""
    record = await service.get(session_id)
    response.headers["ETag"] = f'"{record.version}"'
    return Session.of(record)


@router.delete(SESSION, status_code=204)
async def delete_session(session_id: OwnSession, service: Service) -> None:
    """Forget a session and its state."""
    await service.delete(session_id)


@router.post(SESSION + "/documents", response_model=None)
async def post_document(
    session_id: OwnSession, request: Request, service: Service, context: Context, reply: Reply
) -> Any:
    """Learn a document, streamed in; the answer comes when it is durable."""
    reader = reader_for(request.headers.get("content-type"))
    upload = Upload(request, reader, context.settings.max_document_bytes)
    if "text/event-stream" in request.headers.get("accept", ""):
        return reply.stream(service.ingest(session_id, upload.pieces()), upload.read)
    return await reply.whole(_learn(service, session_id, upload), upload.read)


@router.post(SESSION + "/completions", response_model=None)
async def create_completion(
    session_id: OwnSession, body: CreateCompletion, service: Service, context: Context, reply: Reply
) -> Any:
    """Answer a prompt from what the session has read."""
    if body.max_tokens > (limit := context.settings.max_completion_tokens):
        raise InvalidRequest(f"max_tokens is at most {limit}", param="max_tokens")
    if body.stream:
        return reply.stream(service.complete(session_id, body.to_request()))
    return await reply.whole(_complete(service, session_id, body.to_request()))


async def _learn(service: SessionService, session_id: str, upload: Upload) -> DocumentLearnt:
    async with aclosing(service.ingest(session_id, upload.pieces())) as events:
        async for event in events:
            if isinstance(event, DocumentLearnt):
                return event
    raise AssertionError("an ingestion ends with what it learnt, or raises")


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
