"""How a session's record changes. Pure: a record in, another one out, with the log entries that go with it.

Every edit may be made again on a newer record, since a commit that lost a race is made again: it recognizes what is
done already, and raises where what it stands on is gone.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from titans_server.errors import IngestionCancelled, IngestionNotFound, KeyReused, SessionBusy, VersionConflict
from titans_server.sessions.log import pack
from titans_server.sessions.record import Draft, Entries, Outcome, SessionRecord, Snapshot, Version

LEASE_SECONDS = 3.0
KEY_REUSED = "the Idempotency-Key was used for another document"
_KEPT_OUTCOMES = 64
_KEPT_DRAFT_SECONDS = 3600.0  # after its server was last heard of, where its key lets somebody go on with it
_KEPT_KEYLESS_SECONDS = 600.0  # where nobody can: long enough for a server that stands still, or clocks that disagree
_MAX_DRAFTS = 16


class Overtaken(VersionConflict):
    """Another version came first; what was learnt stands on the one before."""


@dataclass(frozen=True)
class Edit:
    """A record as it is to be; the same one where nothing is left to do."""

    record: SessionRecord
    append: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Portion:
    """Some of a document: its next tokens, and how far the text goes with them."""

    tokens: Sequence[int]
    num_bytes: int  # of the text up to and with these tokens
    sha256: str  # of these bytes
    is_last: bool = False


def append(record: SessionRecord, draft: Draft, separator: Sequence[int], portion: Portion) -> Edit:
    """Add a portion to a draft, which is begun where the record has none. `draft` is as its writer knows it.

    The last portion makes it an accepted one: what is to be sealed by its writer is not appended.
    Raises IngestionCancelled, VersionConflict where another server goes on with it, SessionBusy where too many are
    under way.
    """
    found = record.draft(draft.ingestion)
    after = replace(
        draft,
        tokens=draft.tokens + len(portion.tokens),
        num_bytes=portion.num_bytes,
        sha256=portion.sha256,
        accepted=portion.is_last,
        lease_until=time.time() + LEASE_SECONDS,
    )
    if found is not None and _what_is_here(found) == _what_is_here(after):
        return Edit(record)
    _check_draft(record, draft, found)
    number, log = record.next_entry, dict[int, bytes]()
    entries: Entries = ()
    for tokens in ([] if found else [separator]) + ([portion.tokens] if portion.tokens else []):
        log[number] = pack(number, tokens)
        entries += ((number, len(tokens)),)
        number += 1
    if found is None:
        drafts = (*_living(record.drafts), replace(after, entries=entries))
        if len(drafts) > _MAX_DRAFTS:
            raise SessionBusy(f"{_MAX_DRAFTS} documents are under way to session {record.id}")
    else:
        after = replace(after, entries=found.entries + entries, snapshot=found.snapshot, base=found.base)
        drafts = _with(record.drafts, after)
    return Edit(replace(record, drafts=drafts, next_entry=number), log)


def take(record: SessionRecord, ingestion: str, server: str) -> Edit:
    """Hold a draft, whoever held it before. Raises IngestionCancelled. One that is not there needs no lease."""
    return _held(record, ingestion, server, LEASE_SECONDS)


def renew(record: SessionRecord, ingestion: str, server: str, seconds: float = LEASE_SECONDS) -> Edit:
    """Hold a draft for a while longer, where it is still the server's own; 0 seconds: let go of it.

    Raises IngestionCancelled. A draft that is not there needs no lease.
    """
    draft = record.draft(ingestion)
    if draft and (draft.server != server or (not seconds and draft.lease_until <= time.time())):
        return Edit(record)
    return _held(record, ingestion, server, seconds)


def checkpoint(record: SessionRecord, draft: Draft, base: Version, snapshot: Snapshot | None) -> Edit:
    """Remember the state of a draft that is half learnt; None: no longer. `draft` is as its writer knows it.

    Raises Overtaken, IngestionCancelled, VersionConflict where the log has not what the writer has learnt of it.
    """
    base = _standing(record, base)
    found = record.draft(draft.ingestion)
    if found is None:
        raise _cancelled(draft.ingestion)
    _check_log(draft, found)
    kept = replace(found, snapshot=snapshot, base=base.number, lease_until=time.time() + LEASE_SECONDS)
    return Edit(replace(record, drafts=_with(record.drafts, kept)))


@dataclass(frozen=True)
class Writing:
    """A version that is to be: what is read on top of another one."""

    base: Version
    write_id: str
    tokens: Sequence[int]  # that no draft holds
    state_bytes: int
    num_kept: int  # versions


def write(record: SessionRecord, writing: Writing) -> Edit:
    """A version that has read some more tokens. Raises Overtaken."""
    if record.made_by(writing.write_id):
        return Edit(record)
    base = _standing(record, writing.base)
    log, entries = _entry(record, writing.tokens)
    version = _next(record, writing.write_id, base.tokens + len(writing.tokens), base.snapshot, base.entries + entries)
    return Edit(_advanced(record, version, writing), log)


def seal(record: SessionRecord, draft: Draft, separator: Sequence[int], writing: Writing, outcome: Outcome) -> Edit:
    """A version that has read a whole document: what of it is in the draft, and `writing.tokens`.

    `outcome` lacks what only the version tells. No version is made where the document has an outcome already, by its
    id or by its key. Raises Overtaken, IngestionCancelled where the draft is gone, VersionConflict where the log has
    not what its writer has learnt of it.
    """
    if record.outcome(draft.ingestion) is not None:
        return discard(record, draft.ingestion)
    found = record.draft(draft.ingestion)
    if (first := record.done(draft.key)) is not None:
        rest = discard(record, draft.ingestion).record
        return Edit(record if found is None else _ended(rest, _second(outcome, first)))
    if found is None and draft.entries:
        raise _cancelled(draft.ingestion)
    if found is not None:
        _check_log(draft, found)
    base = _standing(record, writing.base)
    ours = found.entries if found else ()
    num_tokens = (found.tokens if found else 0) + len(writing.tokens)
    unlogged = list(writing.tokens)
    if base.tokens:
        num_tokens += len(separator)
        unlogged = unlogged if found else [*separator, *unlogged]
    else:
        ours = ours[1:]
    log, entries = _entry(record, unlogged)
    tokens, snapshot, entries = base.tokens + num_tokens, base.snapshot, base.entries + ours + entries
    if found and found.snapshot and found.base == base.number:
        snapshot = found.snapshot
        entries = tail(entries, tokens - snapshot.tokens)
    version = _next(record, writing.write_id, tokens, snapshot, entries)
    record = replace(record, drafts=tuple(x for x in record.drafts if x is not found))
    outcome = replace(outcome, version=version.number, tokens=num_tokens, tokens_seen=tokens)
    return Edit(_ended(_advanced(record, version, writing), outcome), log)


def end(record: SessionRecord, outcome: Outcome) -> Edit:
    """A document that will not be learnt. Raises IngestionNotFound where it is neither under way nor ended.

    Of `outcome` no more is taken than why: the draft tells the rest.
    """
    if record.outcome(outcome.ingestion) is not None:
        return Edit(record)
    draft = record.draft(outcome.ingestion)
    if draft is None:
        raise IngestionNotFound(f"no ingestion {outcome.ingestion}")
    outcome = replace(
        outcome, created_at=draft.created_at, key=draft.key, tokens=draft.tokens, num_bytes=draft.num_bytes
    )
    record = replace(record, drafts=tuple(x for x in record.drafts if x is not draft))
    return Edit(_ended(record, outcome))


def discard(record: SessionRecord, ingestion: str) -> Edit:
    """Forget a draft that nobody will go on with."""
    rest = tuple(x for x in record.drafts if x.ingestion != ingestion)
    return Edit(record if rest == record.drafts else replace(record, drafts=rest))


def lacking(record: SessionRecord, version: Version, *, is_recent: bool = False) -> Version | None:
    """A version as it is now, where a snapshot of its own would be of use: see `attach`."""
    kept = record.made_by(version.write_id) or (version if is_recent else None)
    return kept if kept and kept.num_to_replay and _goes_on(record.head, kept) else None


def attach(record: SessionRecord, version: Version, snapshot: Snapshot, *, is_recent: bool = False) -> Edit:
    """Give a version a snapshot of its own, from which those that go on from it begin as well.

    Nothing to do where the newest does not, nor where the version is kept no more; unless it `is_recent`: it was made a
    moment ago, so that the numbers of its entries cannot have come to stand for others, in a store that lost commits.
    """
    kept = lacking(record, version, is_recent=is_recent)
    if kept is None:
        return Edit(record)
    version, num_read = kept, len(kept.entries)
    begun = (
        replace(x, snapshot=snapshot, entries=x.entries[num_read:]) if _goes_on(x, version) else x
        for x in record.versions
    )
    return Edit(replace(record, versions=tuple(begun)))


def restore(record: SessionRecord, number: int, write_id: str, num_kept: int) -> Edit:
    """A new version that is what an older one was: what it had not read is learnt anew. Raises VersionNotFound."""
    if record.made_by(write_id):
        return Edit(record)
    old = record.kept(number)
    undone = tuple(x.version for x in record.learnt() if x.version > number or x.version in old.undone)
    version = replace(_next(record, write_id, old.tokens, old.snapshot, old.entries), undone=undone)
    return Edit(_advanced(record, version, Writing(record.head, write_id, (), record.state_bytes, num_kept)))


def replace_state(record: SessionRecord, writing: Writing, snapshot: Snapshot) -> Edit:
    """A new version whose state came from outside: what was learnt before is learnt anew. Raises Overtaken."""
    if record.made_by(writing.write_id):
        return Edit(record)
    _standing(record, writing.base)
    version = _next(record, writing.write_id, snapshot.tokens, snapshot, ())
    version = replace(version, undone=tuple(x.version for x in record.learnt()))
    return Edit(_advanced(record, version, writing))


def tail(entries: Entries, num_tokens: int) -> Entries:
    """The last entries, as few as have that many tokens."""
    start = len(entries)
    while num_tokens > 0 and start:
        start -= 1
        num_tokens -= entries[start][1]
    return entries[start:]


def _next(record: SessionRecord, write_id: str, tokens: int, snapshot: Snapshot | None, entries: Entries) -> Version:
    return Version(record.version + 1, tokens, time.time(), write_id, snapshot, entries, record.head.undone)


def _advanced(record: SessionRecord, version: Version, writing: Writing) -> SessionRecord:
    """The record at its next version, without what is kept no longer."""
    return replace(
        record,
        versions=(*record.versions, version)[-writing.num_kept :],
        updated_at=version.created_at,
        next_entry=max([record.next_entry, *(number + 1 for number, _ in version.entries)]),
        state_bytes=writing.state_bytes,
        drafts=_living(record.drafts),
    )


def _ended(record: SessionRecord, outcome: Outcome) -> SessionRecord:
    return replace(record, outcomes=(*record.outcomes, outcome)[-_KEPT_OUTCOMES:])


def _second(outcome: Outcome, first: Outcome) -> Outcome:
    """What becomes of a document whose key was used for another one, on another server, which was learnt first."""
    if outcome.sha256 == first.sha256:
        return replace(first, ingestion=outcome.ingestion, created_at=outcome.created_at)
    return replace(outcome, status="failed", code=KeyReused.default_code, message=KEY_REUSED)


def _entry(record: SessionRecord, tokens: Sequence[int]) -> tuple[dict[int, bytes], Entries]:
    number = record.next_entry
    return ({number: pack(number, tokens)}, ((number, len(tokens)),)) if tokens else ({}, ())


def _living(drafts: tuple[Draft, ...]) -> tuple[Draft, ...]:
    now = time.time()
    return tuple(
        x
        for x in drafts
        if x.accepted or x.lease_until > now - (_KEPT_DRAFT_SECONDS if x.key else _KEPT_KEYLESS_SECONDS)
    )


def _what_is_here(draft: Draft) -> tuple[int, int, str, bool]:
    return draft.tokens, draft.num_bytes, draft.sha256, draft.accepted


def _goes_on(version: Version, older: Version) -> bool:
    """Whether a version has read what an older one has, and then more or nothing."""
    return version.snapshot == older.snapshot and version.entries[: len(older.entries)] == older.entries


def _with(drafts: tuple[Draft, ...], changed: Draft) -> tuple[Draft, ...]:
    return tuple(changed if x.ingestion == changed.ingestion else x for x in drafts)


def _standing(record: SessionRecord, base: Version) -> Version:
    """The newest version, where it still is `base`, as it is now: it may have got a snapshot, and its log be gone."""
    if record.head.write_id != base.write_id:
        raise Overtaken(f"session {record.id} has moved on from version {base.number}")
    return record.head


def _held(record: SessionRecord, ingestion: str, server: str, seconds: float) -> Edit:
    draft = record.draft(ingestion)
    if draft is None:
        outcome = record.outcome(ingestion)
        if outcome is not None and outcome.status == "cancelled":
            raise _cancelled(ingestion)
        return Edit(record)
    held = replace(draft, server=server, lease_until=time.time() + seconds)
    return Edit(replace(record, drafts=_with(record.drafts, held)))


def _check_draft(record: SessionRecord, draft: Draft, found: Draft | None) -> None:
    if found is None:
        if draft.entries or record.outcome(draft.ingestion) is not None:
            raise _cancelled(draft.ingestion)
    elif (found.tokens, found.server) != (draft.tokens, draft.server):
        raise _goes_on_elsewhere(draft)


def _check_log(draft: Draft, found: Draft) -> None:
    """Raise unless the log has of a document what its writer thinks: others append, and a failover loses appends."""
    if (found.tokens, found.sha256) != (draft.tokens, draft.sha256):
        raise _goes_on_elsewhere(draft)


def _goes_on_elsewhere(draft: Draft) -> VersionConflict:
    return VersionConflict(f"another server goes on with the document {draft.ingestion}")


def _cancelled(ingestion: str) -> IngestionCancelled:
    return IngestionCancelled(f"ingestion {ingestion} was cancelled")
