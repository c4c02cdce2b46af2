"""API keys in a store, as `titans keys` puts them there."""

import asyncio
import time

from titans_server.tenants import keys
from titans_server.tenants.quotas import Quotas
from titans_server.tenants.store import open_keys


def new_key(store: str, quotas: Quotas | None = None) -> tuple[keys.Key, dict[str, str]]:
    """A key in the store, and the header that shows it."""
    key, text = keys.make("test", time.time(), quotas)
    asyncio.run(put(store, key))
    return key, {"Authorization": f"Bearer {text}"}


async def put(store: str, key: keys.Key) -> None:
    opened = open_keys(store)
    await opened.put(key)
    await opened.close()
