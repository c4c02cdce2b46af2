"""A stream by its id: going on with it, and stopping it."""

from typing import Annotated

from fastapi import APIRouter, Header, Response

from titans_server.api.deps import Context, From
from titans_server.api.sse import EventStream

router = APIRouter()
LastEventID = Annotated[int, Header(alias="Last-Event-ID", ge=0, lt=1 << 53)]


@router.get("/v1/streams/{stream_id}", response_model=None)
async def resume_stream(stream_id: str, caller: From, context: Context, last_event_id: LastEventID = 0) -> Response:
    """Go on with a stream after an event; 204 where it has ended there."""
    reader = context.streams.resume(stream_id, caller.owner, last_event_id)
    return Response(status_code=204) if reader is None else EventStream(reader, context.streams.limits)


@router.delete("/v1/streams/{stream_id}", status_code=204)
async def stop_stream(stream_id: str, caller: From, context: Context) -> None:
    """Stop a stream and the work behind it; forget one that has ended."""
    await context.streams.stop(stream_id, caller.owner)
