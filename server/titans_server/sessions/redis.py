"""Sessions in Redis, shared by any number of servers. As durable as that Redis: see `redis_client.check`."""

import logging
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from titans_server.errors import SessionNotFound, StateCorrupted, StoreUnavailable, VersionConflict
from titans_server.sessions import redis_client, redis_format_1
from titans_server.sessions.record import SessionRecord, moved_on, not_found, swept, taken
from titans_server.sessions.redis_layout import (
    COMMIT,
    CREATE,
    DELETE,
    DUE,
    EXPIRES,
    NOT_DUE,
    UNUSE,
    USE,
    USED,
    blob_keys,
    owner_keys,
    record_fields,
    session_keys,
    sizes_key,
    used_blob,
)
from titans_server.sessions.store import Commit, Usage

T = TypeVar("T")

_log = logging.getLogger(__name__)

_ORPHAN_SECONDS = 3600.0  # what is younger may be another server's, about to be pointed at
_REPLICAS_MS = 3_000  # that replicas may take; less than an answer may
_WORKERS = 32  # operations at once
_READ = ("record", "expires_at", "write_id")


class RedisStore:
    """A store behind one of `redis_client.connect`'s URLs."""

    name = "redis"

    def __init__(self, url: str) -> None:
        """Raises ValueError where the URL makes no sense."""
        _, self._num_replicas = redis_client.without_replicas(url)
        self._run = redis_client.Connections(url, _WORKERS)
        self._client = self._run.client

    async def open(self) -> None:
        """Connect, `check`, and take over what an older server wrote."""
        await self.check()
        await self._run(redis_format_1.take_over(self._client, self._index))

    async def check(self) -> None:
        """Refuse, or warn of, a Redis that may forget sessions."""
        await self._run(redis_client.check(self._client))

    async def create(self, commit: Commit) -> None:
        """Keep a new session."""
        await self._run(self._create(commit))

    async def get(self, session_id: str) -> SessionRecord:
        """The record as of the last commit."""
        return await self._run(self._get(session_id))

    async def commit(self, commit: Commit) -> None:
        """Move a session on by one revision."""
        await self._run(self._commit(commit))

    async def read_log(self, session_id: str, numbers: Sequence[int]) -> Sequence[bytes | None]:
        """Log entries by number."""
        if not numbers:
            return []
        names = [str(number) for number in numbers]
        return list(await self._run(self._client.hmget(session_keys(session_id)[1], names)))

    async def write_blob(self, session_id: str, data: bytes) -> str:
        """Keep a blob, used by its session."""
        return await self._run(self._write_blob(session_id, data))

    async def read_blob(self, name: str) -> bytes | None:
        """A blob."""
        data: bytes | None = await self._run(self._client.get(blob_keys(name)[0]))
        return data

    async def delete(self, session_id: str, write_id: str | None = None) -> None:
        """Forget a session and all that is its alone. Of several at once, each may be told that it is done."""
        await self._run(self._delete(session_id, write_id))

    async def is_listed(self, session_id: str, owner: str) -> bool:
        """Whether a session is the owner's, by the index."""
        return await self._run(self._client.zscore(owner_keys(owner)[0], session_id)) is not None

    async def list(self, owner: str, limit: int, after: str | None = None) -> Sequence[SessionRecord]:
        """An owner's sessions, newest first."""
        return await self._run(self._list(owner, limit, after))

    async def usage(self, owner: str) -> Usage:
        """What the owner's sessions take."""
        return await self._run(self._usage(owner))

    async def due(self) -> Sequence[str]:
        """Sessions with an accepted document that nobody works on."""
        return await self._run(self._due())

    async def sweep(self) -> None:
        """Delete what has expired and what crashes left behind."""
        await self._run(self._sweep())

    async def ping(self) -> None:
        """Ask for an answer."""
        await self._run(self._client.ping())

    async def close(self) -> None:
        """Finish what has begun, then close all connections."""
        await self._run.close()

    async def _create(self, commit: Commit) -> None:
        record = commit.record
        for name in record.snapshots():
            if not await self._client.eval(USE, 2, *blob_keys(name), record.id, time.time()):
                raise VersionConflict(f"a snapshot for session {record.id} is there no more")
        await self._index(record)
        entries = [x for entry in commit.append.items() for x in entry]
        kept = await self._write(CREATE, session_keys(record.id), *record_fields(record), *entries)
        if SessionRecord.from_json(kept, record.id) != record:
            raise taken(record.id)
        for name in record.snapshots():
            if not await self._client.eval(USED, 1, blob_keys(name)[1], record.id, time.time()):
                await self._remove(record)
                raise VersionConflict(f"a snapshot for session {record.id} is there no more")

    async def _get(self, session_id: str) -> SessionRecord:
        text, expires_at, _ = await self._read(session_id)
        if text is None or expires_at <= time.time():
            raise not_found(session_id)
        return SessionRecord.from_json(text, session_id)

    async def _read(self, session_id: str) -> tuple[bytes | None, float, bytes | None]:
        """The text of the record, which a script wrote together with when the session is gone, and the last commit."""
        text, expires_at, write_id = await self._client.hmget(session_keys(session_id)[0], _READ)
        return text, float(expires_at or "inf"), write_id

    async def _commit(self, commit: Commit) -> None:
        record = commit.record
        if record.due_at is not None:
            await self._client.zadd(DUE, {record.id: record.due_at})
        entries = [x for entry in commit.append.items() for x in entry]
        fields = (*record_fields(record), time.time(), len(commit.append), record.id, commit.replaces)
        keys = (*session_keys(record.id), *(blob_keys(name)[1] for name in commit.point))
        revision, write_id = await self._write(COMMIT, keys, *fields, *entries, *commit.drop)
        if revision is None:
            raise not_found(record.id)
        if write_id is None:
            raise swept(record.id)
        record.is_replaced_at(int(revision), write_id.decode(), commit.replaces)
        await self._settle(record, commit.release)

    async def _settle(self, record: SessionRecord, release: Iterable[str]) -> None:
        """What follows a commit, which is done, whatever becomes of this.

        Where Redis fails now, as when it is full, the sizes are those of the commit before, and blobs are swept later.
        """
        try:
            await self._unuse(record.id, release)
            await self._index_newest(record)
        except (*redis_client.FAILURES, StateCorrupted) as error:
            _log.warning("the index has not followed the last commit of session %s: %r", record.id, error)

    async def _write(self, script: str, keys: Sequence[str], *values: object) -> Any:
        """Run a script; return when so many replicas as are asked for have what it wrote."""
        if not self._num_replicas:
            return await self._client.eval(script, len(keys), *keys, *values)
        async with self._client.pipeline(transaction=False) as pipe:  # WAIT is about its own connection's writes
            pipe.eval(script, len(keys), *keys, *values)
            pipe.execute_command("WAIT", self._num_replicas, _REPLICAS_MS)
            result, num_replicas = await pipe.execute()
        if num_replicas < self._num_replicas:
            raise StoreUnavailable(f"the Redis store has {num_replicas} of {self._num_replicas} replicas that follow")
        return result

    async def _write_blob(self, session_id: str, data: bytes) -> str:
        name = f"{session_id}/{uuid.uuid4().hex}"
        blob, uses = blob_keys(name)
        await self._client.hset(uses, session_id, str(time.time()))  # first: a blob without it would stay for ever
        await self._client.set(blob, data)
        return name

    async def _delete(self, session_id: str, write_id: str | None) -> None:
        try:
            record = await self._get(session_id)
        except StateCorrupted:
            if write_id is not None:
                raise
            return await self._remove_unreadable(session_id)
        await self._remove(record, write_id)

    async def _remove(self, record: SessionRecord, write_id: str | bytes | None = None) -> None:
        await self._drop(record.id, write_id)
        await self._unuse(record.id, record.snapshots())
        await self._unindex(record.id, owner_keys(record.owner)[0])

    async def _remove_unreadable(self, session_id: str, write_id: bytes | None = None) -> None:
        """What the record would have named is looked for. A blob that another session wrote is left to the sweep."""
        await self._drop(session_id, write_id)
        async for key in self._client.scan_iter(match=f"titans:{{{session_id}}}:uses:*", count=1000):
            await self._unuse(session_id, [used_blob(key.decode())])
        async for key in self._client.scan_iter(match="titans:{owner:*}:sessions", count=1000):
            await self._unindex(session_id, key.decode())

    async def _drop(self, session_id: str, write_id: str | bytes | None = None) -> None:
        """Take away what was there a moment ago.

        Where it is gone by now, that is as good: redis-py asks again when a reply is lost, and the rest is still to go.
        """
        at = () if write_id is None else (write_id,)
        if await self._client.eval(DELETE, 2, *session_keys(session_id), *at) < 0:
            raise moved_on(session_id)

    async def _unuse(self, session_id: str, names: Iterable[str]) -> None:
        for name in names:
            await self._client.eval(UNUSE, 2, *blob_keys(name), session_id)

    async def _index(self, record: SessionRecord) -> None:
        sessions, sizes = owner_keys(record.owner)
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.zadd(sessions, {record.id: record.created_at})
            pipe.hset(sizes, record.id, str(record.stored_bytes))
            if record.expires_at is not None:
                pipe.zadd(EXPIRES, {record.id: record.expires_at})
            await pipe.execute()

    async def _index_newest(self, record: SessionRecord) -> None:
        """Index a commit, or what came after it: the session may have moved on, or be gone, and that be indexed first.

        Whoever is the last to write to the index looks at the session afterwards, so that the two agree in the end.
        """
        await self._index(record)
        key = session_keys(record.id)[0]
        while await self._client.hget(key, "write_id") != record.write_id.encode():
            text = await self._client.hget(key, "record")
            if text is None:
                return await self._unindex(record.id, owner_keys(record.owner)[0])
            record = SessionRecord.from_json(text, record.id)
            await self._index(record)

    async def _unindex(self, session_id: str, sessions: str) -> None:
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.zrem(sessions, session_id)
            pipe.hdel(sizes_key(sessions), session_id)
            pipe.zrem(DUE, session_id)
            pipe.zrem(EXPIRES, session_id)
            await pipe.execute()

    async def _list(self, owner: str, limit: int, after: str | None) -> Sequence[SessionRecord]:
        key = owner_keys(owner)[0]
        start, records = 0, dict[str, SessionRecord]()
        if after is not None:
            rank = await self._client.zrevrank(key, after)
            if rank is None:
                raise not_found(after)
            start = rank + 1
        while len(records) < limit:
            names = [name.decode() for name in await self._client.zrevrange(key, start, start + limit - 1)]
            records |= {record.id: record for record in await self._readable(names)}
            start += limit
            if len(names) < limit:
                break
        return tuple(records.values())[:limit]

    async def _find(self, session_id: str) -> SessionRecord | None:
        try:
            return await self._get(session_id)
        except SessionNotFound:
            return None

    async def _readable(self, session_ids: Sequence[str]) -> Sequence[SessionRecord]:
        """The records of those that are there, but for what cannot be read."""
        async with self._client.pipeline(transaction=False) as pipe:  # one connection a node, however many they are
            for session_id in session_ids:
                pipe.hmget(session_keys(session_id)[0], _READ)
            found = await pipe.execute()
        records, now = [], time.time()
        for session_id, (text, expires_at, _) in zip(session_ids, found, strict=True):
            if text is None or float(expires_at or "inf") <= now:
                continue
            try:
                records.append(SessionRecord.from_json(text, session_id))
            except StateCorrupted as error:
                _log.warning("session %s is left out of a list: %s", session_id, error.message)
        return records

    async def _usage(self, owner: str) -> Usage:
        now, sizes = time.time(), await self._client.hgetall(owner_keys(owner)[1])
        expired = sizes.keys() & set(await self._client.zrangebyscore(EXPIRES, 0, now))
        for name in expired:  # the index may be older than the session's last commit
            if (await self._read(name.decode()))[1] <= now:
                del sizes[name]
        return Usage(len(sizes), sum(map(int, sizes.values())))

    async def _due(self) -> Sequence[str]:
        now, found = time.time(), []
        for name, score in await self._client.zrangebyscore(DUE, 0, now, withscores=True):
            try:
                record = await self._find(name.decode())
            except StateCorrupted:
                found.append(name.decode())  # whoever goes on with it will say so
                continue
            if record is None or record.due_at is None:
                await self._client.eval(NOT_DUE, 1, DUE, name, score)
            elif record.due_at < now:
                found.append(record.id)
        return found

    async def _sweep(self) -> None:
        now = time.time()
        for name in await self._client.zrangebyscore(EXPIRES, 0, now):
            await self._sweep_session(name.decode(), now)
        async for key in self._client.scan_iter(match="titans:*:uses:*", count=1000):
            await self._sweep_blob(key.decode(), now)
        async for key in self._client.scan_iter(match="titans:{owner:*}:sessions", count=1000):
            await self._sweep_index(key, now)

    async def _sweep_session(self, session_id: str, now: float) -> None:
        text, expires_at, write_id = await self._read(session_id)
        if text is None:
            await self._client.zrem(EXPIRES, session_id)
        elif expires_at <= now:
            with suppress(VersionConflict):  # of a commit that came between, as its server's clock allowed
                try:
                    await self._remove(SessionRecord.from_json(text, session_id), write_id)
                except StateCorrupted:
                    await self._remove_unreadable(session_id, write_id)

    async def _sweep_blob(self, uses: str, now: float) -> None:
        """Take away what a crash left: a use by a session that does not point at the blob."""
        name = used_blob(uses)
        for session_id, since in (await self._client.hgetall(uses)).items():
            if float(since) < now - _ORPHAN_SECONDS:
                try:
                    record = await self._find(session_id.decode())
                except StateCorrupted:
                    continue  # what cannot be read may point at it
                if record is None or name not in record.snapshots():
                    await self._client.eval(UNUSE, 2, *blob_keys(name), session_id, since)

    async def _sweep_index(self, key: bytes, now: float) -> None:
        for name in await self._client.zrangebyscore(key, 0, now - _ORPHAN_SECONDS):
            if not await self._client.exists(session_keys(name.decode())[0]):
                await self._client.zrem(key, name)
                await self._client.hdel(sizes_key(key.decode()), name)
