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


async def answer(http: httpx.AsyncClient, session: str, count: int, prompt: str = PROMPT) -> Answer:
    """`count` tokens of a session, greedily; the end of text is forbidden."""
    models = (await http.get("/v1/models")).json()["data"]
    body = {
        "model": models[0]["id"],
        "prompt": prompt,
        "session": session,
        "max_tokens": count,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logit_bias": {"2": -100, "0": -100},
    }
    started, times, num_tokens = time.perf_counter(), list[float](), 0
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.is_error:
            raise SystemExit((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event["choices"] and event["choices"][0]["text"]:
                times.append(time.perf_counter() - started)
            num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
    return Answer(times, num_tokens)


def answer_once(url: str, session: str, count: int) -> Answer:
    """`answer`, for programs that do one thing at a time."""

    async def ask() -> Answer:
        async with httpx.AsyncClient(base_url=url, timeout=None) as http:
            return await answer(http, session, count)

    return asyncio.run(ask())


def learn(client: Client, text: str, session: str | None = None) -> tuple[str, int, float]:
    """A session that has read a text, how many tokens that were, and the seconds until it was durable."""
    session = session or client.sessions.create().id
    started = time.perf_counter()
    document = client.ingest(session, text)
    return session, document.tokens, time.perf_counter() - started
