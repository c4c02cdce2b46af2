"""What a session's record becomes: nothing that it points at is ever gone."""

import random
import time
from dataclasses import replace
from typing import Any

import pytest
from support.records import a_session
from titans_server.errors import IngestionCancelled, SessionBusy, VersionConflict
from titans_server.sessions import history
from titans_server.sessions.history import Overtaken, Portion, Writing
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

    new, portion = Draft("ing_new", "ours", 0.0, time.time()), Portion((1, 2, 3), 3, "begun")
    with pytest.raises(SessionBusy):
        history.append(a_session(drafts=tuple(left(seconds - 10))), new, SEPARATOR, portion)
    if not accepted:
        record = history.append(a_session(drafts=tuple(left(seconds + 10))), new, SEPARATOR, portion).record
        assert [x.ingestion for x in record.drafts] == ["ing_new"], "their log goes with them"


def begun(record: SessionRecord, key: str = "") -> tuple[SessionRecord, Draft]:
    """The session with three tokens of a document, and the draft that they are."""
    draft = Draft("ing_1", "ours", 0.0, 1.0, key=key)
    record = history.append(record, draft, SEPARATOR, Portion((1, 2, 3), 3, "begun")).record
    return record, record.drafts[-1]


def having_read(num_tokens: int) -> SessionRecord:
    empty = a_session()
    return history.write(empty, Writing(empty.head, "first", (7,) * num_tokens, 8, num_kept=9)).record


@pytest.mark.parametrize("num_before", [0, 4])
@pytest.mark.parametrize("logged", [False, True])
def test_a_separator_stands_between_documents_and_before_none(num_before: int, logged: bool) -> None:
    record = having_read(num_before) if num_before else a_session()
    record, draft = begun(record) if logged else (record, Draft("ing_1", "ours", 0.0, 1.0))
    outcome = Outcome("ing_1", "done", 0.0)
    writing = Writing(record.head, "sealed", (4, 5), 8, num_kept=9)
    edit = history.seal(record, draft, SEPARATOR, writing, outcome)
    own = (3 if logged else 0) + 2 + (len(SEPARATOR) if num_before else 0)
    head, (told,) = edit.record.head, edit.record.outcomes
    assert (head.tokens, told.tokens, told.tokens_seen) == (num_before + own, own, num_before + own)
    assert sum(count for _, count in head.entries) == head.tokens, "what is in the log is what was read"


def test_what_was_half_learnt_counts_only_on_the_version_it_began_from() -> None:
    half = Snapshot("half", "0" * 64, 8, 6)
    for base, expected in ((1, half), (0, None)):
        record, draft = begun(having_read(2))
        record = history.checkpoint(record, draft, record.head, half).record
        assert record.drafts[0].base == 1
        record = replace(record, drafts=(replace(record.drafts[0], base=base),))
        record = history.append(record, draft, SEPARATOR, Portion((4,), 4, "more")).record  # `draft` knows of none
        assert (record.drafts[0].snapshot, record.drafts[0].base) == (half, base), "more of it changes nothing"
        writing = Writing(record.head, "sealed", (5,), 8, num_kept=9)
        record = history.seal(record, record.drafts[0], SEPARATOR, writing, Outcome("ing_1", "done", 0.0)).record
        assert record.head.snapshot == expected
        assert record.head.num_to_replay == (9 if expected is None else 3)


@pytest.mark.parametrize("wrong", [{"tokens": 2}, {"sha256": "another"}], ids=str)
def test_nothing_is_made_of_a_log_that_has_not_what_its_writer_learnt(wrong: dict[str, Any]) -> None:
    record, draft = begun(a_session())
    mine = replace(draft, **wrong)
    with pytest.raises(VersionConflict, match="another server"):
        history.checkpoint(record, mine, record.head, Snapshot("half", "0" * 64, 8, 3))
    with pytest.raises(VersionConflict, match="another server"):
        writing = Writing(record.head, "sealed", (), 8, num_kept=9)
        history.seal(record, mine, SEPARATOR, writing, Outcome("ing_1", "done", 0.0))


def test_a_document_goes_on_by_its_server_alone_and_not_once_it_is_gone() -> None:
    record, draft = begun(a_session())
    more = Portion((4,), 4, "more")
    with pytest.raises(VersionConflict, match="another server"):
        history.append(record, replace(draft, server="theirs"), SEPARATOR, more)
    with pytest.raises(IngestionCancelled):
        history.append(history.discard(record, "ing_1").record, draft, SEPARATOR, more)
    ended = history.end(record, Outcome("ing_1", "cancelled", 0.0)).record
    for known in (draft, Draft("ing_1", "ours", 0.0, 1.0)):
        with pytest.raises(IngestionCancelled):
            history.append(ended, known, SEPARATOR, more)
    with pytest.raises(IngestionCancelled):
        history.take(ended, "ing_1", "ours")
    failed = history.end(record, Outcome("ing_1", "failed", 0.0)).record
    assert history.take(failed, "ing_1", "ours").record is failed
    last = history.append(record, draft, SEPARATOR, replace(more, is_last=True)).record
    assert last.drafts[0].accepted and not record.drafts[0].accepted


def test_a_document_whose_key_was_done_meanwhile_is_that_one_or_has_failed() -> None:
    first = Outcome("ing_0", "done", 1.0, key="key", sha256="whole", version=1, tokens=3, tokens_seen=3)
    done = replace(having_read(3), outcomes=(first,))
    record, draft = begun(done, key="key")
    writing = Writing(record.head, "sealed", (), 8, num_kept=9)
    outcome = Outcome("ing_1", "done", 2.0, key="key", sha256="whole")
    same = history.seal(record, draft, SEPARATOR, writing, outcome).record
    assert (same.version, same.drafts) == (1, ())
    assert same.outcomes[-1] == replace(first, ingestion="ing_1", created_at=2.0)
    other = history.seal(record, draft, SEPARATOR, writing, replace(outcome, sha256="another")).record
    assert (other.version, other.outcomes[-1].status, other.outcomes[-1].code) == (
        1,
        "failed",
        "idempotency_key_reused",
    )
    assert history.seal(done, Draft("ing_1", "ours", 0.0, 1.0, key="key"), SEPARATOR, writing, outcome).record is done


def test_a_key_is_good_for_what_the_session_has_learnt_and_for_nothing_that_was_taken_back() -> None:
    def learn(record: SessionRecord, key: str) -> SessionRecord:
        writing = Writing(record.head, f"by {key} {record.version}", (1, 2, 3), 8, num_kept=9)
        outcome = Outcome(f"ing_{record.version}", "done", 0.0, key=key)
        return history.seal(
            record, Draft(outcome.ingestion, "server", 1e12, 0.0, key), SEPARATOR, writing, outcome
        ).record

    def keys(record: SessionRecord) -> set[str]:
        again = SessionRecord.from_json(record.to_json(), record.id)
        assert again == record
        return {key for key in "abc" if again.done(key)}

    record = learn(learn(a_session(), "a"), "b")
    assert keys(record) == {"a", "b"}
    back = history.restore(record, 1, "back", num_kept=9).record
    assert keys(back) == {"a"}
    anew = learn(learn(back, "c"), "b")
    assert keys(anew) == {"a", "b", "c"} and anew.tokens_seen == record.tokens_seen + 5
    assert keys(history.restore(anew, 2, "forth", num_kept=9).record) == {"a", "b"}
    assert keys(history.restore(anew, 4, "further", num_kept=9).record) == {"a", "c"}
    assert keys(history.restore(anew, 0, "all", num_kept=9).record) == set()
    writing = Writing(anew.head, "from outside", (), 8, num_kept=9)
    replaced = history.replace_state(anew, writing, Snapshot("blob", "0" * 64, 8, 3)).record
    assert keys(replaced) == set()
    assert keys(learn(replaced, "a")) == {"a"}


def test_a_record_keeps_so_much_and_no_number_twice() -> None:
    record = having_read(2)
    old = replace(Draft("ing_old", "gone", 0.0, 0.0), entries=((record.next_entry, 2),))
    record = replace(record, drafts=(old,), next_entry=record.next_entry + 1)
    for number in range(3):
        before = record.next_entry
        record = history.write(record, Writing(record.head, f"w{number}", (1,), 8, num_kept=2)).record
        assert record.next_entry == before + 1
    assert ([x.number for x in record.versions], record.drafts) == ([3, 4], ())
    restored = history.restore(record, 3, "again", num_kept=2).record
    assert restored.next_entry == record.next_entry, "an older version's entries have lower ones"
    with pytest.raises(Overtaken):
        stale = Writing(record.head, "imported", (), 8, num_kept=2)
        history.replace_state(restored, stale, Snapshot("blob", "0" * 64, 8, 3))
    for number in range(70):
        record = replace(record, drafts=(Draft(f"ing_{number}", "ours", 0.0, 0.0),))
        record = history.end(record, Outcome(f"ing_{number}", "failed", 0.0)).record
    assert [x.ingestion for x in record.outcomes] == [f"ing_{number}" for number in range(6, 70)]


def test_the_end_of_a_log_is_as_few_entries_as_have_the_tokens() -> None:
    entries = ((0, 2), (1, 3), (2, 4))
    for num_tokens, expected in ((0, ()), (4, entries[2:]), (5, entries[1:]), (9, entries)):
        assert history.tail(entries, num_tokens) == expected


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
