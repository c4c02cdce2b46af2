from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.models import write_tiny_checkpoint
from support.servers import LiveServer, tiny_settings
from titans_server.settings import Settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder: Path = tmp_path_factory.mktemp("tiny")
    checkpoint = write_tiny_checkpoint(folder)
    return tiny_settings(
        checkpoint,
        store=f"sqlite:///{folder}/titans.db",
        max_prompt_tokens=100,
        max_document_bytes=20_000,
        max_waiting_writers=1,
        stream_ping_seconds=3600,  # a reader of events takes a comment for an event without data
    )


@pytest.fixture(scope="module")
def server(settings: Settings) -> Iterator[LiveServer]:
    with LiveServer(settings) as server:
        yield server


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def session(http: httpx.Client) -> str:
    session_id: str = http.post("/v1/sessions").json()["id"]
    return session_id
