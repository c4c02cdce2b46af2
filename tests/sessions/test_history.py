"""What a session's record becomes: nothing that it points at is ever gone."""

import random
import time
from dataclasses import replace

import pytest
from support.records import a_session
from titans_server.errors import SessionBusy, VersionConflict
from titans_server.sessions import history
from titans_server.sessions.history import Portion, Writing
from titans_server.sessions.record import Draft, Outcome, SessionRecord, Snapshot

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


def test_a_snapshot_of_a_version_serves_those_that_go_on_from_it_and_no_other() -> None:
    record, versions = a_session(), []
    for number in range(3):
        record = history.write(record, Writing(record.head, f"w{number}", (1, 2), 8, num_kept=9)).record
        versions.append(record.head)
    record = history.restore(record, 1, "again", num_kept=9).record
    assert history.attach(record, versions[1], Snapshot("late", "0" * 64, 8, 4)).record is record, "it was left behind"

    record = history.restore(record, 3, "forth", num_kept=9).record
    snapshot = Snapshot("blob", "0" * 64, 8, 4)
    record = history.attach(record, versions[1], snapshot).record
    assert [(x.snapshot, x.entries, x.num_to_replay) for x in record.versions[1:]] == [
        (None, ((0, 2),), 2),
        (snapshot, (), 0),
        (snapshot, ((2, 2),), 2),
        (None, ((0, 2),), 2),
        (snapshot, ((2, 2),), 2),
    ]
    unknown = replace(versions[2], write_id="of a commit that the store has lost")
    newer = Snapshot("newer", "0" * 64, 8, 6)
    assert history.attach(record, unknown, newer).record is record, "its entries may be others by now"
    record = history.attach(record, versions[2], newer).record  # as whoever began before the first one knows it
    assert (record.head.snapshot, record.head.entries) == (newer, ())


def taken_over() -> tuple[SessionRecord, Draft, Draft]:
    """A session with a document that one server began and another took over, and what each knows of it."""
    ours = Draft("ing_1", "ours", 0.0, time.time(), key="key")
    record = history.append(a_session(), ours, SEPARATOR, Portion((1, 2, 3), 3, "begun")).record
    (ours,) = record.drafts
    record = history.take(record, "ing_1", "theirs").record
    (theirs,) = record.drafts
    return record, ours, theirs


def test_the_end_of_a_document_that_another_server_took_over_is_not_written_twice() -> None:
    """Ours stands still before its last commit; meanwhile the client sends it to theirs, to be learnt later."""
    record, ours, theirs = taken_over()
    record = history.append(record, theirs, SEPARATOR, Portion((4, 5), 5, "whole", is_last=True)).record
    (theirs,) = record.drafts

    outcome = Outcome("ing_1", "done", 0.0, key="key", sha256="whole", num_bytes=5)
    with pytest.raises(VersionConflict, match="another server"):
        history.seal(record, ours, SEPARATOR, Writing(record.head, "ours", (4, 5), 8, num_kept=8), outcome)
    record = history.seal(record, theirs, SEPARATOR, Writing(record.head, "theirs", (), 8, num_kept=8), outcome).record
    assert (record.version, record.tokens_seen, record.outcomes[-1].tokens) == (1, 5, 5)


def test_a_portion_of_another_text_is_not_taken_for_one_that_was_appended() -> None:
    """Ours stands still; meanwhile the client sends another text under its key, to theirs."""
    record, ours, theirs = taken_over()
    record = history.append(record, theirs, SEPARATOR, Portion((4, 5), 5, "one text")).record

    assert history.append(record, theirs, SEPARATOR, Portion((4, 5), 5, "one text")).record is record
    with pytest.raises(VersionConflict, match="another server"):
        history.append(record, ours, SEPARATOR, Portion((6, 7), 5, "another"))


def test_a_lease_that_another_server_took_is_not_taken_back_by_renewing_it() -> None:
    ours = Draft("ing_1", "ours", 0.0, time.time(), key="key")
    record = history.append(a_session(), ours, SEPARATOR, Portion((1, 2, 3), 3, "begun")).record
    assert history.renew(record, "ing_1", "ours").record.drafts[0].lease_until > time.time()
    record = history.take(record, "ing_1", "theirs").record
    assert history.renew(record, "ing_1", "ours").record is record
    assert history.renew(record, "ing_1", "ours", seconds=0).record is record
    (theirs,) = record.drafts
    assert history.append(record, theirs, SEPARATOR, Portion((4, 5), 5, "whole")).record.drafts[0].tokens == 5


@pytest.mark.parametrize(("key", "accepted", "seconds"), [("", False, 600), ("key", False, 3600), ("", True, 1e9)])
def test_a_document_that_broke_off_counts_as_long_as_somebody_may_go_on_with_it(
    key: str, accepted: bool, seconds: float
) -> None:
    def left(ago: float) -> list[Draft]:
        lease = time.time() - ago
        return [Draft(f"ing_{i}", "gone", lease, 0.0, key=key and f"{key}{i}", accepted=accepted) for i in range(16)]

    begun, portion = Draft("ing_new", "ours", 0.0, time.time()), Portion((1, 2, 3), 3, "begun")
    with pytest.raises(SessionBusy):
        history.append(a_session(drafts=tuple(left(seconds - 10))), begun, SEPARATOR, portion)
    if not accepted:
        record = history.append(a_session(drafts=tuple(left(seconds + 10))), begun, SEPARATOR, portion).record
        assert [x.ingestion for x in record.drafts] == ["ing_new"], "their log goes with them"


def test_what_a_record_no_longer_points_at_is_found_whatever_was_done() -> None:
    chance, record, num_dropped = random.Random(0), a_session(), 0
    for number in range(400):
        before, drafts = record, record.drafts
        match chance.choice(["append", "seal", "discard", "write", "attach", "restore"]):
            case "append":
                draft = chance.choice([*drafts, Draft(f"ing_{number}", "server", 1e12, 0.0, key=str(number))])
                portion = Portion((1, 2), draft.num_bytes + 2, f"{number}")
                if draft in drafts or len(drafts) < 4:
                    record = history.append(record, draft, SEPARATOR, portion).record
            case "seal" if drafts:
                draft, outcome = chance.choice(drafts), Outcome(f"out_{number}", "done", 0.0)
                writing = Writing(record.head, f"w{number}", (), 8, num_kept=3)
                record = history.seal(record, draft, SEPARATOR, writing, outcome).record
            case "discard" if drafts:
                record = history.discard(record, chance.choice(drafts).ingestion).record
            case "write":
                record = history.write(record, Writing(record.head, f"w{number}", (1, 2), 8, num_kept=3)).record
            case "attach":
                version = chance.choice(record.versions)
                snapshot = Snapshot(f"blob{number}", "0" * 64, 8, version.tokens)
                record = history.attach(record, version, snapshot).record
            case "restore":
                number_of = chance.choice(record.versions).number
                record = history.restore(record, number_of, f"w{number}", num_kept=3).record
        assert record.dropped_since(before) == before.entries() - record.entries()
        num_dropped += len(record.dropped_since(before))
    assert num_dropped > 100
