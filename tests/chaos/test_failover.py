"""A Redis that dies right after an acknowledgement, behind Sentinel: its replica has all that was acknowledged."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.extent import whole_or
from support.launcher import Launcher
from support.life import Life, LostError, Outcome
from support.redis_server import Failover
from support.servers import ServerProcess
from support.table import Table


@pytest.fixture
def failover(tmp_path: Path) -> Iterator[Failover]:
    with Failover(tmp_path) as failover:
        yield failover


@pytest.fixture
def server(
    failover: Failover, environment: dict[str, str], launcher: Launcher, tmp_path: Path
) -> Iterator[ServerProcess]:
    log = tmp_path / "log"
    log.touch()
    with ServerProcess(f"{failover.url}?wait_replicas=1", log, environment, launcher) as server:
        yield server


def until_ready(server: ServerProcess) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if server.http.get("/health/ready").is_success:
                return
        time.sleep(0.05)
    raise AssertionError(f"the server does not find the new master:\n{server.log}")


def test_what_was_acknowledged_is_there_when_a_replica_is_promoted(
    failover: Failover, server: ServerProcess, uninterrupted: list[Outcome], table: Table
) -> None:
    for step in whole_or([3], range(1, 9)):
        life = Life(
            server.http,
            lambda: until_ready(server),
            lambda number, step=step: failover.fail_over() if number == step else None,  # type: ignore[misc]
        )
        with table.attempt("redis", "master killed", "after an acknowledgement"):
            if (outcome := life.run()) != uninterrupted:
                raise LostError(f"step {step}: {outcome} is not {uninterrupted}")


def test_without_a_replica_nothing_is_acknowledged(server: ServerProcess, failover: Failover) -> None:
    session = server.http.post("/v1/sessions").raise_for_status().json()["id"]
    failover.leave_alone()
    for path in ("/v1/sessions", f"/v1/sessions/{session}/restore"):
        response = server.http.post(path, json={} if path == "/v1/sessions" else {"version": 0})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable")
    assert server.http.get(f"/v1/sessions/{session}").status_code == 200
