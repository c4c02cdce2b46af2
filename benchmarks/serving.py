"""A server in a process of its own, and what a client sees of it: what most benchmarks measure."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
from titans.backbone import find_default_body, load_backbone
from titans.tokenizer import Tokenizer
from titans_client import Client, TitansError

PROMPT = "The man said that"
BOOK = Path(__file__).parents[1] / "examples" / "sherlock-holmes.txt"


@contextmanager
def server(store: str = "memory://", **environment: str) -> Iterator[str]:
    """The address of one that is ready; `environment` is TITANS_… variables, named without it, in lower case."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "titans_server", "--port", str(port), "--store", store]
    ours = {f"TITANS_{name.upper()}": value for name, value in {"log_level": "warning", **environment}.items()}
    process = subprocess.Popen(command, env=os.environ | ours)
    url = f"http://127.0.0.1:{port}"
    try:
        try:
            with Client(url) as client:
                client.wait_until_ready(is_alive=lambda: process.poll() is None)
        except TitansError as error:
            raise SystemExit(f"the server did not start: {error}") from error
        yield url
    finally:
        process.terminate()
        process.wait()


class Book:
    """Text of any length, the same every time; as long as need be by beginning again."""

    def __init__(self) -> None:
        self.tokenizer: Tokenizer = load_backbone(find_default_body()).tokenizer
        self._tokens = self.tokenizer.encode(BOOK.read_text(encoding="utf-8"))

    def tokens(self, count: int, start: int = 0) -> list[int]:
        """The next `count` tokens."""
        return [self._tokens[(start + i) % len(self._tokens)] for i in range(count)]

    def text(self, count: int, start: int = 0) -> str:
        """The same as text, which may be a few tokens more or less."""
        return self.tokenizer.decode(self.tokens(count, start))


@dataclass(frozen=True)
class Answer:
    """When its pieces came, in seconds from the request."""

    times: list[float]
    num_tokens: int

    @property
    def first(self) -> float:
        """Seconds to the first piece."""
        return self.times[0]

    @property
    def between(self) -> float:
        """Mean seconds between two tokens."""
        return (self.times[-1] - self.times[0]) / max(1, self.num_tokens - 1)


async def answer(url: str, session: str, count: int, prompt: str = PROMPT) -> Answer:
    """`count` tokens of a session, greedily; the end of text is forbidden.

    What comes is kept with its time and read when all of it is there: a client that takes every event apart at once
    has half a millisecond of the cores that are measured a token.
    """
    address = httpx.URL(url)
    body = json.dumps(
        {
            "model": _model_name(url),
            "prompt": prompt,
            "session": session,
            "max_tokens": count,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logit_bias": {"2": -100, "0": -100},
        }
    )
    # HTTP/1.0: the answer has no chunks to be taken apart, and ends with the connection
    head = f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(address.host, address.port)
    started, said, seen = time.perf_counter(), b"", list[tuple[int, float]]()
    writer.write((head + body).encode())
    while data := await reader.read(1 << 16):
        said += data
        seen.append((len(said), time.perf_counter() - started))
    writer.close()
    return _answer(said, seen)


@cache
def _model_name(url: str) -> str:
    """Of the model that a server runs."""
    name: str = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    return name


def _answer(said: bytes, seen: list[tuple[int, float]]) -> Answer:
    """`seen`: how many bytes there were, and when."""
    if not said.startswith(b"HTTP/1.1 200"):
        raise SystemExit(said.decode())
    times, num_tokens, end, arrivals = list[float](), 0, 0, iter(seen)
    length, arrived = next(arrivals)
    for line in said.splitlines(keepends=True):
        end += len(line)
        while length < end:
            length, arrived = next(arrivals)
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            if event["choices"] and event["choices"][0]["text"]:
                times.append(arrived)
            num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
    return Answer(times, num_tokens)


def answer_once(url: str, session: str, count: int) -> Answer:
    """`answer`, for programs that do one thing at a time."""

    return asyncio.run(answer(url, session, count))


def learn(client: Client, text: str, session: str | None = None) -> tuple[str, int, float]:
    """A session that has read a text, how many tokens that were, and the seconds until it was durable."""
    session = session or client.sessions.create().id
    started = time.perf_counter()
    document = client.ingest(session, text)
    return session, document.tokens, time.perf_counter() - started
