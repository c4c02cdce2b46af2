"""System calls of running processes: written down, or the n-th of them failed or its caller killed. By strace."""

import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def can_trace(pid: int) -> bool:
    """Whether there is strace, and the system lets it trace this process."""
    if shutil.which("strace") is None:
        return False
    with inject(pid, "reboot", "signal=SIGCONT") as tracer:
        return tracer.poll() is None


@contextmanager
def inject(pid: int, calls: str, what: str, when: int = 1) -> Iterator["subprocess.Popen[str]"]:
    """Within the context, `what` befalls a thread's `when`-th of these system calls, as `strace --inject` puts it."""
    with _attached(["-p", str(pid), f"--trace={calls}", f"--inject={calls}:{what}:when={when}"]) as tracer:
        yield tracer


@contextmanager
def when_stopped(pid: int, do: Callable[[], object]) -> Iterator[None]:
    """Within the context, when a process stops itself, `do` is called, once, and the process goes on."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            with suppress(FileNotFoundError, ProcessLookupError):
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                if state == "T":
                    do()
                    os.kill(pid, signal.SIGCONT)
                    return

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()


@contextmanager
def _attached(options: list[str]) -> Iterator["subprocess.Popen[str]"]:
    tracer = subprocess.Popen(["strace", "-f", *options], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    while (line := tracer.stderr.readline()) and " attached" not in line:
        pass
    reading = threading.Thread(target=tracer.stderr.read)  # or it would wait for a reader
    reading.start()
    try:
        yield tracer
    finally:
        tracer.terminate()
        tracer.wait(timeout=30)
        reading.join()
        tracer.stderr.close()


@contextmanager
def recorded(pid: int, output: Path) -> Iterator[None]:
    """Within the context, what a process writes, syncs, renames and sends is written down, a call a line."""
    calls = "write,pwrite64,pwritev,ftruncate,fsync,fdatasync,rename,sendto"
    with _attached(["-p", str(pid), "-y", "-s", "40", f"--trace={calls}", "-o", str(output)]):
        yield


def unsynced_at_replies(trace: str, files: str) -> list[set[str]]:
    """For each "HTTP/1.1 2xx" that was sent, which files were not durable then: written to, or renamed, and not synced.

    trace: as `recorded` writes it.
    files: how the paths begin that count. What SQLite shares in memory does not.
    """
    unsynced: set[str] = set()
    syncing: dict[str, str] = {}  # by thread
    at_replies = []
    for line in trace.splitlines():
        thread, call = line.split(maxsplit=1)
        path = next((found for found in re.findall(r"[<\"](/[^>\"]*)", call) if found.startswith(files)), "")
        match re.split(r"\W", call.removeprefix("<... "), maxsplit=1)[0]:
            case "write" | "pwrite64" | "pwritev" | "ftruncate" if path and not path.endswith("-shm"):
                unsynced.add(path)
            case "fsync" | "fdatasync" if "<unfinished" in call:
                syncing[thread] = path
            case "fsync" | "fdatasync":
                unsynced.discard(path or syncing.pop(thread, ""))
            case "rename" if path:
                unsynced.add(str(Path(path).parent))
            case "sendto" if '"HTTP/1.1 2' in call:
                at_replies.append(set(unsynced))
    return at_replies
