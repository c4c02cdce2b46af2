"""`make soak`: mixed load for an hour, or SOAK_SECONDS; what servers hold has to stay flat. Status 1 where it does not.

Clients create, teach, ask, fork and delete sessions, and leave in the middle of documents and answers, on a server
with SQLite and one with Redis. Twenty times their memory, file descriptors, threads and states at hand are looked at.
"""

import contextlib
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import httpx
from prometheus_client.parser import text_string_to_metric_families
from support.models import write_tiny_checkpoint
from support.redis_server import RedisServer
from support.servers import ServerProcess, Upload

NUM_CLIENTS = 2  # of each server
NUM_SESSIONS = 12  # that each client has at most
NUM_SAMPLES = 20
RESIDENT_BYTES = 100_000  # several states of the tiny model; fewer than there are sessions
TEXT = "A line of a document that goes on, and on, and does not say much. "
ASK = {"prompt": "what does it say", "max_tokens": 16}


@dataclass(frozen=True)
class Sample:
    """What a server holds at one time."""

    seconds: float
    num_requests: int
    memory: float  # bytes
    num_files: int
    num_threads: int
    num_states: int
    state_bytes: int


@dataclass
class Soaked:
    """A server, its clients' counts, and what was seen of it."""

    name: str
    server: ServerProcess
    num_requests: int = 0
    errors: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def look(self, seconds: float) -> None:
        """Add a sample."""
        families = text_string_to_metric_families(self.server.http.get("/metrics").raise_for_status().text)
        values = {sample.name: sample.value for family in families for sample in family.samples}
        process = Path(f"/proc/{self.server.pid}")
        self.samples.append(
            Sample(
                seconds,
                self.num_requests,
                values["process_resident_memory_bytes"],
                len(list((process / "fd").iterdir())),
                len(list((process / "task").iterdir())),
                int(values["titans_resident_sessions"]),
                int(values["titans_resident_bytes"]),
            )
        )


class Client:
    """One client's work on one server, until it is told to stop."""

    def __init__(self, soaked: Soaked, seed: int, stop: threading.Event) -> None:
        self._soaked = soaked
        self._stop = stop
        self._random = random.Random(seed)
        self._sessions: list[str] = []
        self._http = httpx.Client(base_url=soaked.server.url, timeout=120)

    def run(self) -> None:
        """Do one thing after another."""
        deeds = [self._create, self._teach, self._teach, self._ask, self._ask, self._ask_streamed, self._write]
        deeds += [self._fork, self._delete, self._leave_a_document, self._leave_an_answer]
        with self._http:
            while not self._stop.is_set():
                deed = self._random.choice(deeds) if self._sessions else self._create
                try:
                    deed()
                except (httpx.HTTPError, AssertionError, OSError) as error:
                    self._soaked.errors.append(f"{deed.__name__}: {error!r}")
                self._soaked.num_requests += 1

    def _create(self) -> None:
        if len(self._sessions) == NUM_SESSIONS:
            self._delete()
        self._sessions.append(self._http.post("/v1/sessions").raise_for_status().json()["id"])

    def _teach(self) -> None:
        text = TEXT * self._random.randint(1, 12)
        self._http.post(self._path("documents"), json={"text": text}).raise_for_status()

    def _ask(self) -> None:
        self._http.post(self._path("completions"), json=ASK).raise_for_status()

    def _ask_streamed(self) -> None:
        with self._http.stream("POST", self._path("completions"), json=ASK | {"stream": True}) as response:
            assert response.read().rstrip().endswith(b"[DONE]")

    def _write(self) -> None:
        self._http.post(self._path("completions"), json=ASK | {"memory": "write"}).raise_for_status()

    def _fork(self) -> None:
        if len(self._sessions) < NUM_SESSIONS:
            self._sessions.append(self._http.post(self._path("fork"), json={}).raise_for_status().json()["id"])

    def _delete(self) -> None:
        session = self._sessions.pop(self._random.randrange(len(self._sessions)))
        self._http.delete(f"/v1/sessions/{session}").raise_for_status()

    def _leave_a_document(self) -> None:
        with Upload(self._soaked.server, self._random.choice(self._sessions)) as upload:
            upload.begin(TEXT * 4)

    def _leave_an_answer(self) -> None:
        body = ASK | {"stream": True, "max_tokens": 200}
        with self._http.stream("POST", self._path("completions"), json=body) as response:
            next(response.iter_raw())

    def _path(self, what: str) -> str:
        return f"/v1/sessions/{self._random.choice(self._sessions)}/{what}"


def soak(all_soaked: list[Soaked], seconds: float) -> None:
    """Load the servers, and look at them from time to time."""
    stop = threading.Event()
    clients = [Client(soaked, seed, stop) for soaked in all_soaked for seed in range(NUM_CLIENTS)]
    threads = [threading.Thread(target=client.run) for client in clients]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        for i in range(1, NUM_SAMPLES + 1):
            time.sleep(max(0.0, began + seconds * i / NUM_SAMPLES - time.monotonic()))
            for soaked in all_soaked:
                soaked.look(time.monotonic() - began)
                print_row(soaked)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def what_grew(soaked: Soaked) -> list[str]:
    """What is more in the last quarter of the run than in the second, by more than it may vary."""
    quarter = len(soaked.samples) // 4
    before, after = soaked.samples[quarter : 2 * quarter], soaked.samples[-quarter:]
    bounds: dict[str, Callable[[float], float]] = {
        "memory": lambda x: x * 1.03 + (8 << 20),
        "num_files": lambda x: x + 8,
        "num_threads": lambda x: x + 4,
        "state_bytes": lambda x: max(x * 1.5, 2 * RESIDENT_BYTES),
    }
    grew = []
    for name, bound in bounds.items():
        middle, end = (median(getattr(sample, name) for sample in samples) for samples in (before, after))
        if end > bound(middle):
            grew.append(f"{soaked.name}: {name} grew from {middle:.0f} to {end:.0f}")
    return grew


def print_row(soaked: Soaked) -> None:
    """The last sample of a server."""
    x = soaked.samples[-1]
    print(
        f"{x.seconds:7.0f} s  {soaked.name:6}  {x.num_requests:8} requests  {len(soaked.errors):4} errors  "
        f"{x.memory / 1e6:6.1f} MB  {x.num_files:4} files  {x.num_threads:3} threads  "
        f"{x.num_states:3} states ({x.state_bytes / 1e3:.0f} kB)",
        flush=True,
    )


def main() -> int:
    """The whole run."""
    seconds = float(os.environ.get("SOAK_SECONDS", "3600"))
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        environment = write_tiny_checkpoint(folder).environment | {"TITANS_RESIDENT_BYTES": str(RESIDENT_BYTES)}
        redis = RedisServer(folder)
        redis.start()
        stack.callback(redis.kill)
        stores = {"sqlite": f"sqlite:///{folder}/titans.db", "redis": redis.url}
        all_soaked = [
            Soaked(kind, stack.enter_context(ServerProcess(store, folder / f"{kind}.log", environment)))
            for kind, store in stores.items()
        ]
        soak(all_soaked, seconds)
        errors = [f"{soaked.name}: {error}" for soaked in all_soaked for error in soaked.errors]
        grew = [line for soaked in all_soaked for line in what_grew(soaked)]
    print(*errors[:20], *grew, sep="\n")
    print("flat" if not grew and not errors else f"{len(errors)} errors; {len(grew)} things grew")
    return 1 if errors or grew else 0


if __name__ == "__main__":
    sys.exit(main())
