"""What servers before the log kept in Redis, taken over once: a record and one state under two keys of a session.

titans:{<id>}:record    a hash: version, write_id, record (JSON)
titans:{<id>}:state     the state of that version
"""

import time
import uuid
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


async def take_over(client: Any) -> list[SessionRecord]:
    """Bring what there is to the present format, a session at a time. Returns the records, to be indexed.

    Raises StoreUnavailable for a format that is newer than this.
    """
    found = int(await client.get(_FORMAT) or 1)
    if found > FORMAT:
        raise StoreUnavailable(f"the Redis store has format {found}; this server reads {FORMAT}")
    if found == FORMAT:
        return []
    records = [await _take_over_one(client, key) async for key in client.scan_iter(match="titans:{*}:record")]
    await client.set(_FORMAT, FORMAT)
    return records


async def _take_over_one(client: Any, key: bytes) -> SessionRecord:
    prefix = key.decode().removesuffix("record")
    session_id, own = prefix.removeprefix("titans:{").removesuffix("}:"), uuid.uuid4().hex
    record = from_format_1(await client.hget(key, "record"), f"{session_id}/{own}")
    keys = (key, f"{prefix}state", f"{prefix}session", f"{prefix}blob:{own}", f"{prefix}uses:{own}")
    fields = (record.revision, record.write_id, record.to_json(), session_id, time.time())
    await client.eval(_TAKE_OVER, len(keys), *keys, *fields)
    return record
