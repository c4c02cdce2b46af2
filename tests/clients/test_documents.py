"""Every form of a document, and that none is read whole before it is sent."""

import asyncio
import io
import os
import select
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from titans_client import AsyncClient, Client

TEXT = bytes(range(32, 127)) * 4096  # about 380 KiB: several pieces


class Upload(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Takes a request's body piece by piece, and notes for each how far its source had been read by then."""

    def __init__(self, source: Any = None) -> None:
        self._source = source
        self.body = b""
        self.headers = httpx.Headers()
        self.read_ahead: list[int] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.SyncByteStream)
        for piece in request.stream:
            self._take(piece)
        return self._answer(request)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        async for piece in request.stream:
            self._take(piece)
        return self._answer(request)

    def _take(self, piece: bytes) -> None:
        self.body += piece
        if self._source is not None:
            self.read_ahead.append(self._source.num_read - len(self.body))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.headers = request.headers
        document = {"object": "document", "session": "s", "version": 1, "tokens": 1, "tokens_seen": 1, "seconds": 1}
        return httpx.Response(200, json={**document, "bytes": len(self.body)})


class CountedFile(io.BytesIO):
    num_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        piece = super().read(size)
        self.num_read += len(piece)
        return piece


class CountedIterator:
    num_read = 0

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(TEXT), 10_000):
            piece = TEXT[start : start + 10_000]
            self.num_read += len(piece)
            yield piece


class CountedAsyncIterator(CountedIterator):
    __iter__ = None  # type: ignore[assignment]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in CountedIterator.__iter__(self):
            yield piece


async def test_a_file_is_sent_as_it_is_read_and_stays_open(driver: Any) -> None:
    file = CountedFile(TEXT)
    upload = Upload(file)
    await driver.use(upload, lambda c: c.ingest("s", file))
    assert upload.body == TEXT
    assert set(upload.read_ahead) == {0}
    assert len(upload.read_ahead) > 3
    assert upload.headers["Transfer-Encoding"] == "chunked"
    assert not file.closed


@pytest.mark.parametrize("buffering", [-1, 0])
async def test_a_file_that_never_waits_is_sent_to_its_end(driver: Any, buffering: int) -> None:
    """As a terminal's or a socket's, whose owner has asked for that: that it has nothing yet is not its end."""
    read, written = os.pipe()
    os.set_blocking(read, False)

    def write() -> None:
        with os.fdopen(written, "wb", buffering=0) as file:
            for piece in (b"the first half ", b"and the second"):
                time.sleep(0.2)
                file.write(piece)

    writing = threading.Thread(target=write)
    writing.start()
    with os.fdopen(read, "rb", buffering=buffering) as file:
        upload = Upload()
        await driver.use(upload, lambda c: c.ingest("s", file))
    writing.join()
    assert upload.body == b"the first half and the second"


async def test_a_file_is_sent_from_where_it_stands(driver: Any) -> None:
    file = io.BytesIO(b"0123456789")
    file.seek(7)
    upload = Upload()
    await driver.use(upload, lambda c: c.ingest("s", file))
    assert upload.body == b"789"


async def test_an_iterator_is_sent_as_it_is_pulled(driver: Any) -> None:
    source = CountedIterator()
    upload = Upload(source)
    await driver.use(upload, lambda c: c.ingest("s", source))
    assert upload.body == TEXT
    assert set(upload.read_ahead) == {0}


async def test_an_asynchronous_iterator_is_for_the_asynchronous_client(driver: Any) -> None:
    source = CountedAsyncIterator()
    upload = Upload(source)
    if driver.kind == "sync":
        with pytest.raises(TypeError, match="CountedAsyncIterator"):
            await driver.use(upload, lambda c: c.ingest("s", source))
        return
    await driver.use(upload, lambda c: c.ingest("s", source))
    assert upload.body == TEXT
    assert set(upload.read_ahead) == {0}


async def test_a_path_is_sent_with_its_size(driver: Any, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(TEXT)
    upload = Upload()
    document = await driver.use(upload, lambda c: c.ingest("s", path))
    assert upload.body == TEXT
    assert document.bytes == len(TEXT)
    assert upload.headers["Content-Length"] == str(len(TEXT))
    assert "Transfer-Encoding" not in upload.headers


async def test_a_file_that_grows_is_sent_as_long_as_it_was(driver: Any, tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(TEXT)

    class Growing(Upload):
        def _take(self, piece: bytes) -> None:
            super()._take(piece)
            with path.open("ab") as file:
                file.write(b"more" * 10_000)

    upload = Growing()
    await driver.use(upload, lambda c: c.ingest("s", path))
    assert upload.body == TEXT


async def test_a_path_that_is_not_there_is_an_os_error(driver: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await driver.use(Upload(), lambda c: c.ingest("s", tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError):
        await driver.collect(Upload(), lambda c: c.ingest_stream("s", tmp_path / "nothing"))


@pytest.mark.parametrize("document", [io.StringIO("text"), ["text"], [b"text", "text"], bytearray(b"x"), 5])
async def test_what_does_not_hold_bytes_is_a_type_error(driver: Any, document: Any) -> None:
    with pytest.raises(TypeError, match=r"bytes|binary|a int"):
        await driver.use(Upload(), lambda c: c.ingest("s", document))


async def test_a_source_that_fails_raises_its_own_error(driver: Any) -> None:
    def failing() -> Iterator[bytes]:
        yield b"a"
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        await driver.use(Upload(), lambda c: c.ingest("s", failing()))


async def test_the_asynchronous_client_reads_files_in_a_thread(tmp_path: Path, driver: Any) -> None:
    threads: set[int] = set()

    class Where(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            threads.add(threading.get_ident())
            return super().read(size)

    await driver.use(Upload(), lambda c: c.ingest("s", Where(b"x")))
    assert (threading.get_ident() in threads) == (driver.kind == "sync")


class KeptPath(type(Path())):  # type: ignore[misc]
    """Remembers its files."""

    files: list[io.BufferedReader]

    def open(self, *args: Any) -> Any:
        file = super().open(*args)
        self.files.append(file)
        return file


async def test_the_asynchronous_client_leaves_a_pipe_into_which_nobody_writes(tmp_path: Path) -> None:
    path = KeptPath(tmp_path / "pipe")
    path.files = []
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR)
    rescue = threading.Timer(5, os.close, [pipe])
    rescue.start()
    os.write(pipe, b"beginning")
    async with AsyncClient(transport=Upload()) as client:
        sending = asyncio.create_task(client.ingest("s", path))
        while select.select([pipe], [], [], 0)[0]:  # noqa: ASYNC110 — until it is read, and more is waited for
            await asyncio.sleep(0.01)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
    assert rescue.is_alive()
    rescue.cancel()
    os.close(pipe)
    while not path.files[0].closed:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def test_the_server_has_the_beginning_before_the_end_is_made(contract: Any) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"beginning "
        assert contract.body_began.wait(10)
        yield b"end"

    with Client(contract.url) as client:
        session = client.sessions.create()
        document = client.ingest(session.id, pieces())
    assert contract.seen[-1].body == b"beginning end"
    assert document.bytes == len(b"beginning end")
