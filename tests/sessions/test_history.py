"""What a session's record becomes: nothing that it points at is ever gone."""

import pytest
from support.records import a_session
from titans_server.sessions import history
from titans_server.sessions.history import Writing
from titans_server.sessions.record import Draft, Outcome, Snapshot

SEPARATOR = (10, 10)


@pytest.mark.parametrize("how", ["an answer", "a document"])
def test_a_version_stands_on_the_snapshot_that_its_base_got_meanwhile(how: str) -> None:
    empty = a_session()
    record = history.write(empty, Writing(empty.head, "first", (1, 2, 3), 8, num_kept=1)).record
    base = record.head
    assert base.snapshot is None and base.entries
    record = history.attach(record, base, Snapshot("blob", "0" * 64, 8, 3)).record
    assert record.entries() == set(), "the snapshot has it all"

    writing = Writing(base, "second", (4, 5), 8, num_kept=1)  # as whoever began before the snapshot knows it
    if how == "an answer":
        edit = history.write(record, writing)
    else:
        draft, outcome = Draft("ing_1", "server", 1e12, 0.0), Outcome("ing_1", "done", 0.0)
        edit = history.seal(record, draft, SEPARATOR, writing, outcome)
    assert edit.record.head.snapshot == record.head.snapshot
    assert edit.record.entries() == edit.append.keys()
