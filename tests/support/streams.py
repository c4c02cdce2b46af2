"""Streams as their tests need them: endless ones, their events parsed by hand, and a server that keeps few."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from support.models import write_tiny_checkpoint
from support.servers import tiny_settings
from titans_server.settings import Settings

MODEL = "tiny-0"
EOS = 2
_ENDLESS = {"max_tokens": 1_000_000, "stream": True}


def stream_settings(folder: Path) -> Settings:
    """Of a server that keeps two streams, and loses patience soon."""
    checkpoint = write_tiny_checkpoint(folder)
    return tiny_settings(
        checkpoint,
        store="memory://",
        max_requests=2,
        max_completion_tokens=1_000_000,
        max_streams=2,
        stream_bytes=30_000,
        stream_keep_seconds=60,
        stream_ping_seconds=0.2,
        stream_stall_seconds=0.5,
    )


@dataclass(frozen=True)
class Event:
    id: int
    name: str
    data: str


def events(response: httpx.Response) -> Iterator[Event]:
    """The events of a stream, parsed by hand: their ids and names are what is tested."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            yield Event(int(fields["id"]), fields.get("event", "message"), fields["data"])
            fields = {}


def endless(endpoint: str, session: str) -> dict[str, Any]:
    """A request whose answer does not end by itself."""
    bias = {"logit_bias": {str(EOS): -100}}
    match endpoint:
        case "native":
            body: dict[str, Any] = {"prompt": "a", "temperature": 0}
            return {"method": "POST", "url": f"/v1/sessions/{session}/completions", "json": body | _ENDLESS}
        case "text":
            body = {"model": MODEL, "prompt": "a"}
            return {"method": "POST", "url": "/v1/completions", "json": body | bias | _ENDLESS}
        case _:
            body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
            return {"method": "POST", "url": "/v1/chat/completions", "json": body | bias | _ENDLESS}


def wait_until_idle(http: httpx.Client) -> None:
    """Return when both places of the engine are free, long before an endless answer ends."""
    started = time.monotonic()
    body = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 1}
    while http.post("/v1/completions", json=body).status_code != 200:
        assert time.monotonic() - started < 60, "work that nobody waits for goes on"
        time.sleep(0.03)
