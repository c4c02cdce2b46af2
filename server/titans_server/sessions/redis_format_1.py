"""What servers before the log kept in Redis, taken over once: a record and one state under two keys of a session.

titans:{<id>}:record    a hash: version, write_id, record (JSON)
titans:{<id>}:state     the state of that version
"""

import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from titans_server.errors import StoreUnavailable
from titans_server.sessions.record import FORMAT, SessionRecord, from_format_1

_FORMAT = "titans:format"
_TAKE_OVER = """
if redis.call('EXISTS', KEYS[1]) == 0 then return end
redis.call('HSET', KEYS[3], 'revision', ARGV[1], 'write_id', ARGV[2], 'record', ARGV[3], 'expires_at', 1e12)
if redis.call('EXISTS', KEYS[2]) == 1 then
    redis.call('RENAME', KEYS[2], KEYS[4])
    redis.call('HSET', KEYS[5], ARGV[4], ARGV[5])
end
redis.call('DEL', KEYS[1])
"""


async def take_over(client: Any, index: Callable[[SessionRecord], Awaitable[None]]) -> None:
    """Bring what there is to the present format, a session at a time, each after its record was given to `index`.

    It may break off and be done again, and several servers may do it at once. Raises StoreUnavailable for a format that
    is newer than this.
    """
    found = int(await client.get(_FORMAT) or 1)
    if found > FORMAT:
        raise StoreUnavailable(f"the Redis store has format {found}; this server reads {FORMAT}")
    if found == FORMAT:
        return
    async for key in client.scan_iter(match="titans:{*}:record"):
        text = await client.hget(key, "record")
        if text is not None:  # otherwise another server has taken it over
            await _take_over_one(client, key, text, index)
    await client.set(_FORMAT, FORMAT)


async def _take_over_one(
    client: Any, key: bytes, text: bytes, index: Callable[[SessionRecord], Awaitable[None]]
) -> None:
    prefix = key.decode().removesuffix("record")
    session_id, own = prefix.removeprefix("titans:{").removesuffix("}:"), uuid.uuid4().hex
    record = from_format_1(text, f"{session_id}/{own}")
    await index(record)
    keys = (key, f"{prefix}state", f"{prefix}session", f"{prefix}blob:{own}", f"{prefix}uses:{own}")
    fields = (record.revision, record.write_id, record.to_json(), session_id, time.time())
    await client.eval(_TAKE_OVER, len(keys), *keys, *fields)
