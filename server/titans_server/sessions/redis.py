"""Sessions in Redis, shared by any number of servers. As durable as that Redis: see `RedisStore.check`.

Both keys of a session carry its id as a hash tag, so that a cluster keeps them on one node and one script may
touch both:

    titans:{<id>}:record    a hash: version and write_id, which the scripts compare, and record, as JSON
    titans:{<id>}:state     the state of that version
"""

import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff

from titans_server.errors import StoreUnavailable
from titans_server.sessions.store import SessionRecord, not_found, taken
from titans_server.sessions.uncancelled import Uncancelled

T = TypeVar("T")

_log = logging.getLogger(__name__)

# Redis runs a script alone and whole. One that starts short of memory is refused at its first write.
_CREATE = """
local kept = redis.call('HGET', KEYS[1], 'record')
if kept then return kept end
redis.call('HSET', KEYS[1], 'version', 0, 'write_id', ARGV[1], 'record', ARGV[2])
return ARGV[2]
"""
_COMMIT = """
local at = redis.call('HMGET', KEYS[1], 'version', 'write_id')
local before = tonumber(ARGV[1]) - 1
if at[1] and tonumber(at[1]) == before then
    redis.call('SET', KEYS[2], ARGV[4])
    redis.call('HSET', KEYS[1], 'version', ARGV[1], 'write_id', ARGV[2], 'record', ARGV[3])
    return {ARGV[1], ARGV[2]}
end
return at
"""

_SETTINGS = (  # of INFO, and what happens where they are otherwise
    ("maxmemory_policy", "noeviction", "sessions may be evicted"),
    ("aof_enabled", "1", "commits may be lost when it stops"),
)
_CONNECTIONS = 32
_WAIT_SECONDS = 10.0  # for a free connection
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 10.0
_RETRIES = 3  # all the scripts may run twice; a few hundred milliseconds bridge a restart of the connection

_REASONS: tuple[tuple[type[Exception], str], ...] = (  # the first that fits; chained errors name the address
    (exceptions.OutOfMemoryError, "is out of memory (maxmemory is reached)"),
    (exceptions.AuthenticationError, "refuses the credentials"),
    (exceptions.AuthorizationError, "refuses the credentials"),
    (exceptions.BusyLoadingError, "is still loading its data"),
    (exceptions.ReadOnlyError, "is a read-only replica"),
    (exceptions.TimeoutError, "did not answer in time"),
    (exceptions.ConnectionError, "cannot be reached"),
    (OSError, "cannot be reached"),
)


class RedisStore:
    """A store behind a `redis://` or `rediss://` URL, whose query may hold redis-py's connection options."""

    name = "redis"

    def __init__(self, url: str) -> None:
        """Raises ValueError where the URL makes no sense."""
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=_WAIT_SECONDS,
            socket_connect_timeout=_CONNECT_SECONDS,
            socket_timeout=_ANSWER_SECONDS,
            retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), _RETRIES),
            decode_responses=False,
        )
        self._client = Redis.from_pool(pool)
        self._uncancelled = Uncancelled()

    async def open(self) -> None:
        """Connect, and `check`."""
        await self.ping()
        await self.check()

    async def check(self) -> None:
        """Log a warning where this Redis may forget sessions: it evicts keys, or writes no append-only file."""
        await self._run(self._check())

    async def create(self, record: SessionRecord) -> None:
        """Keep a new session at version 0."""
        await self._run(self._create(record))

    async def get(self, session_id: str) -> SessionRecord:
        """The record as of the last commit."""
        return await self._run(self._get(session_id))

    async def load(self, record: SessionRecord) -> bytes:
        """The state that belongs to `record`."""
        return await self._run(self._load(record))

    async def commit(self, record: SessionRecord, state: bytes) -> None:
        """Move the session on by one version."""
        await self._run(self._commit(record, state))

    async def delete(self, session_id: str) -> None:
        """Forget a session and its state."""
        await self._run(self._delete(session_id))

    async def ping(self) -> None:
        """Ask for an answer."""
        await self._run(self._ping())

    async def close(self) -> None:
        """Finish what has begun, then close all connections."""
        await self._uncancelled.drain()
        await self._client.aclose()

    async def _run(self, operation: Coroutine[Any, Any, T]) -> T:
        return await self._uncancelled(_translated(operation))

    async def _check(self) -> None:
        try:
            info = await self._client.info()  # unlike CONFIG, hosted services allow it
        except exceptions.ResponseError as error:
            info = {}
            _log.warning("Redis does not let INFO be read: %s", error)
        for field, wanted, risk in _SETTINGS:
            found = info.get(field)
            if found is None:
                _log.warning("cannot check Redis: %s is unknown; unless it is %s, %s", field, wanted, risk)
            elif str(found) != wanted:
                _log.warning("Redis has %s %s, not %s: %s", field, found, wanted, risk)

    async def _create(self, record: SessionRecord) -> None:
        assert record.version == 0
        key, _ = _keys(record.id)
        kept = await self._client.eval(_CREATE, 1, key, record.write_id, record.to_json())
        if SessionRecord.from_json(kept) != record:
            raise taken(record.id)

    async def _get(self, session_id: str) -> SessionRecord:
        key, _ = _keys(session_id)
        text = await self._client.hget(key, "record")
        if text is None:
            raise not_found(session_id)
        return SessionRecord.from_json(text)

    async def _load(self, record: SessionRecord) -> bytes:
        record_key, state_key = _keys(record.id)
        # The state first: where the record still stands afterwards, this was its state. Not a transaction, since a
        # Redis that is short of memory refuses those, reads and all.
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.get(state_key)
            pipe.hmget(record_key, "version", "write_id")
            state, at = await pipe.execute()
        record.check_current(*_position(record.id, at))
        return record.check_state(state)

    async def _commit(self, record: SessionRecord, state: bytes) -> None:
        fields = (str(record.version), record.write_id, record.to_json(), state)
        at = await self._client.eval(_COMMIT, 2, *_keys(record.id), *fields)
        record.needs_commit(*_position(record.id, at))

    async def _delete(self, session_id: str) -> None:
        if not await self._client.delete(*_keys(session_id)):
            raise not_found(session_id)

    async def _ping(self) -> None:
        await self._client.ping()


def _keys(session_id: str) -> tuple[str, str]:
    return f"titans:{{{session_id}}}:record", f"titans:{{{session_id}}}:state"


def _position(session_id: str, at: list[bytes | None]) -> tuple[int, str]:
    """Version and write id, as a script or HMGET gave them."""
    version, write_id = at
    if version is None or write_id is None:
        raise not_found(session_id)
    return int(version), write_id.decode()


async def _translated(operation: Coroutine[Any, Any, T]) -> T:
    try:
        return await operation
    except (exceptions.RedisError, OSError) as error:
        known = (reason for kind, reason in _REASONS if isinstance(error, kind))
        reason = next(known, f"refused the operation: {error}")
        raise StoreUnavailable(f"the Redis store {reason}") from error
