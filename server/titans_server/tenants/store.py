"""Where API keys are kept: in the same place as the sessions, named by the same URL."""

import asyncio
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from titans_server.errors import StoreUnavailable
from titans_server.sessions import redis_client
from titans_server.tenants.keys import Key

P = ParamSpec("P")
T = TypeVar("T")

_BUSY_SECONDS = 10.0
_CONNECTIONS = 4
_TABLE = "CREATE TABLE IF NOT EXISTS api_keys (id TEXT PRIMARY KEY, record TEXT NOT NULL)"
_HASH = "titans:api-keys"  # in Redis: a hash of records, as JSON, by their keys' ids


class KeyStore(Protocol):
    """Every method raises StoreUnavailable where the store cannot be reached or cannot write."""

    async def get(self, key_id: str) -> Key | None:
        """A key, revoked or not."""

    async def put(self, key: Key) -> None:
        """Keep a key in place of any of the same id, durably."""

    async def list(self) -> Sequence[Key]:
        """All of them, the oldest first."""

    async def is_empty(self) -> bool:
        """Whether there never was a key."""

    async def close(self) -> None:
        """Let go of connections."""


class MemoryKeys:
    """Keys in this process's memory, gone at its end."""

    def __init__(self) -> None:
        self._keys: dict[str, Key] = {}

    async def get(self, key_id: str) -> Key | None:
        """See KeyStore."""
        return self._keys.get(key_id)

    async def put(self, key: Key) -> None:
        """See KeyStore."""
        self._keys[key.id] = key

    async def list(self) -> Sequence[Key]:
        """See KeyStore."""
        return _oldest_first(self._keys.values())

    async def is_empty(self) -> bool:
        """See KeyStore."""
        return not self._keys

    async def close(self) -> None:
        """See KeyStore."""


class SqliteKeys:
    """Keys in a table of the sessions' database. Each call opens it anew, in a worker thread: there are few.

    Where there is none yet, only a key makes it: who looks may have mistaken the path.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()

    async def get(self, key_id: str) -> Key | None:
        """See KeyStore."""
        rows = await self._read("SELECT record FROM api_keys WHERE id = ?", key_id)
        return Key.from_json(rows[0][0]) if rows else None

    async def put(self, key: Key) -> None:
        """See KeyStore."""
        await self._run(self._insert, key)

    async def list(self) -> Sequence[Key]:
        """See KeyStore."""
        return _oldest_first(Key.from_json(text) for (text,) in await self._read("SELECT record FROM api_keys"))

    async def is_empty(self) -> bool:
        """See KeyStore."""
        return not await self._read("SELECT 1 FROM api_keys LIMIT 1")

    async def close(self) -> None:
        """See KeyStore."""

    async def _read(self, statement: str, *values: str) -> Sequence[tuple[Any, ...]]:
        return await self._run(self._select, statement, values)

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await asyncio.to_thread(work, *args, **kwargs)
        except sqlite3.Error as error:
            raise StoreUnavailable(f"the SQLite store failed: {error}") from error
        except OSError as error:
            raise StoreUnavailable(f"the SQLite store cannot use its files: {error.strerror}") from error

    def _select(self, statement: str, values: Sequence[str]) -> Sequence[tuple[Any, ...]]:
        if not self._path.exists():
            return []
        with self._database() as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'api_keys'").fetchone():
                return []
            return database.execute(statement, values).fetchall()

    def _insert(self, key: Key) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._database() as database:
            database.execute("PRAGMA synchronous=FULL")
            database.execute(_TABLE)
            database.execute("INSERT OR REPLACE INTO api_keys (id, record) VALUES (?, ?)", (key.id, key.to_json()))

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            yield database
        finally:
            database.close()


class RedisKeys:
    """Keys in a hash of the sessions' Redis."""

    def __init__(self, url: str) -> None:
        """Raises ValueError where the URL makes no sense."""
        self._run = redis_client.Connections(url, _CONNECTIONS)
        self._client = self._run.client

    async def get(self, key_id: str) -> Key | None:
        """See KeyStore."""
        text = await self._run(self._client.hget(_HASH, key_id))
        return None if text is None else Key.from_json(text)

    async def put(self, key: Key) -> None:
        """See KeyStore."""
        await self._run(self._client.hset(_HASH, key.id, key.to_json()))

    async def list(self) -> Sequence[Key]:
        """See KeyStore."""
        return _oldest_first(map(Key.from_json, await self._run(self._client.hvals(_HASH))))

    async def is_empty(self) -> bool:
        """See KeyStore."""
        return not await self._run(self._client.hlen(_HASH))

    async def close(self) -> None:
        """See KeyStore."""
        await self._run.close()


def open_keys(url: str) -> KeyStore:
    """The keys beside the sessions of a store's URL, which `sessions.open_store` has accepted."""
    scheme, _, rest = url.partition("://")
    match scheme:
        case "memory":
            return MemoryKeys()
        case "sqlite":
            return SqliteKeys(Path(rest[1:]))
        case _:
            return RedisKeys(url)


def _oldest_first(keys: Iterable[Key]) -> Sequence[Key]:
    return sorted(keys, key=lambda key: (key.created_at, key.id))
