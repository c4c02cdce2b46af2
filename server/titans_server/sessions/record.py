"""What is written down of a session, but for its tokens and states, to which this points.

A state is a function of the tokens read. A session is therefore its LOG of tokens, in numbered entries that never
change, and SNAPSHOTS of states, blobs that never change. A version names a snapshot and the entries that follow it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from titans_server.errors import SessionNotFound, StateCorrupted, StoreUnavailable, VersionConflict, VersionNotFound

FORMAT = 2  # of the JSON; 1 had one state a session and no log (`from_format_1`)

Entries = tuple[tuple[int, int], ...]  # log entries in the order of reading: number, tokens in it


@dataclass(frozen=True)
class Snapshot:
    """A state that is stored."""

    blob: str  # its name in the store
    sha256: str  # of the blob, lower-case hexadecimal
    num_bytes: int
    tokens: int  # that the state has read


@dataclass(frozen=True)
class Version:
    """A session as it was after a write: the snapshot's state after reading the last of the entries' tokens."""

    number: int
    tokens: int  # read by the session, all in all
    created_at: float  # seconds since the epoch
    write_id: str  # of this version and no other of any session
    snapshot: Snapshot | None = None  # None: a state that has read nothing
    entries: Entries = ()
    undone: tuple[int, ...] = ()  # versions before it, made of documents that it has not read: they were taken back

    @property
    def num_to_replay(self) -> int:
        """Tokens at the end of `entries` that the snapshot has not read."""
        return self.tokens - (self.snapshot.tokens if self.snapshot else 0)


@dataclass(frozen=True)
class Draft:
    """A document on its way in: what of it is durable. No version has it yet."""

    ingestion: str
    server: str  # that works on it
    lease_until: float  # seconds since the epoch; until then no other server touches it, to save work and no more
    created_at: float
    key: str = ""  # the client's Idempotency-Key
    is_async: bool = False  # it is learnt when all of it is here; otherwise as it comes
    if_match: int | None = None  # the version that it is to follow, where the client says
    entries: Entries = ()  # the first one is the separator, which stands between two documents
    tokens: int = 0  # of the document in the entries, without the separator
    num_bytes: int = 0  # of its text that these tokens stand for
    sha256: str = ""  # of these bytes
    accepted: bool = False  # all of it is here and the client was told so: somebody finishes it, whatever happens
    snapshot: Snapshot | None = None  # of a state that has read some of it
    base: int = 0  # the version that state began from


@dataclass(frozen=True)
class Outcome:
    """What became of a document."""

    ingestion: str
    status: Literal["done", "failed", "cancelled"]
    created_at: float  # of the document, as in its draft
    key: str = ""
    sha256: str = ""  # of the whole text; empty where that is not known
    version: int = 0  # that it made, where it is done
    tokens: int = 0
    num_bytes: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    code: str = ""  # of the error, where it has failed
    message: str = ""


@dataclass(frozen=True)
class Parent:
    """What a session was forked from."""

    session: str
    version: int


@dataclass(frozen=True)
class SessionRecord:
    """All of it. Every commit replaces the record by another, whose revision is one higher."""

    id: str
    model: str
    fingerprint: str  # of the model that made the states
    created_at: float  # seconds since the epoch
    updated_at: float  # when the newest version was made
    versions: tuple[Version, ...]  # those that are kept, oldest first; the last one is the session's
    revision: int = 0  # commits so far of any kind: what fences writers off
    write_id: str = ""  # of the last commit; every commit has another
    next_entry: int = 0  # number of the log's next entry: no number is used twice
    owner: str = ""  # "": nobody in particular
    ttl_seconds: int | None = None  # after the newest version; None: kept until it is deleted
    state_bytes: int = 0  # of its state in memory; 0: it has read nothing
    drafts: tuple[Draft, ...] = ()  # in the order in which they came
    outcomes: tuple[Outcome, ...] = ()  # the newest last
    parent: Parent | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def head(self) -> Version:
        """The newest version."""
        return self.versions[-1]

    @property
    def version(self) -> int:
        """The newest version's number: writes so far."""
        return self.head.number

    @property
    def tokens_seen(self) -> int:
        """By the newest version."""
        return self.head.tokens

    @property
    def expires_at(self) -> float | None:
        """When the session is gone, seconds since the epoch."""
        return None if self.ttl_seconds is None else self.updated_at + self.ttl_seconds

    def is_expired(self, now: float) -> bool:
        """Whether the session is gone, at a time in seconds since the epoch."""
        return self.expires_at is not None and self.expires_at <= now

    def snapshots(self) -> dict[str, Snapshot]:
        """All that it points to, by the names of their blobs."""
        return {part.snapshot.blob: part.snapshot for part in self._parts() if part.snapshot}

    def entries(self) -> set[int]:
        """The numbers of all the log entries that it points to."""
        return {number for part in self._parts() for number, _ in part.entries}

    def dropped_since(self, older: "SessionRecord") -> frozenset[int]:
        """The numbers of the log entries that an older record points at and this one does not."""
        ours = [part.entries for part in self._parts()]
        if all(any(each[: len(part.entries)] == part.entries for each in ours) for part in older._parts()):
            return frozenset()  # as with every append: to look at each number would take longer the more there are
        return frozenset(older.entries() - self.entries())

    def _parts(self) -> "list[Version | Draft]":
        return [*self.versions, *self.drafts]

    @property
    def stored_bytes(self) -> int:
        """What it takes in the store: snapshots, also those it shares with forks, and the log that is kept."""
        log = {number: tokens for part in self._parts() for number, tokens in part.entries}
        return sum(x.num_bytes for x in self.snapshots().values()) + 4 * sum(log.values())

    @property
    def due_at(self) -> float | None:
        """When somebody else has to finish an accepted document unless its server does; None: there is none."""
        return min((draft.lease_until for draft in self.drafts if draft.accepted), default=None)

    def draft(self, ingestion: str) -> Draft | None:
        """The document under way that has this id."""
        return next((x for x in self.drafts if x.ingestion == ingestion), None)

    def outcome(self, ingestion: str) -> Outcome | None:
        """What became of the document that had this id."""
        return next((x for x in self.outcomes if x.ingestion == ingestion), None)

    def done(self, key: str) -> Outcome | None:
        """What was learnt under an Idempotency-Key, and not taken back; None for none, and where there is no key."""
        return next((x for x in self.learnt() if key and x.key == key and x.version not in self.head.undone), None)

    def learnt(self) -> "list[Outcome]":
        """The documents that were, also those that were taken back."""
        return [x for x in self.outcomes if x.status == "done"]

    def kept(self, number: int) -> Version:
        """One of the versions. Raises VersionNotFound where it is kept no more, or never was."""
        for version in self.versions:
            if version.number == number:
                return version
        kept = f"{self.versions[0].number} to {self.version}"
        raise VersionNotFound(f"session {self.id} has no version {number}: kept are {kept}", param="version")

    def made_by(self, write_id: str) -> Version | None:
        """The version that a write made, where it is still kept."""
        return next((x for x in self.versions if x.write_id == write_id), None)

    def to_json(self) -> str:
        """ASCII; `from_json` reads it back, equal.

        Written with every commit, and as long as a document under way has entries: so nothing of it is copied before.
        """
        fields = vars(self) | {"metadata": dict(self.metadata), "format": FORMAT}
        return json.dumps(fields, separators=(",", ":"), default=_told)

    @classmethod
    def from_json(cls, text: str | bytes, session_id: str) -> "SessionRecord":
        """The inverse of `to_json`. Raises StateCorrupted where the text is nothing that it wrote for this session."""
        try:
            fields = json.loads(text)
            found = fields.pop("format", 1)
            if found != FORMAT:
                raise StateCorrupted(f"a session record has format {found}; this server reads {FORMAT}")
            fields["versions"] = tuple(
                _pointing(Version, x | {"undone": tuple(x.get("undone", ()))}) for x in fields["versions"]
            )
            fields["drafts"] = tuple(_pointing(Draft, x) for x in fields["drafts"])
            fields["outcomes"] = tuple(Outcome(**x) for x in fields["outcomes"])
            fields["parent"] = fields["parent"] and Parent(**fields["parent"])
            record = cls(**fields)
            if not record.versions:
                raise ValueError("no version")
            if record.id != session_id:
                raise ValueError("another session's")
            return record
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise StateCorrupted("the store holds a session record that cannot be read") from error

    def is_replaced_at(self, revision: int, write_id: str, replaces: str) -> bool:
        """Whether a session that stands at `revision`, made by `write_id`, is still to be moved to this record.

        False where this very commit is done already. Raises VersionConflict where the session is not at the
        revision before, as `replaces` left it.
        """
        assert self.revision > 0
        assert self.write_id
        if (revision, write_id) == (self.revision, self.write_id):
            return False
        if (revision, write_id) != (self.revision - 1, replaces):
            raise moved_on(self.id)
        return True


def from_format_1(text: str | bytes, blob: str) -> SessionRecord:
    """A record of format 1, whose state is in `blob` now. Raises StateCorrupted."""
    try:
        old: dict[str, Any] = json.loads(text)
        snapshot = None
        if old["version"]:
            snapshot = Snapshot(blob, old["state_sha256"], old["state_bytes"], old["tokens_seen"])
        head = Version(old["version"], old["tokens_seen"], old["updated_at"], old["write_id"] or old["id"], snapshot)
        same = {name: old[name] for name in ("id", "model", "fingerprint", "created_at", "updated_at", "metadata")}
        same |= {"owner": old.get("owner", ""), "write_id": old["write_id"], "state_bytes": old["state_bytes"]}
        return SessionRecord(**same, versions=(head,))
    except (ValueError, TypeError, KeyError) as error:
        raise StateCorrupted("the store holds a session record of format 1 that cannot be read") from error


def not_found(session_id: str) -> SessionNotFound:
    """The error for a session that the store does not have."""
    return SessionNotFound(f"no session {session_id}")


def moved_on(session_id: str) -> VersionConflict:
    """The error for a session whose last commit is another than was thought."""
    return VersionConflict(f"session {session_id} has moved on")


def taken(session_id: str) -> VersionConflict:
    """The error for a new session whose id another one has."""
    return VersionConflict(f"there is a session {session_id} already")


def swept(session_id: str) -> StoreUnavailable:
    """The error for a commit that points at a blob which is there no more."""
    return StoreUnavailable(f"a snapshot of session {session_id} was swept before it was used")


def _told(part: Any) -> dict[str, Any]:
    """Without what a server before would not know, where it says nothing."""
    return {name: x for name, x in vars(part).items() if x or name != "undone"}


def _pointing(kind: type[Any], fields: dict[str, Any]) -> Any:
    """A version or a draft: what JSON makes lists and dictionaries of, as it was."""
    snapshot = fields["snapshot"] and Snapshot(**fields["snapshot"])
    entries = tuple((number, tokens) for number, tokens in fields["entries"])
    return kind(**fields | {"snapshot": snapshot, "entries": entries})
