"""No acknowledgement leaves before what it speaks of is synced to the disk: what SIGKILL cannot show, a trace can."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.launcher import Launcher
from support.models import TinyCheckpoint
from support.tracing import can_trace, recorded, unsynced_at_replies
from support.world import World

TRACE = """\
7     write(5</s/db-wal>, "a", 1) = 1
7     write(2</s/log>, "a", 1) = 1
8 sendto(9<socket:[1]>, "HTTP/1.1 200 OK", 1) = 1
7 fdatasync(5</s/db-wal> <unfinished ...>
8 sendto(9<socket:[1]>, "HTTP/1.1 503 Service", 1) = 1
8 sendto(9<socket:[1]>, "HTTP/1.1 202 Accepted", 1) = 1
7 <... fdatasync resumed>) = 0
7 rename("/s/db.blobs/a.partial", "/s/db.blobs/a") = 0
8 sendto(9<socket:[1]>, "HTTP/1.1 201 Created", 1) = 1
7 fsync(6</s/db.blobs>) = 0
8 sendto(9<socket:[1]>, "HTTP/1.1 200 OK", 1) = 1
"""


def test_the_trace_is_read_right() -> None:
    assert unsynced_at_replies(TRACE, "/s/db") == [{"/s/db-wal"}, {"/s/db-wal"}, {"/s/db.blobs"}, set()]


@pytest.fixture
def world(checkpoint: TinyCheckpoint, launcher: Launcher, tmp_path: Path) -> Iterator[World]:
    """A server that writes nothing but what somebody asks for: it has room, and nobody is idle, however long it takes.

    The renewal of a lease is no exception: the one thread that writes is through with it before the lease ends.
    """
    environment = checkpoint.environment | {"TITANS_SNAPSHOT_IDLE_SECONDS": "3600"}
    with World("sqlite", tmp_path, environment, launcher) as world:
        yield world


def test_what_is_acknowledged_is_synced_before(world: World, tmp_path: Path) -> None:
    if not can_trace(world.server.pid):
        pytest.skip("needs strace, and leave to use it")
    life, output, http = world.new_life(), tmp_path / "trace", world.server.http
    with recorded(world.server.pid, output):
        life.run()
        exported = http.get(f"/v1/sessions/{life.session}/state").raise_for_status().content
        session = http.post("/v1/sessions").raise_for_status().json()["id"]
        http.put(f"/v1/sessions/{session}/state", content=exported).raise_for_status()
    database, trace = world.store.removeprefix("sqlite:///"), output.read_text()
    assert f"{database}-wal" in trace, "it is seen writing its log"
    assert f"{database}.states/{session}" in trace, "it is seen writing a snapshot"
    at_replies = unsynced_at_replies(trace, database)
    assert len(at_replies) > 10
    assert set().union(*at_replies) == set()
