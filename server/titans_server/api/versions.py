"""The endpoints of a session's past and copies: versions, restore, fork, and its state as a file."""

from fastapi import APIRouter, Request, Response

from titans_server.api.deps import OwnSession, Reply, Room, RoomForAnother, Service
from titans_server.api.large import LargeResponse
from titans_server.api.preconditions import show
from titans_server.api.routes import SESSION
from titans_server.api.schemas import ForkSession, KeptVersion, RestoreSession, Session, VersionList
from titans_server.errors import DocumentTooLarge

router = APIRouter()


@router.get(SESSION + "/versions")
async def list_versions(session_id: OwnSession, service: Service) -> VersionList:
    """Show the versions that are kept, newest first."""
    record = await service.get(session_id)
    return VersionList(data=[KeptVersion.of(version) for version in reversed(record.versions)])


@router.post(SESSION + "/restore")
async def restore_version(
    session_id: OwnSession, body: RestoreSession, service: Service, response: Response, reply: Reply
) -> Session:
    """Make what an older version was the newest."""
    restored = await reply.whole(service.restore(session_id, body.version, reply.if_match))
    return show(restored, response)


@router.post(SESSION + "/fork", status_code=201, dependencies=[RoomForAnother])
async def fork_session(
    session_id: OwnSession, service: Service, response: Response, body: ForkSession | None = None
) -> Session:
    """Create a session that goes on from a version of another one."""
    body = body or ForkSession()
    record = await service.fork(session_id, body.version, body.metadata, body.ttl_seconds)
    return show(record, response, is_new=True)


@router.get(SESSION + "/state", response_class=Response)
async def export_state(session_id: OwnSession, service: Service, version: int | None = None) -> Response:
    """Show a version's state as a safetensors file."""
    record, exported, blob = await service.export_state(session_id, version)
    headers = {
        "ETag": f'"{exported.number}"',
        "Content-Disposition": f'attachment; filename="{record.id}-{exported.number}.safetensors"',
    }
    return LargeResponse(blob, headers=headers, media_type="application/octet-stream")


@router.put(SESSION + "/state", dependencies=[Room])
async def import_state(
    session_id: OwnSession, request: Request, service: Service, response: Response, reply: Reply
) -> Session:
    """Make a state that was exported the session's newest version."""
    blob, limit = bytearray(), service.max_state_bytes()
    async for data in request.stream():
        blob += data
        if len(blob) > limit:
            raise DocumentTooLarge(f"a state of this model has fewer than {limit} bytes")
    imported = await reply.whole(service.import_state(session_id, bytes(blob), reply.if_match))
    return show(imported, response)
