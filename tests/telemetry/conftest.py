from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.models import TinyCheckpoint, write_tiny_checkpoint
from support.servers import ServerProcess


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A process that logs JSON, all of it, and keeps one state in memory."""
    folder: Path = tmp_path_factory.mktemp("server")
    settings = {"TITANS_LOG_FORMAT": "json", "TITANS_LOG_LEVEL": "debug", "TITANS_RESIDENT_BYTES": "0"}
    with ServerProcess(f"sqlite:///{folder}/titans.db", folder / "log", checkpoint.environment | settings) as server:
        yield server


@pytest.fixture
def http(server: ServerProcess) -> httpx.Client:
    return server.http
