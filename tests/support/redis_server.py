"""A real Redis for tests."""

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import redis


class RedisServer:
    """A real redis-server in a folder of its own. What it acknowledges is in the append-only file."""

    def __init__(self, folder: Path) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.fail("these tests need the `redis-server` binary: apt-get install redis-server")
        self._binary, self._folder = binary, folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        settings = {
            "bind": "127.0.0.1",
            "port": self.port,
            "dir": self._folder,
            "appendonly": "yes",
            "appendfsync": "always",
            "maxmemory-policy": "noeviction",
        }
        options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen([self._binary, *options, "--save", ""], stdout=log, stderr=log)
        self._wait()

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(timeout=30)
            self._process = None

    @property
    def pid(self) -> int:
        """Of the process that runs."""
        assert self._process is not None
        return self._process.pid

    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def command(self, *words: str | int | bytes) -> Any:
        with redis.Redis(port=self.port) as client:
            return client.execute_command(*words)

    def _wait(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                break
            with contextlib.suppress(redis.ConnectionError):
                self.command("PING")
                return
            time.sleep(0.05)
        pytest.fail("redis-server does not start:\n" + (self._folder / "redis.log").read_text())
