"""What a request asks for in its headers: the version it stands on (RFC 9110), to be done once, later, as a stream."""

import re
from typing import Annotated

from fastapi import Depends, Request, Response
from starlette.datastructures import Headers

from titans_server.api.schemas import Session
from titans_server.errors import InvalidRequest, VersionConflict
from titans_server.ingesting import Terms
from titans_server.sessions.record import SessionRecord

_ETAG = re.compile(r'(?:W/)?"(\d{1,18})"')  # a proxy that compresses makes it weak; it names a version all the same
_NOT_WANTED = re.compile(r"q\s*=\s*0(\.0*)?")
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def field(headers: Headers, name: str, absent: str = "") -> str:
    """What a header says, on however many lines: these are one list (RFC 9110, section 5.3)."""
    return ", ".join(headers.getlist(name) or [absent])


def _if_match(request: Request) -> int | None:
    """The version in If-Match; None where there is none, or any will do. One that names no version never matches."""
    text = field(request.headers, "if-match", "*").strip()
    match = _ETAG.fullmatch(text)
    if match is None and text != "*":
        raise VersionConflict(f"If-Match is {text}, which is no session's ETag")
    return int(match[1]) if match else None


IfMatch = Annotated[int | None, Depends(_if_match)]


def _terms(request: Request, if_match: IfMatch) -> Terms:
    key = field(request.headers, "idempotency-key").strip('"')
    if "idempotency-key" in request.headers and not _KEY.fullmatch(key):  # two lines have a space between them
        message = "one Idempotency-Key, not several, of 1 to 255 printable ASCII characters, no space"
        raise InvalidRequest(message, param="Idempotency-Key")
    return Terms(key, if_match)


AskedTerms = Annotated[Terms, Depends(_terms)]


def prefers(request: Request, preference: str) -> bool:
    """Whether the client would rather have it so (RFC 7240: what a server does not know it ignores)."""
    preferences = field(request.headers, "prefer").split(",")
    return any(x.partition(";")[0].strip().lower() == preference for x in preferences)


def accepts(request: Request, media_type: str) -> bool:
    """Whether the client names this type among those that it takes (RFC 9110, section 12.5.1)."""
    for each in field(request.headers, "accept").split(","):
        name, *parameters = (part.strip().lower() for part in each.split(";"))
        if name == media_type:
            return not any(_NOT_WANTED.fullmatch(parameter) for parameter in parameters)
    return False


def show(record: SessionRecord, response: Response, *, is_new: bool = False) -> Session:
    """A session, with its version as the ETag and, where it is new, its address."""
    response.headers["ETag"] = f'"{record.version}"'
    if is_new:
        response.headers["Location"] = f"/v1/sessions/{record.id}"
    return Session.of(record)
