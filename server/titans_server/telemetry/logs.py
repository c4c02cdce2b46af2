"""One line an event, as text or as JSON, each with the request and the session that it is about.

Nothing here or anywhere logs a document, a prompt or an answer; tests/telemetry/test_logs.py posts a marker and looks.
"""

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal

from titans_server.telemetry import request

Format = Literal["text", "json"]
_FIELDS = ("request_id", "session_id", "method", "path", "status", "seconds", "code")


def configure(level: str, form: Format) -> None:
    """Send everything from `level` up to stderr, in one form."""
    handler = logging.StreamHandler()
    handler.addFilter(_about_request)
    handler.setFormatter(JSONFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("sse_starlette").setLevel(logging.INFO)  # below, it logs what streams say


def _about_request(record: logging.LogRecord) -> bool:
    if (info := request.current()) is not None:
        record.request_id, record.session_id = info.id, info.session_id
    return True


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name in _FIELDS if (value := getattr(record, name, None)) is not None}


class TextFormatter(logging.Formatter):
    """For people: time, level, who, what, and then name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line."""
        return " ".join([super().formatMessage(record), *(f"{k}={v}" for k, v in _fields(record).items())])


class JSONFormatter(logging.Formatter):
    """For machines: one object a line (JSON Lines). Times are RFC 3339 in UTC, to the millisecond."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback is one string in it."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        } | _fields(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
