"""The way to a Redis: one server, one behind Sentinel, or a cluster; if it can be trusted; what its errors mean."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qs, unquote, urlencode, urlsplit, urlunsplit

from redis import exceptions
from redis.asyncio import ConnectionPool, Redis, RedisCluster
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialWithJitterBackoff

from titans_server.errors import StoreUnavailable
from titans_server.sessions.uncancelled import Uncancelled

T = TypeVar("T")

_log = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 10.0
_RETRIES = 3  # all the scripts may run twice; a few hundred milliseconds bridge a restart of the connection
_OLDEST = (6, 2)
_UNREADABLE = (
    "host and port of the Redis store's URL cannot be read: in a password write / as %2F, and what else is special so"
)

FAILURES = (exceptions.RedisError, exceptions.RedisClusterException, OSError)  # the second is none of the first

_REASONS: tuple[tuple[type[Exception], str], ...] = (  # the first that fits; chained errors name the address
    (exceptions.OutOfMemoryError, "is out of memory (maxmemory is reached)"),
    (exceptions.AuthenticationError, "refuses the credentials"),
    (exceptions.AuthorizationError, "refuses the credentials"),
    (exceptions.BusyLoadingError, "is still loading its data"),
    (exceptions.ClusterDownError, "is a cluster that is down"),
    (exceptions.RedisClusterException, "is a cluster that cannot be reached"),
    (exceptions.TimeoutError, "did not answer in time"),
    (exceptions.ConnectionError, "cannot be reached"),
    (OSError, "cannot be reached"),
)


def connect(url: str, *, max_connections: int) -> Any:
    """A client for a URL, not yet connected. Any query may hold redis-py's connection options, and `wait_replicas`.

    Behind Sentinel they are for what it watches; those of TLS are also for the Sentinels, whose own user and password
    are `sentinel_username` and `sentinel_password`.

        redis://user:password@host:6379/0      rediss://…              TLS
        redis+sentinel://host:26379,host:26379/master/0                rediss+sentinel://…
        redis+cluster://host:6379                                      rediss+cluster://…

    Raises ValueError where the URL makes no sense. `Redis | RedisCluster`, whose stubs do not agree.
    """
    options: dict[str, Any] = {
        "socket_connect_timeout": _CONNECT_SECONDS,
        "socket_timeout": _ANSWER_SECONDS,
        "retry": Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), _RETRIES),
        "max_connections": max_connections,
    }
    url, _ = without_replicas(url)
    scheme, _, rest = url.partition("://")
    secure, _, kind = scheme.partition("+")
    try:
        if kind == "cluster":
            return RedisCluster.from_url(_checked(f"{secure}://{rest}"), **options)
        client = _behind_sentinel(f"{secure}://{rest}", options) if kind == "sentinel" else _alone(url, options)
        client.connection_pool.make_connection()  # which connects to nothing yet, but reads the options
    except TypeError as error:
        raise ValueError(f"an option of the Redis store's URL cannot be read: {error}") from None
    return client


def without_replicas(url: str) -> tuple[str, int]:
    """A URL, and what its `wait_replicas` says: how many replicas have to have a write before it is acknowledged.

    Raises ValueError where that is no number, or for a cluster, whose commits are on connections of no one's choosing.
    """
    parts = _split(url)
    query = parse_qs(parts.query, keep_blank_values=True)
    given = query.pop("wait_replicas", ["0"])[-1]
    if not given.isdecimal():
        raise ValueError(f"wait_replicas is a number, not {given!r}")
    if int(given) and "+cluster" in parts.scheme:
        raise ValueError("wait_replicas is for one Redis, or one behind Sentinel")
    return urlunsplit(parts._replace(query=urlencode(query, doseq=True))), int(given)


def _split(url: str) -> SplitResult:
    """Raises ValueError, without a piece of the URL: where a password has a "/", its beginning passes for a port."""
    try:
        parts = urlsplit(url)
        if "," not in parts.netloc:
            _ = parts.port
    except ValueError:
        raise ValueError(_UNREADABLE) from None
    return parts


def _checked(url: str) -> str:
    """The URL. Raises ValueError where its database is no number: redis-py would take the first one instead."""
    database = unquote(_split(url).path).removeprefix("/")
    if database and not database.isdecimal():
        raise ValueError("the database of a Redis store's URL, after the last /, is a number")
    return url


def _alone(url: str, options: dict[str, Any]) -> Any:
    return Redis.from_pool(ConnectionPool.from_url(_checked(url), **options))


def _behind_sentinel(url: str, options: dict[str, Any]) -> Any:
    parts = _split(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    service, _, database = parts.path.strip("/").partition("/")
    if not service or not hosts:
        raise ValueError("a Sentinel's URL is redis+sentinel://host:26379,host:26379/name-of-the-master/0")
    places = [_split(f"//{host}") for host in hosts.split(",")]
    sentinels = [(place.hostname or "", place.port or 26379) for place in places]
    own = urlunsplit((parts.scheme, f"{credentials}@master" if credentials else "master", database, parts.query, ""))
    given = {
        name: value
        for name, value in parse_url(_checked(own)).items()
        if name not in {"host", "port", "connection_class"}
    }
    watching = {name: options[name] for name in ("socket_connect_timeout", "socket_timeout")}
    watching |= {name: given.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    if parts.scheme == "rediss":
        given["ssl"] = True
        watching |= {name: value for name, value in given.items() if name.startswith("ssl")}
    sentinel = Sentinel(sentinels, sentinel_kwargs=watching)  # type: ignore[no-untyped-call]
    client = sentinel.master_for(unquote(service), redis_class=_Watched, **options | given)
    client.watchers = sentinel.sentinels
    return client


class _Watched(Redis):
    """A client of what Sentinels watch. It lets go of its connections to them too, which redis-py forgets."""

    watchers: Sequence[Redis] = ()

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """See Redis."""
        await super().aclose(close_connection_pool)
        for watcher in self.watchers:
            await watcher.aclose()


class Connections:
    """A Redis, and turns at it, as many at once as it has connections: no operation finds all of them taken."""

    def __init__(self, url: str, count: int) -> None:
        """Raises ValueError where the URL makes no sense."""
        self.client = connect(url, max_connections=count)
        self._turns = asyncio.Semaphore(count)
        self._uncancelled = Uncancelled()

    async def __call__(self, operation: Coroutine[Any, Any, T]) -> T:
        """The operation's result, in its turn. It is carried through whoever leaves. Raises StoreUnavailable."""
        return await self._uncancelled(self._in_turn(operation))

    async def close(self) -> None:
        """Finish what has begun, then close all connections."""
        await self._uncancelled.drain()
        await self.client.aclose()

    async def _in_turn(self, operation: Coroutine[Any, Any, T]) -> T:
        async with self._turns:
            try:
                return await translated(operation)
            except StoreUnavailable as error:
                if _is_read_only(error.__cause__) and not isinstance(self.client, RedisCluster):
                    # no longer the primary, though it keeps its connections: new ones may go to the one that is
                    with suppress(*FAILURES):
                        await self.client.connection_pool.disconnect(inuse_connections=False)
                raise


async def check(client: Any) -> None:
    """Refuse a Redis that forgets sessions or is too old; warn of one that may lose the last second of them.

    Raises StoreUnavailable. What cannot be found out is warned of.
    """
    await client.ping()
    infos = await _infos(client)
    for info in infos:
        _check_version(str(info.get("redis_version", "")))
        _check_eviction(info)
        if str(info.get("aof_enabled")) != "1":
            found = "is off" if "aof_enabled" in info else "cannot be checked"
            _log.warning("Redis: the append-only file %s; unless it is on, commits are lost when it stops", found)
    if any(str(info.get("aof_enabled")) == "1" for info in infos):
        await _check_fsync(client)


async def _infos(client: Any) -> list[dict[str, Any]]:
    """INFO of every primary: unlike CONFIG, hosted services allow it. An empty one where it may not be read."""
    try:
        return await _of_primaries(client, client.info)
    except exceptions.ResponseError as error:
        _log.warning("Redis does not let INFO be read: %s", error)
        return [{}]


async def _of_primaries(client: Any, ask: Callable[..., Awaitable[Any]], *what: str) -> list[dict[str, Any]]:
    """What each of them answers, which redis-py has by node where they are several, and bare where there is one."""
    if not isinstance(client, RedisCluster):
        return [await ask(*what)]
    found = await ask(*what, target_nodes=RedisCluster.PRIMARIES)
    return list(found.values()) if len(client.get_primaries()) > 1 else [found]


def _check_version(text: str) -> None:
    numbers = text.split(".")[:2]
    if len(numbers) == 2 and all(n.isdecimal() for n in numbers) and tuple(map(int, numbers)) < _OLDEST:
        raise StoreUnavailable(f"the Redis store is version {text}; this server needs {'.'.join(map(str, _OLDEST))}")


def _check_eviction(info: dict[str, Any]) -> None:
    policy = info.get("maxmemory_policy")
    if policy is None:
        _log.warning("Redis: maxmemory_policy cannot be checked; unless it is noeviction, sessions may be evicted")
    elif str(policy).startswith("allkeys") and int(info.get("maxmemory", 0)):
        raise StoreUnavailable(f"the Redis store evicts sessions (maxmemory-policy {policy}): set it to noeviction")
    elif policy != "noeviction":
        _log.warning("Redis: maxmemory_policy is %s, not noeviction; sessions may be evicted", policy)


async def _check_fsync(client: Any) -> None:
    try:
        answers = await _of_primaries(client, client.config_get, "appendfsync")
    except exceptions.RedisError:
        return  # not allowed, as on hosted services, which say themselves what they promise
    for found in {answer.get("appendfsync") for answer in answers} - {None, "always"}:
        _log.warning("Redis: appendfsync is %s, not always; a power failure may lose the last commits", found)


async def translated(operation: Coroutine[Any, Any, T]) -> T:
    """The operation's result; Redis's errors become StoreUnavailable."""
    try:
        return await operation
    except FAILURES as error:
        known = (reason for kind, reason in _REASONS if isinstance(error, kind))
        reason = "is a read-only replica" if _is_read_only(error) else next(known, f"refused the operation: {error}")
        raise StoreUnavailable(f"the Redis store {reason}") from error


def _is_read_only(error: BaseException | None) -> bool:
    """Of a script before Redis 7 it is an error like any other, which says so in the middle."""
    return isinstance(error, exceptions.ReadOnlyError) or (
        isinstance(error, exceptions.ResponseError) and "READONLY" in str(error)
    )
