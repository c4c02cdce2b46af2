"""How sessions lie in Redis: keys, and the scripts that change what is there.

The keys of a session carry its id as a hash tag, so that a cluster keeps them on one node and one script may touch
them all. A blob stands under the session that wrote it, wherever its forks are: reading it needs no transaction.

    titans:{<id>}:session        a hash: revision and write_id, which the scripts compare, and record, as JSON
    titans:{<id>}:log            a hash: log entries by number
    titans:{<id>}:blob:<name>    a snapshot
    titans:{<id>}:uses:<name>    a hash: the sessions that point at it, or are about to, and since when. Whoever begins
                                 to point at it finds its use there and renews it in the same step, and a use is swept
                                 only as it was seen: so none is swept between a look at the record and its commit

What spans sessions is an index, written before what it leads to and removed after it: it may hold too much, and
never too little.

    titans:{owner:<digest>}:sessions   a sorted set by created_at      titans:due       by due_at
    titans:{owner:<digest>}:bytes      a hash: stored_bytes            titans:expires   by expires_at
"""

import hashlib

from titans_server.sessions.record import SessionRecord

DUE = "titans:due"
EXPIRES = "titans:expires"
_NEVER = 1e12  # seconds since the epoch

# Redis runs a script alone and whole. One that starts short of memory is refused at its first write. What is asked for
# again is written again: it is the same, and replicas are waited for again.
CREATE = """
local kept = redis.call('HGET', KEYS[1], 'record')
if kept and kept ~= ARGV[3] then return kept end
redis.call('HSET', KEYS[1], 'revision', ARGV[1], 'write_id', ARGV[2], 'record', ARGV[3], 'expires_at', ARGV[4])
for i = 5, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
return ARGV[3]
"""
COMMIT = """
local at = redis.call('HMGET', KEYS[1], 'revision', 'write_id', 'expires_at')
if not at[1] or tonumber(at[3]) <= tonumber(ARGV[5]) then return {false, false} end
local again = at[1] == ARGV[1] and at[2] == ARGV[2]
local before = tonumber(at[1]) == tonumber(ARGV[1]) - 1 and at[2] == ARGV[8]
if not (before or again) then return {at[1], at[2]} end
for i = 3, #KEYS do if redis.call('HEXISTS', KEYS[i], ARGV[7]) == 0 then return {ARGV[1], false} end end
for i = 3, #KEYS do redis.call('HSET', KEYS[i], ARGV[7], ARGV[5]) end
redis.call('HSET', KEYS[1], 'revision', ARGV[1], 'write_id', ARGV[2], 'record', ARGV[3], 'expires_at', ARGV[4])
local drops = 9 + 2 * tonumber(ARGV[6])
for i = 9, drops - 1, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
for i = drops, #ARGV do redis.call('HDEL', KEYS[2], ARGV[i]) end
return {ARGV[1], ARGV[2]}
"""
DELETE = """
local at = redis.call('HGET', KEYS[1], 'write_id')
if at and ARGV[1] and at ~= ARGV[1] then return -1 end
return redis.call('DEL', KEYS[1], KEYS[2])
"""
USE = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2])
return 1
"""
USED = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
"""
UNUSE = """
if ARGV[2] and redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[2] then return end
redis.call('HDEL', KEYS[2], ARGV[1])
if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('DEL', KEYS[1]) end
"""
# Unless it has been put there anew meanwhile, for a document that was accepted after the look at its session.
NOT_DUE = """
local at = redis.call('ZSCORE', KEYS[1], ARGV[1])
if at and tonumber(at) == tonumber(ARGV[2]) then redis.call('ZREM', KEYS[1], ARGV[1]) end
"""


def session_keys(session_id: str) -> tuple[str, str]:
    """Of its record and its log."""
    return f"titans:{{{session_id}}}:session", f"titans:{{{session_id}}}:log"


def record_fields(record: SessionRecord) -> tuple[int, str, str, float]:
    """What a script writes of a record."""
    expires_at = _NEVER if record.expires_at is None else record.expires_at
    return record.revision, record.write_id, record.to_json(), expires_at


def blob_keys(name: str) -> tuple[str, str]:
    """Of the blob and its uses."""
    session_id, _, own = name.rpartition("/")
    return f"titans:{{{session_id}}}:blob:{own}", f"titans:{{{session_id}}}:uses:{own}"


def used_blob(uses: str) -> str:
    """The name of the blob whose uses stand under this key."""
    session_id, _, own = uses.removeprefix("titans:{").partition("}:uses:")
    return f"{session_id}/{own}"


def owner_keys(owner: str) -> tuple[str, str]:
    """Of an owner's sessions and their bytes."""
    tag = "{owner:" + hashlib.sha256(owner.encode()).hexdigest()[:32] + "}"
    sessions = f"titans:{tag}:sessions"
    return sessions, sizes_key(sessions)


def sizes_key(sessions: str) -> str:
    """Of the bytes of the owner's sessions that stand under this key."""
    return sessions.removesuffix("sessions") + "bytes"
