"""Documents off the wire: bytes that arrive anyhow, into pieces of text, in bounded memory. No I/O here."""

import codecs
import json
import re
from collections.abc import Callable
from typing import Any, Protocol, cast

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from titans_server.errors import InvalidRequest, UnsupportedMediaType

_BETWEEN = "\n\n"  # two texts of one document
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
        """The text that is certain by now. Raises InvalidRequest, UnsupportedMediaType."""

    def finish(self) -> str:
        """The rest. Raises InvalidRequest where something is missing."""


def reader_for(content_type: str | None) -> DocumentReader:
    """The reader for a Content-Type. Raises UnsupportedMediaType."""
    kind, _, parameters = (content_type or "").partition(";")
    charset = next((p.split("=")[1] for p in parameters.split(";") if p.strip().lower().startswith("charset=")), "")
    if charset.strip(' "').lower() not in {"", "utf-8", "utf8", "us-ascii"}:
        raise UnsupportedMediaType(f"charset {charset.strip()} is not read; send UTF-8")
    make = _READERS.get(kind.strip().lower())
    if make is not None:
        return make()
    if kind.strip().lower() == "multipart/form-data":
        _, options = parse_options_header(content_type)
        if 0 < len(boundary := options.get(b"boundary", b"")) <= 70:
            return FormReader(boundary.decode("latin-1"))
        raise InvalidRequest("a form needs a boundary of 1 to 70 characters", code="invalid_form")
    raise UnsupportedMediaType(
        f"a document is {', '.join(_READERS)} or multipart/form-data, not {kind.strip() or 'without a Content-Type'}"
    )


class TextReader:
    """UTF-8, split anywhere; a byte order mark at the start is dropped."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # "utf-8-sig" takes half a mark for no text at all
        self._num_bytes = 0
        self._has_begun = False

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
        if text and not self._has_begun:
            self._has_begun = True
            return text.removeprefix("\ufeff")
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
        if self._read == self._read_start and self._rest.strip():
            raise self._invalid("it does not begin so")
        if self._read == self._read_text and self._rest:
            raise self._unreadable()
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
            raise self._unreadable()
        return "".join(pieces)

    def _read_end(self) -> str:
        self._rest = self._rest.strip(" \t\r\n")
        if self._rest not in {"", "}"}:
            raise self._invalid("more follows the text")
        return ""

    def _unreadable(self) -> InvalidRequest:
        return self._invalid(f"its text has {self._rest[:_JSON_ESCAPE_LIMIT]!r}")

    @staticmethod
    def _invalid(why: str) -> InvalidRequest:
        return InvalidRequest(f'the body must be {{"text": "…"}}: {why}', code="invalid_json")


class LinesReader:
    """`{"text": "…"}` a line (NDJSON), read as it arrives; the texts follow one another, an empty line between them."""

    def __init__(self) -> None:
        self._texts = _Joined()
        self._line: JSONReader | None = None

    def feed(self, data: bytes) -> str:
        """See DocumentReader."""
        *lines, rest = data.split(b"\n")
        text = "".join(self._read(line) + self._end_line() for line in lines)
        return text + self._read(rest)

    def finish(self) -> str:
        """See DocumentReader."""
        return self._end_line()

    def _read(self, data: bytes) -> str:
        if self._line is None:
            if not data.strip():
                return ""
            self._line = JSONReader()
            self._texts.begin()
        return self._texts.add(self._line.feed(data))

    def _end_line(self) -> str:
        line, self._line = self._line, None
        return "" if line is None else self._texts.add(line.finish())


class FormReader:
    """The files of a form (RFC 7578), read as they arrive; their texts follow one another as those of lines do."""

    def __init__(self, boundary: str) -> None:
        self._texts = _Joined()
        self._out: list[str] = []
        self._headers: dict[str, str] = {}
        self._name, self._value = b"", b""
        self._file: DocumentReader | None = None
        self._ended = False
        callbacks: dict[str, Callable[..., None]] = {
            "on_part_begin": self._headers.clear,
            "on_header_field": self._read_name,
            "on_header_value": self._read_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_file,
            "on_part_data": self._read_file,
            "on_part_end": self._end_file,
            "on_end": self._end,
        }
        self._parser = MultipartParser(boundary, cast(Any, callbacks))

    def feed(self, data: bytes) -> str:
        """See DocumentReader."""
        try:
            self._parser.write(data)
        except MultipartParseError as error:
            raise InvalidRequest(f"the body is not a form: {error}", code="invalid_form") from error
        text, self._out = "".join(self._out), []
        return text

    def finish(self) -> str:
        """See DocumentReader."""
        if not self._ended:
            raise InvalidRequest("the form ends early", code="invalid_form")
        return ""

    def _read_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _read_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._name.decode("latin-1").lower()] = self._value.decode("latin-1")
        self._name, self._value = b"", b""

    def _begin_file(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", ""))
        if b"filename" not in options:
            name = options.get(b"name", b"").decode("utf-8", "replace")
            raise InvalidRequest(f"the form has a field {name!r} that is no file", code="invalid_form")
        kind = self._headers.get("content-type", "")
        is_read = kind.partition(";")[0].strip().lower() in _READERS
        self._file = reader_for(kind) if is_read else TextReader()
        self._texts.begin()

    def _read_file(self, data: bytes, start: int, end: int) -> None:
        assert self._file is not None
        self._out.append(self._texts.add(self._file.feed(data[start:end])))

    def _end_file(self) -> None:
        assert self._file is not None
        self._out.append(self._texts.add(self._file.finish()))
        self._file = None

    def _end(self) -> None:
        self._ended = True


class _Joined:
    """Puts an empty line between texts, of which some may be empty."""

    def __init__(self) -> None:
        self._has_text = False
        self._is_due = False

    def begin(self) -> None:
        """Another text follows."""
        self._is_due = self._has_text

    def add(self, text: str) -> str:
        """A piece of the text, and what goes before it."""
        if not text:
            return ""
        before = _BETWEEN if self._is_due else ""
        self._has_text, self._is_due = True, False
        return before + text


_READERS: dict[str, Callable[[], DocumentReader]] = {
    "text/plain": TextReader,
    "application/json": JSONReader,
    "application/x-ndjson": LinesReader,
}
