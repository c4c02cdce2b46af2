"""Real servers for tests, on real sockets: in a process of their own, or in a thread of this one."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import uvicorn
from blockbuster import blockbuster_ctx
from support.launcher import ForkedServer, Launcher
from support.models import TinyCheckpoint
from titans_client import Client, TitansError
from titans_server.api.deps import AppContext
from titans_server.app import create_app
from titans_server.lifecycle import Lifecycle
from titans_server.serving import PunctualProtocol
from titans_server.settings import Settings
from titans_server.telemetry.traces import Tracing


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tiny_settings(checkpoint: TinyCheckpoint, *, store: str, **more: Any) -> Settings:
    """Of a server of a tiny model, that takes the same steps each time."""
    return Settings(
        port=free_port(),
        store=store,
        body=checkpoint.body,
        memory=checkpoint.memory,
        dtype="float32",
        threads=1,
        **more,
    )


class ServerProcess:
    """`python -m titans_server`, ready when the context is entered, killed when it is left.

    With a launcher it is forked rather than started, which is ten times as fast.
    """

    def __init__(
        self, store: str, log: Path, environment: dict[str, str] | None = None, launcher: Launcher | None = None
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.store = store
        self._log = log
        self.environment = environment or {}
        self._launcher = launcher
        self.process: subprocess.Popen[bytes] | ForkedServer | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.http.close()

    def start(self) -> None:
        """Start, again if need be, and wait until it is ready."""
        variables = {k: v for k, v in os.environ.items() if not k.startswith("TITANS_")} | self.environment
        args = ["--port", str(self.port), "--store", self.store]
        if self._launcher is not None:
            self.process = self._launcher.start(args, variables, self._log)
        else:
            with self._log.open("ab") as log:
                command = [sys.executable, "-m", "titans_server", *args]
                self.process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
        try:
            with Client(self.url) as client:
                client.wait_until_ready(is_alive=self.is_running)
        except TitansError as error:
            self.kill()
            raise AssertionError(f"the server is not ready:\n{self.log}") from error

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        assert self.process is not None
        return self.process.pid

    def is_running(self) -> bool:
        """Whether the process is there."""
        return self.process is not None and self.process.poll() is None

    def ask_to_stop(self) -> None:
        """SIGTERM; return when it takes no new work. It may have some under way still."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/health/ready", timeout=30).status_code == 503:
                    return
            except httpx.TransportError:
                return
            time.sleep(0.02)
        raise AssertionError(f"the server still takes work:\n{self.log}")

    def wait(self) -> int:
        """The exit status, once it has ended by itself."""
        assert self.process is not None
        return self.process.wait(timeout=120)

    def terminate(self) -> int:
        """SIGTERM, and the exit status once it has drained."""
        self.ask_to_stop()
        return self.wait()

    def kill(self) -> None:
        """SIGKILL: no farewell of any kind."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=60)

    @property
    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text(encoding="utf-8")


class Upload:
    """A document that is sent piece by piece while its events are read. Leaving the context breaks it off."""

    def __init__(
        self, server: "ServerProcess | LiveServer", session: str, *, key: str | None = None, prefer: str | None = None
    ) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        self._connection.putrequest("POST", f"/v1/sessions/{session}/documents")
        self._connection.putheader("Content-Type", "text/plain")
        self._connection.putheader("Accept", "text/event-stream")
        if key is not None:
            self._connection.putheader("Idempotency-Key", key)
        if prefer is not None:
            self._connection.putheader("Prefer", prefer)
        self._connection.putheader("Transfer-Encoding", "chunked")
        self._connection.endheaders()
        self._response: http.client.HTTPResponse | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def send(self, text: str) -> None:
        """Send the next piece."""
        self._connection.send(b"%x\r\n%b\r\n" % (len(text.encode()), text.encode()))

    def event(self) -> tuple[str, dict[str, Any]]:
        """The next event's name and data."""
        if self._response is None:
            self._response = self._connection.getresponse()
            assert self._response.status == 200
        name = ""
        while line := self._response.readline().decode():
            field, _, value = line.strip().partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                return name, json.loads(value)
        raise AssertionError("the stream has ended")

    def begin(self, text: str) -> None:
        """Send a first piece, and return when some of it has been learnt."""
        self.send(text)
        name, progress = self.event()
        assert (name, progress["tokens"] > 0) == ("progress", True)

    @property
    def stream_id(self) -> str:
        """Of the stream that has begun."""
        assert self._response is not None
        return self._response.headers["X-Stream-ID"]

    def end(self) -> None:
        """Say that this was all."""
        self._connection.send(b"0\r\n\r\n")

    def finish(self) -> tuple[str, dict[str, Any]]:
        """The same; the event that ends the stream."""
        self.end()
        while (event := self.event())[0] == "progress":
            pass
        return event


class LiveServer:
    """The app on a real socket in a thread of this process; a blocking call on its event loop is an error."""

    def __init__(self, settings: Settings, tracing: Tracing | None = None) -> None:
        self.port = settings.port
        self.url = f"http://127.0.0.1:{settings.port}"
        self.lifecycle = Lifecycle[AppContext]()
        app = create_app(settings, self.lifecycle, tracing=tracing)
        config = uvicorn.Config(app, settings.host, settings.port, http=PunctualProtocol, log_config=None)
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with blockbuster_ctx("titans_server"):
            self.server.run()

    def __enter__(self) -> Self:
        self.start()
        self.wait_until_ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Return when it listens; its model is loaded later."""
        self._thread.start()
        while not self.server.started:
            assert self._thread.is_alive(), "the server ended before it began"
            time.sleep(0.05)

    def wait_until_ready(self) -> None:
        """Return when it takes work."""
        with Client(self.url) as client:
            client.wait_until_ready(is_alive=self._thread.is_alive)

    @property
    def context(self) -> AppContext:
        """What the app is made of."""
        return self.lifecycle.served

    def num_tasks(self) -> int:
        """Tasks on its event loop."""
        return len(asyncio.all_tasks(self.server.servers[0].get_loop()))

    def stop(self) -> None:
        """Ask it to end, and wait until it has."""
        self.server.should_exit = True
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()
