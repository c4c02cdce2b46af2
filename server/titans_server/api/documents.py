"""Documents off the wire: bytes that arrive anyhow, into pieces of text, in bounded memory. No I/O here."""

import codecs
import json
import re
from collections.abc import Callable
from typing import Protocol

from titans_server.errors import InvalidRequest, UnsupportedMediaType

_JSON_START = re.compile(r'\s*\{\s*"text"\s*:\s*"')
_JSON_START_LIMIT = 1_024
_JSON_ESCAPE_LIMIT = len(r"\ud83d\ude00")
_JSON_PART = re.compile(
    r'(?P<plain>[^"\\\x00-\x1f]+)'
    r'|(?P<escape>\\["\\/bfnrt]'
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r"|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4})"
    r'|(?P<end>")'
)


class DocumentReader(Protocol):
    """Turns a body's bytes into its text."""

    def feed(self, data: bytes) -> str:
        """The text that is certain by now. Raises InvalidRequest."""

    def finish(self) -> str:
        """The rest. Raises InvalidRequest where something is missing."""


def reader_for(content_type: str | None) -> DocumentReader:
    """The reader for a Content-Type. Raises UnsupportedMediaType."""
    kind, _, parameters = (content_type or "").partition(";")
    charset = next((p.split("=")[1] for p in parameters.split(";") if p.strip().lower().startswith("charset=")), "")
    if charset.strip(' "').lower() not in {"", "utf-8", "utf8", "us-ascii"}:
        raise UnsupportedMediaType(f"charset {charset.strip()} is not read; send UTF-8")
    match kind.strip().lower():
        case "text/plain":
            return TextReader()
        case "application/json":
            return JSONReader()
    raise UnsupportedMediaType(
        f"a document is text/plain or application/json, not {kind.strip() or 'without a Content-Type'}"
    )


class TextReader:
    """UTF-8, split anywhere; a byte order mark at the start is dropped."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._num_bytes = 0

    def feed(self, data: bytes) -> str:
        """See DocumentReader."""
        return self._decode(data, final=False)

    def finish(self) -> str:
        """See DocumentReader."""
        return self._decode(b"", final=True)

    def _decode(self, data: bytes, *, final: bool) -> str:
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            message = f"the document is not UTF-8: {error.reason} near byte {self._num_bytes + error.start}"
            raise InvalidRequest(message, code="invalid_utf8") from error
        self._num_bytes += len(data)
        return text


class JSONReader:
    """`{"text": "…"}` (RFC 8259), read as it arrives; the text may be of any length."""

    def __init__(self) -> None:
        self._utf8 = TextReader()
        self._rest = ""
        self._read: Callable[[], str] = self._read_start

    def feed(self, data: bytes) -> str:
        """See DocumentReader."""
        self._rest += self._utf8.feed(data)
        return self._read()

    def finish(self) -> str:
        """See DocumentReader."""
        text = self.feed(b"") + self._utf8.finish()
        if self._read != self._read_end or not self._rest:
            raise self._invalid("it ends early")
        return text

    def _read_start(self) -> str:
        match = _JSON_START.match(self._rest)
        if match is None:
            if len(self._rest) > _JSON_START_LIMIT:
                raise self._invalid("it does not begin so")
            return ""
        self._rest = self._rest[match.end() :]
        self._read = self._read_text
        return self._read()

    def _read_text(self) -> str:
        pieces: list[str] = []
        at = 0
        while match := _JSON_PART.match(self._rest, at):
            at = match.end()
            if match["end"]:
                self._rest = self._rest[at:]
                self._read = self._read_end
                return "".join(pieces) + self._read()
            pieces.append(match["plain"] or json.loads(f'"{match["escape"]}"'))
        self._rest = self._rest[at:]
        if self._rest and not (self._rest[0] == "\\" and len(self._rest) < _JSON_ESCAPE_LIMIT):
            raise self._invalid(f"its text has {self._rest[:_JSON_ESCAPE_LIMIT]!r}")
        return "".join(pieces)

    def _read_end(self) -> str:
        self._rest = self._rest.strip(" \t\r\n")
        if self._rest not in {"", "}"}:
            raise self._invalid("more follows the text")
        return ""

    @staticmethod
    def _invalid(why: str) -> InvalidRequest:
        return InvalidRequest(f'the body must be {{"text": "…"}}: {why}', code="invalid_json")
