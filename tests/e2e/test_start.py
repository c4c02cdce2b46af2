"""What keeps a server from its start, and is its operator's to mend, is told in a line; the process ends."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import TinyCheckpoint
from support.servers import free_port

SECRET = "a-password-of-the-store"


def failed(checkpoint: TinyCheckpoint, **own: str) -> tuple[int, str]:
    """The status of a server that does not start, and what it says."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TITANS_")}
    given = {"TITANS_STORE": "memory://", "TITANS_PORT": str(free_port())} | own
    command, environment = [sys.executable, "-m", "titans_server"], clean | checkpoint.environment | given
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("TITANS_BODY", "{folder}", "config.json"),
        ("TITANS_MEMORY", "{folder}/none.safetensors", "none.safetensors is not a memory checkpoint"),
        ("TITANS_DEVICE", "cuda:99", "TITANS_DEVICE has cuda:99, and PyTorch"),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_the_server_with_the_reason(
    checkpoint: TinyCheckpoint, tmp_path: Path, setting: str, value: str, reason: str
) -> None:
    status, said = failed(checkpoint, **{setting: value.format(folder=tmp_path)})
    (line,) = [line for line in said.splitlines() if "the model cannot be loaded: " in line]
    assert status == 1 and reason in line


def test_a_redis_that_is_not_there_is_named(checkpoint: TinyCheckpoint) -> None:
    port = free_port()
    status, said = failed(checkpoint, TITANS_STORE=f"redis://:{SECRET}@127.0.0.1:{port}")
    (line,) = [line for line in said.splitlines() if "the Redis store cannot be reached: " in line]
    assert status == 1 and f"127.0.0.1:{port}" in line and SECRET not in said


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("file/titans.db", "the SQLite store cannot use its files: "),
        ("file", "the SQLite store failed: file is not a database"),
    ],
)
def test_a_database_that_cannot_be_used_is_named(
    checkpoint: TinyCheckpoint, tmp_path: Path, path: str, reason: str
) -> None:
    (tmp_path / "file").write_text("what is no database, and no folder either\n" * 100)
    status, said = failed(checkpoint, TITANS_STORE=f"sqlite:///{tmp_path / path}")
    assert status == 1 and [line for line in said.splitlines() if reason in line]


def test_a_server_that_others_reach_says_that_it_wants_a_key(checkpoint: TinyCheckpoint) -> None:
    status, said = failed(checkpoint, TITANS_HOST="0.0.0.0")
    assert status == 1 and len([line for line in said.splitlines() if "TITANS_API_KEY" in line]) == 1


def test_a_port_that_is_taken_is_named(checkpoint: TinyCheckpoint) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        status, said = failed(checkpoint, TITANS_PORT=str(port))
    assert status == 1 and [line for line in said.splitlines() if str(port) in line and "in use" in line]
