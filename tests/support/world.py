"""A server and its store, either of which may be killed and is started again."""

import contextlib
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import httpx
from support.launcher import Launcher
from support.life import Life
from support.proxy import FaultProxy
from support.redis_server import RedisServer
from support.servers import ServerProcess

StoreKind = Literal["sqlite", "redis"]


class World:
    """A server on a store of a kind of its own; between it and Redis stands a proxy. Dead when the context is left."""

    def __init__(self, kind: StoreKind, folder: Path, environment: dict[str, str], launcher: Launcher) -> None:
        self.kind = kind
        self._folder = folder
        self._environment = environment
        self._launcher = launcher
        self._stack = ExitStack()
        self._redis: RedisServer | None = None
        self._proxy: FaultProxy | None = None

    def __enter__(self) -> "World":
        with ExitStack() as stack:
            self.store = self._open_store(stack)
            self.server = stack.enter_context(self.new_server())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def new_server(self) -> ServerProcess:
        """One more server on the store, not started yet."""
        number = len(list(self._folder.glob("*.log")))
        log = self._folder / f"server-{number}.log"
        log.touch()
        return ServerProcess(self.store, log, self._environment, self._launcher)

    @property
    def redis_server(self) -> RedisServer:
        """Where the kind is Redis."""
        assert self._redis is not None
        return self._redis

    @property
    def proxy(self) -> FaultProxy:
        """What stands between the server and Redis, where the kind is Redis."""
        assert self._proxy is not None
        return self._proxy

    def new_life(self) -> Life:
        """A session's life on a server that runs when it begins, and again whenever it is found dead."""
        self.recover()
        return Life(self.server.http, self.recover)

    def kill_server(self) -> None:
        """SIGKILL, from any thread."""
        os.kill(self.server.pid, signal.SIGKILL)

    def kill_redis(self) -> None:
        """SIGKILL, from any thread."""
        os.kill(self.redis_server.pid, signal.SIGKILL)

    def recover(self) -> None:
        """Start what is dead, and return when requests can be served."""
        for _ in range(600):
            if self._redis is not None and not self._redis.is_running():
                self._redis.start()
            if not self.server.is_running():
                self.server.start()
            with contextlib.suppress(httpx.TransportError):
                if self.server.http.get("/health/ready").is_success:
                    return
            time.sleep(0.05)  # one of them is about to die, or the server to find its Redis
        raise AssertionError(f"the server does not come back:\n{self.server.log}")

    def restart_with(self, **variables: str) -> None:
        """Kill the server and start it with these variables besides; the next start is without them."""
        self.server.kill()
        usual = self.server.environment
        self.server.environment = usual | variables
        try:
            self.server.start()
        finally:
            self.server.environment = usual

    def _open_store(self, stack: ExitStack) -> str:
        if self.kind == "sqlite":
            return f"sqlite:///{self._folder}/titans.db"
        self._redis = RedisServer(self._folder)
        self._redis.start()
        stack.callback(self._redis.kill)
        self._proxy = stack.enter_context(FaultProxy(self._redis.port))
        return f"redis://127.0.0.1:{self._proxy.port}/0?socket_timeout=1"
