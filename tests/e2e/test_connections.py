"""A connection between its requests."""

import http.client
import time
from contextlib import closing
from pathlib import Path

from support.models import TinyCheckpoint
from support.servers import ServerProcess


def test_an_idle_connection_is_kept_longer_than_a_client_keeps_it(checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    with (
        ServerProcess("memory://", tmp_path / "log", checkpoint.environment) as server,
        closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection,
    ):
        connection.request("POST", "/v1/sessions")
        assert connection.getresponse().read()
        socket = connection.sock
        time.sleep(6)  # httpx keeps one for 5 s, uvicorn if it is not told otherwise as well
        connection.request("POST", "/v1/sessions")
        assert connection.getresponse().read() and connection.sock is socket
