"""From a URL to a store."""

from collections.abc import Callable
from pathlib import Path

from titans_server.sessions.memory import MemoryStore
from titans_server.sessions.redis import RedisStore
from titans_server.sessions.sqlite import SqliteStore
from titans_server.sessions.store import SessionStore

_KNOWN = (
    "memory://, sqlite:///relative.db, sqlite:////absolute.db, redis://host:port/0, "
    "redis+sentinel://host:port,host:port/master/0, redis+cluster://host:port, and rediss:// likewise, with TLS"
)


def open_store(url: str) -> SessionStore:
    """The store that a URL names. Nothing is touched before its `open`; missing folders are made then.

    Raises ValueError, naming the URLs that are known, where this is none of them.
    """
    scheme, separator, rest = url.partition("://")
    make = _STORES.get(scheme)
    if make is None or not separator:
        raise _unknown(f"{scheme!r} is no kind of session store")  # never the URL: it may hold a password
    return make(url, rest)


def _memory(url: str, rest: str) -> SessionStore:
    if rest:
        raise _unknown("memory:// takes nothing after it")
    return MemoryStore()


def _sqlite(url: str, rest: str) -> SessionStore:
    if not rest.startswith("/") or rest.endswith("/"):
        raise _unknown(f"{url!r} names no file")
    if rest == "/:memory:":
        raise _unknown("states are kept beside the database, so it has to be a file")
    return SqliteStore(Path(rest[1:]))


def _redis(url: str, rest: str) -> SessionStore:
    return RedisStore(url)


def _unknown(reason: str) -> ValueError:
    return ValueError(f"{reason}; known are {_KNOWN}")


_STORES: dict[str, Callable[[str, str], SessionStore]] = {
    "memory": _memory,
    "sqlite": _sqlite,
    **{f"{scheme}{kind}": _redis for scheme in ("redis", "rediss") for kind in ("", "+sentinel", "+cluster")},
}
