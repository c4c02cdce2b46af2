"""A real Redis for tests: alone, as a cluster, behind a Sentinel."""

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis


class RedisServer:
    """A real redis-server in a folder of its own. What it acknowledges is in the append-only file."""

    def __init__(self, folder: Path, *words: str, **settings: Any) -> None:
        """`words` come first on its command line; `settings` go before those that are set here."""
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.fail("these tests need the `redis-server` binary: apt-get install redis-server")
        self._binary, self._folder, self._words, self.settings = binary, folder, words, settings
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()

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
            "save": "",
        }
        if "--sentinel" in self._words:  # which keeps nothing
            settings = {name: settings[name] for name in ("bind", "port", "dir")}
        given = settings | {name.replace("_", "-"): value for name, value in self.settings.items()}
        options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen([self._binary, *self._words, *options], stdout=log, stderr=log)
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
        with redis.Redis(port=self.port, password=self.settings.get("requirepass")) as client:
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


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def redis_cluster(folder: Path, num_nodes: int = 2) -> Iterator[str]:
    """A cluster of primaries, each with its part of the slots: its URL."""
    nodes = []
    for i in range(num_nodes):
        (folder / f"{i}").mkdir()
        nodes.append(RedisServer(folder / f"{i}", cluster_enabled="yes", cluster_port=free_port()))
        nodes[-1].start()
    first, *others = nodes
    bounds = [16_384 * i // num_nodes for i in range(num_nodes + 1)]
    try:
        for node, low, above in zip(nodes, bounds, bounds[1:], strict=False):
            node.command("CLUSTER", "ADDSLOTSRANGE", low, above - 1)
        for node in others:
            first.command("CLUSTER", "MEET", "127.0.0.1", node.port, str(node.settings["cluster_port"]))
        _wait_for(lambda: all(b"cluster_state:ok" in node.command("CLUSTER", "INFO") for node in nodes))
        yield f"redis+cluster://127.0.0.1:{first.port}"
    finally:
        for node in nodes:
            node.kill()


@contextlib.contextmanager
def redis_sentinel(folder: Path) -> Iterator[str]:
    """A Redis, and a Sentinel that watches it: the URL of what it watches."""
    for name in ("master", "sentinel"):
        (folder / name).mkdir()
    master = RedisServer(folder / "master")
    master.start()
    config = folder / "sentinel.conf"
    config.write_text(f"sentinel monitor titans 127.0.0.1 {master.port} 1\n")
    sentinel = RedisServer(folder / "sentinel", str(config), "--sentinel")
    sentinel.start()
    try:
        yield f"redis+sentinel://127.0.0.1:{sentinel.port}/titans/0"
    finally:
        sentinel.kill()
        master.kill()


class Failover:
    """Two Redis servers, one of which follows the other, and a Sentinel that promotes it when the other dies."""

    def __init__(self, folder: Path) -> None:
        for name in ("one", "two", "sentinel"):
            (folder / name).mkdir()
        self._servers = [RedisServer(folder / name) for name in ("one", "two")]
        self._config = folder / "sentinel.conf"
        self._sentinel = RedisServer(folder / "sentinel", str(self._config), "--sentinel")
        self.url = f"redis+sentinel://127.0.0.1:{self._sentinel.port}/titans/0"

    def __enter__(self) -> "Failover":
        for server in self._servers:
            server.start()
        master, replica = self._servers
        _wait_for(lambda: self._follows(replica, master))
        lines = (
            f"monitor titans 127.0.0.1 {master.port} 1",
            "down-after-milliseconds titans 2000",
            "failover-timeout titans 3000",
        )
        self._config.write_text("".join(f"sentinel {line}\n" for line in lines))
        self._sentinel.start()
        _wait_for(lambda: self._master_says(b"num-slaves") == b"1")
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self._sentinel, *self._servers):
            server.kill()

    def leave_alone(self) -> None:
        """Kill the replica."""
        self._roles()[1].kill()

    def fail_over(self) -> None:
        """Kill the master; return when the other is promoted, and the old one is back and follows it."""
        master, replica = self._roles()
        master.kill()
        _wait_for(lambda: int(self._master_says(b"port")) == replica.port and replica.command("ROLE")[0] == b"master")
        master.start()
        _wait_for(lambda: self._follows(*reversed(self._roles())))  # a machine that is busy may see it promoted back

    def _roles(self) -> list[RedisServer]:
        port = int(self._master_says(b"port"))
        return sorted(self._servers, key=lambda server: server.port != port)

    @staticmethod
    def _follows(replica: RedisServer, master: RedisServer) -> bool:
        """Whether it does by now; told to where it does not."""
        kind, *rest = replica.command("ROLE")
        if kind == b"slave" and rest[1] == master.port:
            return bool(rest[2] == b"connected")
        replica.command("REPLICAOF", "127.0.0.1", master.port)
        return False

    def _master_says(self, field: bytes) -> bytes:
        said = self._sentinel.command("SENTINEL", "MASTER", "titans")
        found: bytes = said[field] if isinstance(said, dict) else dict(zip(said[::2], said[1::2], strict=True))[field]
        return found


def _wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        if time.monotonic() > deadline:
            pytest.fail("Redis does not come to where it should")
        time.sleep(0.05)
