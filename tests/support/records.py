"""Sessions as a store is given them: records, and the commits that move them on."""

import hashlib
import os
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from titans_server.sessions.record import SessionRecord, Snapshot, Version
from titans_server.sessions.store import Commit, SessionStore

STATE = os.urandom(1 << 20)  # of a session that tests share: as its snapshot


def a_session(**fields: Any) -> SessionRecord:
    """A session that has read nothing."""
    record = SessionRecord(
        id=f"ses_{uuid.uuid4().hex}",
        model="tiny",
        fingerprint="f" * 32,
        created_at=1760000000.123456,
        updated_at=1760000000.123456,
        versions=(Version(0, 0, 1760000000.123456, secrets.token_hex(8)),),
    )
    return replace(record, **fields)


def moved(record: SessionRecord, append: Mapping[int, bytes] | None = None, **fields: Any) -> Commit:
    """The commit that brings a session to its next revision: what is pointed at no more goes."""
    after = replace(record, revision=record.revision + 1, write_id=uuid.uuid4().hex, **fields)
    drop = frozenset(record.entries() - after.entries())
    release, point = record.snapshots().keys() - after.snapshots(), after.snapshots().keys() - record.snapshots()
    return Commit(after, append or {}, drop, frozenset(release), frozenset(point), record.write_id)


def logged(record: SessionRecord, data: bytes, tokens: int = 7) -> Commit:
    """The commit that makes a version with one more log entry."""
    number = record.next_entry
    entries = (*record.head.entries, (number, tokens))
    version = replace(
        record.head,
        number=record.version + 1,
        tokens=record.tokens_seen + tokens,
        write_id=uuid.uuid4().hex,
        entries=entries,
    )
    return moved(record, {number: data}, versions=(*record.versions, version), next_entry=number + 1)


async def with_snapshot(store: SessionStore, record: SessionRecord, blob: bytes, *, alone: bool = True) -> Commit:
    """The commit that makes a version with a snapshot, which is written; `alone`: older versions are not kept."""
    name = await store.write_blob(record.id, blob)
    snapshot = Snapshot(name, hashlib.sha256(blob).hexdigest(), len(blob), record.tokens_seen + 1)
    version = Version(record.version + 1, snapshot.tokens, 1760000001.5, uuid.uuid4().hex, snapshot)
    return moved(record, versions=(version,) if alone else (*record.versions, version))


async def made(store: SessionStore, **fields: Any) -> SessionRecord:
    """A session that the store has."""
    record = a_session(**fields)
    await store.create(Commit(record))
    return record


async def made_with_snapshot(store: SessionStore, blob: bytes = b"first") -> SessionRecord:
    """A session whose one version has a snapshot."""
    commit = await with_snapshot(store, await made(store), blob)
    await store.commit(commit)
    return commit.record


async def snapshot_of(store: SessionStore, record: SessionRecord) -> bytes | None:
    """What the store has as the newest version's snapshot."""
    assert record.head.snapshot is not None
    return await store.read_blob(record.head.snapshot.blob)
