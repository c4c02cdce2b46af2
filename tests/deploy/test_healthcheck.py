"""The script that a container engine runs to learn whether the server is ready."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest


@contextmanager
def server(status: int) -> Iterator[int]:
    """Answers /health/ready with `status` and everything else with 404; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/ready" else 404)
            self.end_headers()
            self.wfile.write(b"the body")

        def log_message(self, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as it:
        thread = Thread(target=it.serve_forever)
        thread.start()
        try:
            yield it.server_port
        finally:
            it.shutdown()
            thread.join()


def check(root: Path, port: int, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(root / "deploy" / "healthcheck.py")]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TITANS_")}
    environment = clean | {"TITANS_PORT": str(port)} | environment
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_ready_server_is_healthy(root: Path, host: str) -> None:
    with server(200) as port:
        done = check(root, port, TITANS_HOST=host)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_draining_server_is_not_healthy_and_the_reason_is_told(root: Path) -> None:
    with server(503) as port:
        done = check(root, port)
    assert done.returncode == 1
    assert "503" in done.stderr and "the body" in done.stderr


def test_no_server_is_not_healthy(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    done = check(root, port)
    assert done.returncode == 1
    assert "no answer" in done.stderr and "Traceback" not in done.stderr


def test_a_server_that_hangs_is_not_healthy(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = check(root, silent.getsockname()[1])
    assert done.returncode == 1
    assert "no answer" in done.stderr


def test_a_proxy_in_the_environment_is_not_asked(root: Path) -> None:
    with server(200) as port, server(500) as proxy:
        done = check(root, port, http_proxy=f"http://127.0.0.1:{proxy}", HTTP_PROXY=f"http://127.0.0.1:{proxy}")
    assert done.returncode == 0
