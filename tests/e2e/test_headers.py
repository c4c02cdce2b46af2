"""Headers that come in several packets, as they do from another machine."""

import socket
import time
from pathlib import Path

from support.models import TinyCheckpoint
from support.servers import ServerProcess


def status(server: ServerProcess, num_bytes: int) -> int:
    """Of the answer to a request with so many bytes in a header."""
    head = b"GET /v1/models HTTP/1.1\r\nHost: test\r\nConnection: close\r\nX-Much: " + num_bytes * b"x" + b"\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        for i in range(0, len(head), 8_000):
            connection.sendall(head[i : i + 8_000])
            time.sleep(0.02)
        return int(connection.recv(1_000).split()[1])


def test_an_operator_may_allow_larger_headers(checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    environment = checkpoint.environment | {"TITANS_MAX_HEADER_BYTES": "40000"}
    with ServerProcess("memory://", tmp_path / "log", environment) as server:
        assert [status(server, num_bytes) for num_bytes in (1_000, 39_000, 41_000)] == [200, 200, 431]
