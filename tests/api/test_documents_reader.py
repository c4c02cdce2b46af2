"""Bytes to text, cut anywhere."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from titans_server.api.documents import JSONReader, TextReader, reader_for
from titans_server.errors import InvalidRequest, UnsupportedMediaType

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def read(reader: TextReader | JSONReader, body: bytes, cuts: list[int]) -> str:
    edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    return "".join(reader.feed(body[a:b]) for a, b in pairwise(edges)) + reader.finish()


@given(text=TEXT, cuts=st.lists(st.integers(0, 500), max_size=6))
def test_text_may_be_cut_anywhere(text: str, cuts: list[int]) -> None:
    assert read(TextReader(), b"\xef\xbb\xbf" + text.encode(), cuts) == text


@given(text=TEXT, cuts=st.lists(st.integers(0, 500), max_size=6), ascii_only=st.booleans(), indent=st.booleans())
def test_json_may_be_cut_anywhere(text: str, cuts: list[int], ascii_only: bool, indent: bool) -> None:
    body = json.dumps({"text": text}, ensure_ascii=ascii_only, indent=2 if indent else None)
    assert read(JSONReader(), body.encode(), cuts) == text


@given(body=st.binary(max_size=60) | TEXT.map(lambda t: ('{"text": "' + t).encode()), cut=st.integers(0, 60))
def test_json_of_any_bytes_is_read_as_json_does_or_refused(body: bytes, cut: int) -> None:
    try:
        got = read(JSONReader(), body, [cut])
    except InvalidRequest:
        return
    assert json.loads(body) == {"text": got}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{}", "invalid_json"),
        (b'{"text": 5}', "invalid_json"),
        (b'{"text": "a"', "invalid_json"),
        (b'{"text": "a', "invalid_json"),
        (b'{"text": "a"}}', "invalid_json"),
        (b'{"text": "a"} {"text": "b"}', "invalid_json"),
        (b'{"text": "a", "more": 1}', "invalid_json"),
        (b'{"text": "a\nb"}', "invalid_json"),
        (rb'{"text": "\x"}', "invalid_json"),
        (rb'{"text": "\ud83d"}', "invalid_json"),
        (rb'{"text": "\ude00"}', "invalid_json"),
        (b'{"text": "\xff"}', "invalid_utf8"),
        (b" " * 2_000, "invalid_json"),
    ],
)
def test_bad_json_is_refused(body: bytes, code: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        read(JSONReader(), body, [])
    assert error.value.code == code


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"{}", "it does not begin so"),
        (b'{"text": 5}', "it does not begin so"),
        (b'{"content": "a"}', "it does not begin so"),
        (b'["a"]', "it does not begin so"),
        (rb'{"text": "\ud83d"}', r"its text has '\\ud83d"),
        (rb'{"text": "\x41 and more"}', r"its text has '\\x41"),
        (b'{"text": "a', "it ends early"),
        (b'{"text": "a"', "it ends early"),
    ],
)
def test_bad_json_is_refused_for_what_is_wrong_with_it(body: bytes, why: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        read(JSONReader(), body, [])
    assert why in error.value.message


def test_bad_text_is_refused_and_says_where() -> None:
    reader = TextReader()
    reader.feed(b"abcdef")
    with pytest.raises(InvalidRequest, match="near byte 8") as error:
        reader.feed(b"gh\xffi")
    assert error.value.code == "invalid_utf8"
    with pytest.raises(InvalidRequest):
        read(TextReader(), "é".encode()[:1], [])


@pytest.mark.parametrize("kind", ["text/plain", "TEXT/PLAIN; charset=UTF-8", 'text/plain;charset="utf-8"'])
def test_text_is_known(kind: str) -> None:
    assert isinstance(reader_for(kind), TextReader)


@pytest.mark.parametrize("kind", [None, "", "text/html", "application/pdf", "text/plain; charset=latin-1"])
def test_other_kinds_are_refused(kind: str | None) -> None:
    with pytest.raises(UnsupportedMediaType):
        reader_for(kind)


@pytest.mark.parametrize("piece", [b"x" * 4_096, b"x: y\r\n" * 100])
def test_a_forms_header_does_not_fill_the_memory(piece: bytes) -> None:
    reader = reader_for("multipart/form-data; boundary=xyz")
    reader.feed(b'--xyz\r\nContent-Disposition: form-data; name="a"; filename="b"\r\nNote: ')
    with pytest.raises(InvalidRequest) as caught:
        for _ in range(100):
            reader.feed(piece)
    assert caught.value.code == "invalid_form"
