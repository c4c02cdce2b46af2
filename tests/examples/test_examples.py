"""The examples run as they are, against a real server with a tiny model."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.models import write_tiny_checkpoint
from support.servers import LiveServer, free_port
from titans_server.settings import Settings

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NODE_PACKAGE = "openai@7.57.0"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    own = {"body": checkpoint.body, "memory": checkpoint.memory, "dtype": "float32", "threads": 1}
    with LiveServer(Settings.model_validate({"port": free_port(), "store": "memory://"} | own)) as server:
        yield server


def run(server: LiveServer, *command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TITANS_BASE_URL": server.url, "NO_PROXY": "*"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert httpx.get(f"{server.url}/v1/sessions").json()["data"] == [], "an example leaves nothing behind"
    return done


def test_curl(server: LiveServer, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = run(server, "sh", EXAMPLES / "curl.sh", folder=tmp_path)
    assert '"object":"document"' in done.stdout
    assert '"object":"completion"' in done.stdout
    assert "data: [DONE]" in done.stdout
    assert "preference-applied: resumable" in done.stderr.lower()


def test_openai_python(server: LiveServer, tmp_path: Path) -> None:
    assert run(server, sys.executable, EXAMPLES / "openai_python.py", folder=tmp_path).stdout.strip()


def test_openai_node(server: LiveServer, tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    install = [npm, "install", "--silent", "--no-audit", "--no-fund", NODE_PACKAGE]
    if subprocess.run(install, cwd=tmp_path, capture_output=True, timeout=240, check=False).returncode:
        pytest.skip(f"npm cannot fetch {NODE_PACKAGE}")
    shutil.copy(EXAMPLES / "openai_node.mjs", tmp_path)
    said = run(server, "node", "openai_node.mjs", folder=tmp_path).stdout
    assert said.count("\n") >= 2, "an answer in pieces and one at once, each on a line or more"
    assert said.strip(), "one of them may be blank, for the model is of random weights"
