"""The request that the running code works for. Whatever logs, measures or charges need not be handed it."""

import re
import secrets
from contextvars import ContextVar
from dataclasses import dataclass

from titans_server.errors import TitansError

_SANE = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")  # nothing that could end a header or a line of a log


@dataclass(eq=False)
class RequestInfo:
    """One object for a request and all the tasks that it starts, filled in as things become known."""

    id: str
    session_id: str | None = None
    error: TitansError | None = None  # that it was answered with, or that its stream ended with

    @property
    def error_code(self) -> str | None:
        """Of that error."""
        return None if self.error is None else self.error.code


_current: ContextVar[RequestInfo | None] = ContextVar("titans_request", default=None)


def begin(request_id: str | None) -> RequestInfo:
    """Make this task's request; `request_id` is taken where it is sane."""
    sane = request_id is not None and _SANE.fullmatch(request_id)
    info = RequestInfo(request_id if request_id and sane else f"req_{secrets.token_hex(12)}")
    _current.set(info)
    return info


def current() -> RequestInfo | None:
    """The request of this task, None outside of one."""
    return _current.get()


def about_session(session_id: str) -> None:
    """The current request is about this session, which exists and is the caller's."""
    if (info := _current.get()) is not None:
        info.session_id = session_id


def failed(error: TitansError) -> None:
    """The current request is answered with an error, or its stream ends with one."""
    if (info := _current.get()) is not None:
        info.error = error
