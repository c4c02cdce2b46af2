"""API keys: how they look, what is kept of them, how one is recognised. No I/O here.

A key is `titans-<id>-<secret>`: the id is public, finds the record and names the owner of the sessions that the key
makes; the secret is 256 random bits and is shown once. What is kept is BLAKE2b (RFC 7693) of the secret, keyed with a
salt of the record's own.

The hash is fast on purpose. A slow one (bcrypt, Argon2) makes guessing dear where secrets are few, as passwords are;
nobody guesses 256 random bits, and a slow hash on every request would be a way to keep a server busy without a key.
The salt makes the same secret look different in each record, so that a digest copied from anywhere else opens nothing.
"""

import hmac
import json
import re
import secrets
from dataclasses import asdict, dataclass, field
from hashlib import blake2b

from titans_server.errors import StateCorrupted
from titans_server.tenants.quotas import Quotas

_FORM = re.compile(r"titans-([0-9a-f]{16})-([A-Za-z0-9_-]{43})")


@dataclass(frozen=True)
class Key:
    """What is kept of an API key. None of it lets anybody in."""

    id: str
    name: str  # for people
    owner: str  # of the sessions; the id of the first key that it had
    salt: str  # hexadecimal, like the digest
    digest: str = field(repr=False)
    created_at: float  # seconds since the epoch
    revoked_at: float | None = None
    quotas: Quotas = field(default_factory=Quotas)  # where they differ from the server's

    def opens_with(self, secret: str) -> bool:
        """Whether this is its secret, compared in constant time. It may have been revoked."""
        return hmac.compare_digest(_digest(secret, self.salt), self.digest)

    def to_json(self) -> str:
        """ASCII; `from_json` reads it back, equal."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Key":
        """The inverse of `to_json`. Raises StateCorrupted where the text is nothing that it wrote."""
        try:
            fields = json.loads(text)
            return cls(**fields | {"quotas": Quotas(**fields["quotas"])})
        except (ValueError, TypeError, KeyError) as error:
            raise StateCorrupted("the store holds an API key's record that cannot be read") from error


_NOBODY = Key(id="", name="", owner="", salt="00" * 16, digest="", created_at=0.0)


def make(name: str, now: float, quotas: Quotas | None = None, owner: str | None = None) -> tuple[Key, str]:
    """A new key: what is kept of it, and the key itself, to be shown once and forgotten."""
    key_id, secret, salt = secrets.token_hex(8), secrets.token_urlsafe(32), secrets.token_hex(16)
    key = Key(key_id, name, owner or key_id, salt, _digest(secret, salt), now, quotas=quotas or Quotas())
    return key, f"titans-{key_id}-{secret}"


def split(text: str) -> tuple[str, str] | None:
    """The id and the secret of what may be a key; None for what cannot be one."""
    match = _FORM.fullmatch(text)
    return None if match is None else (match[1], match[2])


def is_open(key: Key | None, secret: str) -> bool:
    """Whether a record, where there is one, lets this secret in; as much work where there is none."""
    opens = (key or _NOBODY).opens_with(secret)
    return opens and key is not None and key.revoked_at is None


def same(given: str, expected: str) -> bool:
    """Whether two secrets of any length are the same, in constant time."""
    salt = secrets.token_hex(16)
    return hmac.compare_digest(_digest(given, salt), _digest(expected, salt))


def _digest(secret: str, salt: str) -> str:
    return blake2b(secret.encode(), key=bytes.fromhex(salt), digest_size=32, person=b"titans-api-key").hexdigest()
