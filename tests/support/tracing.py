"""SIGKILL on the way into a system call: the n-th fsync, say, that a running process makes. By strace."""

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def can_trace(pid: int) -> bool:
    """Whether there is strace, and the system lets it trace this process."""
    if shutil.which("strace") is None:
        return False
    with inject(pid, "reboot", "signal=SIGCONT") as tracer:
        return tracer.poll() is None


@contextmanager
def inject(pid: int, calls: str, what: str, when: int = 1) -> Iterator["subprocess.Popen[str]"]:
    """Within the context, `what` befalls a thread's `when`-th of these system calls, as `strace --inject` puts it."""
    command = ["strace", "-f", "-p", str(pid), f"--trace={calls}", f"--inject={calls}:{what}:when={when}"]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
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
