"""No room for another byte: refused with a clear error, nothing torn, and all is well when there is room again."""

import contextlib
import resource
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.extent import first
from support.launcher import Launcher
from support.life import ASK, FIRST, SECOND, LostError
from support.servers import ServerProcess
from support.table import Table
from support.world import World

FULL = {(503, "store_unavailable"), (507, "store_full")}


@contextmanager
def no_file_larger_than(num_bytes: int, pid: int) -> Iterator[None]:
    """As on a full disk, a process's writes break off: what fits is written, the rest is an error."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_more_files_than(number: int, pid: int) -> Iterator[None]:
    """So many may a process have open, sockets among them."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


class Sessions:
    """Some sessions of one server, and what each was acknowledged to have read."""

    def __init__(self, server: ServerProcess, num_sessions: int) -> None:
        self._server = server
        self._read: dict[str, list[str]] = {self._create(): [] for _ in range(num_sessions)}

    def write_all(self, text: str) -> list[httpx.Response]:
        """Give each a document. Returns the answers to those that could not take it."""
        refused = []
        for session, texts in self._read.items():
            response = self._write(session, text)
            if response.is_success:
                texts.append(text)
            else:
                refused.append(response)
        return refused

    def check(self) -> None:
        """Each is as a new one that reads what it was acknowledged to have read. Raises LostError."""
        expected: dict[tuple[str, ...], tuple[Any, ...]] = {}
        for session, texts in self._read.items():
            if (history := tuple(texts)) not in expected:
                alone = self._create()
                for text in texts:
                    self._write(alone, text).raise_for_status()
                expected[history] = self._look(alone)
            if (seen := self._look(session)) != expected[history]:
                raise LostError(f"after {len(texts)} documents {session} is {seen}, not {expected[history]}")

    def _create(self) -> str:
        return str(self._server.http.post("/v1/sessions").raise_for_status().json()["id"])

    def _write(self, session: str, text: str) -> httpx.Response:
        return self._server.http.post(f"/v1/sessions/{session}/documents", json={"text": text})

    def _look(self, session: str) -> tuple[Any, ...]:
        shown = self._server.http.get(f"/v1/sessions/{session}").raise_for_status().json()
        answer = self._server.http.post(f"/v1/sessions/{session}/completions", json=ASK).raise_for_status().json()
        return shown["version"], shown["tokens_seen"], answer["text"]


def check_refusals(refused: list[httpx.Response]) -> None:
    """All say what is the matter, and that it may pass."""
    assert refused
    for response in refused:
        assert (response.status_code, response.json()["error"]["code"]) in FULL, response.text
        assert response.json()["error"]["message"]


@pytest.mark.parametrize("num_bytes", first(1, [4_096, 0]))
def test_a_disk_that_takes_no_more(sqlite: World, table: Table, num_bytes: int) -> None:
    sessions = Sessions(sqlite.server, 2)
    assert sessions.write_all(FIRST) == []
    with table.attempt("sqlite", "disk full", f"files end at {num_bytes} bytes"):
        with no_file_larger_than(num_bytes, sqlite.server.pid):
            check_refusals(sessions.write_all(SECOND))
        sessions.check()
        assert sessions.write_all(SECOND) == []
        sessions.check()
        sqlite.restart_with()
        sessions.check()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs leave to mount a file system")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_disk_that_is_full_and_then_is_not(
    small_disk: Path, environment: dict[str, str], launcher: Launcher, table: Table
) -> None:
    folder = small_disk / "store"
    folder.mkdir()
    with World("sqlite", folder, environment, launcher) as world, table.attempt("sqlite", "disk full", "no space left"):
        sessions = Sessions(world.server, 2)
        assert sessions.write_all(FIRST) == []
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(512))
        check_refusals(sessions.write_all(SECOND))
        filler.unlink()
        sessions.check()
        assert sessions.write_all(SECOND) == []
        world.restart_with()
        sessions.check()


def test_a_redis_that_takes_no_more(redis: World, table: Table) -> None:
    sessions = Sessions(redis.server, 2)
    assert sessions.write_all(FIRST) == []
    with table.attempt("redis", "Redis full", "maxmemory reached"):
        redis.redis_server.command("CONFIG", "SET", "maxmemory", 1)
        try:
            check_refusals(sessions.write_all(SECOND))
        finally:
            redis.redis_server.command("CONFIG", "SET", "maxmemory", 0)
        sessions.check()
        assert sessions.write_all(SECOND) == []
        redis.restart_with()
        sessions.check()


def test_a_server_without_descriptors_says_so_once_a_second_and_takes_connections_again(sqlite: World) -> None:
    sqlite.recover()
    server, began = sqlite.server, time.monotonic()
    num_files = len(list(Path(f"/proc/{server.pid}/fd").iterdir()))
    num_lines = len(server.log.splitlines())
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_more_files_than(num_files + 4, server.pid))
        for _ in range(12):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        time.sleep(2.5)
    httpx.get(f"{server.url}/health/ready", timeout=60).raise_for_status()
    told = [line for line in server.log.splitlines()[num_lines:] if "Too many open files" in line]
    assert 1 <= len(told) <= time.monotonic() - began + 1
