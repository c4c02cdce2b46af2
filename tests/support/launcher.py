"""Starts servers in a fraction of a second: forked from a process that has imported them.

Run as a program it is that process. It reads a line of JSON for each server, {"args", "environment", "log"}, and
answers with the server's process id; {"reap": id} waits for one that has ended and answers with its exit status.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


class ForkedServer:
    """A server's process. Has what is used of subprocess.Popen."""

    def __init__(self, launcher: "Launcher", pid: int) -> None:
        self._launcher = launcher
        self.pid = pid
        self._ended = os.pidfd_open(pid)  # readable once it has ended
        self._status: int | None = None
        self._lock = threading.Lock()  # it is reaped once

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        return self.wait(timeout=60) if self._status is None and self._has_ended(0) else self._status

    def wait(self, timeout: float) -> int:
        """The exit status, negative where a signal ended it. Raises subprocess.TimeoutExpired."""
        if self._status is None and not self._has_ended(timeout):
            raise subprocess.TimeoutExpired("titans_server", timeout)
        with self._lock:
            if self._status is None:
                self._status = int(self._launcher.ask({"reap": self.pid}))
        return self._status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._ended, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def __del__(self) -> None:
        os.close(self._ended)

    def _has_ended(self, timeout: float) -> bool:
        return bool(select.select([self._ended], [], [], timeout)[0])


class Launcher:
    """The process that servers are forked from, started with the first of them. It and they end with `close`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # one question at a time

    def start(self, args: list[str], environment: dict[str, str], log: Path) -> ForkedServer:
        """Fork a server with these arguments and exactly these variables; it may not be ready yet."""
        return ForkedServer(self, int(self.ask({"args": args, "environment": environment, "log": str(log)})))

    def ask(self, question: dict[str, Any]) -> Any:
        """One question to the process, and its answer."""
        with self._lock:
            if self._process is None:
                pipe = subprocess.PIPE
                self._process = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True)
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            print(json.dumps(question), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End it, and kill what it has forked and still runs."""
        if self._process is not None:
            self._process.communicate()
            self._process = None


def main() -> None:
    """Fork what is asked for until there is nobody to ask."""
    import torch
    from titans_server import __main__ as server

    torch.set_num_threads(1)  # no thread may be there when a process forks
    children: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        if "reap" in question:
            _, status = os.waitpid(question["reap"], 0)
            children.discard(question["reap"])
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        child = os.fork()
        if child == 0:
            _serve(server, **question)
        children.add(child)
        print(child, flush=True)
    for child in children:
        os.kill(child, signal.SIGKILL)
    os._exit(0)  # taking torch apart would take seconds


def _serve(server: Any, args: list[str], environment: dict[str, str], log: str) -> None:
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)  # tests may trace it
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.clear()
        os.environ.update(environment)
        parser = server.argparse.ArgumentParser()
        server.add_arguments(parser)
        status = server.run(parser.parse_args(args))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
