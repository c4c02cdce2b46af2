"""The endpoints of documents: learnt as they come, or accepted and learnt afterwards."""

from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from titans_server.api.deps import Context, From, OwnSession, Reply, Room, Service, Upload, own_session
from titans_server.api.documents import reader_for
from titans_server.api.preconditions import AskedTerms, accepts, prefers
from titans_server.api.routes import SESSION
from titans_server.errors import IngestionNotFound, SessionNotFound
from titans_server.events import DocumentLearnt, IngestionStatus
from titans_server.ingesting import Terms, session_of
from titans_server.service import SessionService

router = APIRouter()
INGESTION = "/v1/ingestions/{ingestion_id}"


_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"model": DocumentLearnt},
    202: {"model": IngestionStatus, "description": "Accepted: it is learnt afterwards"},
}


@router.post(SESSION + "/documents", response_model=None, responses=_ANSWERS, dependencies=[Room])
async def post_document(
    session_id: OwnSession, *, request: Request, service: Service, context: Context, terms: AskedTerms, reply: Reply
) -> Any:
    """Learn a document, streamed in; the answer comes when it is durable."""
    reader = reader_for(request.headers.get("content-type"))
    upload = Upload(request, reader, context.settings.max_document_bytes)
    if prefers(request, "respond-async"):
        return await reply.whole(_accept(service, session_id, upload, terms), upload.read)
    if accepts(request, "text/event-stream"):
        return reply.stream(service.ingest(session_id, upload.pieces(), terms), upload.read)
    return await reply.whole(_learn(service, session_id, upload, terms), upload.read)


async def own_ingestion(ingestion_id: str, caller: From, service: Service) -> IngestionStatus:
    """A document into a session of the caller's. Raises IngestionNotFound for another's, as for none."""
    try:
        await own_session(session_of(ingestion_id), caller, service)
    except SessionNotFound:
        raise IngestionNotFound(f"no ingestion {ingestion_id}") from None
    return await service.ingestion(ingestion_id)


OwnIngestion = Annotated[IngestionStatus, Depends(own_ingestion)]


@router.get(INGESTION)
async def get_ingestion(status: OwnIngestion) -> IngestionStatus:
    """Show how far a document has come."""
    return status


@router.delete(INGESTION)
async def cancel_ingestion(status: OwnIngestion, service: Service) -> IngestionStatus:
    """Stop a document before it is learnt."""
    return await service.cancel_ingestion(status.id)


async def _learn(service: SessionService, session_id: str, upload: Upload, terms: Terms) -> DocumentLearnt:
    async with aclosing(service.ingest(session_id, upload.pieces(), terms)) as events:
        async for event in events:
            if isinstance(event, DocumentLearnt):
                return event
    raise AssertionError("an ingestion ends with what it learnt, or raises")


async def _accept(service: SessionService, session_id: str, upload: Upload, terms: Terms) -> JSONResponse:
    status = await service.accept(session_id, upload.pieces(), terms)
    headers = {"Location": f"/v1/ingestions/{status.id}", "Preference-Applied": "respond-async"}
    return JSONResponse(asdict(status), 202, headers)
