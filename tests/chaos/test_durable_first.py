"""No acknowledgement leaves before what it speaks of is synced to the disk: what SIGKILL cannot show, a trace can."""

from pathlib import Path

import pytest
from support.tracing import can_trace, recorded, unsynced_at_replies
from support.world import World

TRACE = """\
7 write(5</s/db-wal>, "a", 1) = 1
7 write(2</s/log>, "a", 1) = 1
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


def test_what_is_acknowledged_is_synced_before(sqlite: World, tmp_path: Path) -> None:
    if not can_trace(sqlite.server.pid):
        pytest.skip("needs strace, and leave to use it")
    life, trace = sqlite.new_life(), tmp_path / "trace"
    with recorded(sqlite.server.pid, trace):
        life.run()
    database = sqlite.store.removeprefix("sqlite:///")
    text = trace.read_text()
    assert f"{database}-wal" in text, "it is seen writing"
    at_replies = unsynced_at_replies(text, database)
    assert len(at_replies) > 5
    assert set().union(*at_replies) == set()
