"""What sessions are, said as simply as it can be: versioned registers of what was read.

Two versions that have read the same are the same, in whatever session and on whatever server; `Answers` holds that.
"""

from dataclasses import dataclass, field

from support.life import LostError

Reading = tuple[str, ...]  # in order: a document's text, or "? " and a prompt that was learnt with its answer


@dataclass
class Register:
    """One session as it should be."""

    versions: dict[int, Reading] = field(default_factory=lambda: {0: ()})
    keys: dict[str, tuple[str, int]] = field(default_factory=dict)  # Idempotency-Key: text, version
    refused: int = 0

    @property
    def version(self) -> int:
        """The newest."""
        return max(self.versions)

    @property
    def reading(self) -> Reading:
        """What the newest version has read."""
        return self.versions[self.version]

    def write(self, version: int, what: str) -> None:
        """An acknowledged write. Raises LostError unless its version is the next."""
        if version != self.version + 1:
            raise LostError(f"a write was acknowledged as version {version} after {self.version}")
        self.versions[version] = (*self.reading, what)

    def restore(self, version: int, to: int) -> None:
        """An acknowledged restore of the version `to`. Raises LostError unless it made the next version."""
        if version != self.version + 1:
            raise LostError(f"a restore was acknowledged as version {version} after {self.version}")
        self.versions[version] = self.versions[to]

    def fork(self, version: int) -> "Register":
        """A session that goes on from a version."""
        return Register({version: self.versions[version]})


class Answers:
    """What is seen of a version is a function of what it has read."""

    def __init__(self) -> None:
        self._seen: dict[Reading, tuple[int, str]] = {}

    def check(self, reading: Reading, tokens_seen: int, answer: str) -> None:
        """Raises LostError where the same reading was seen otherwise before."""
        seen = self._seen.setdefault(reading, (tokens_seen, answer))
        if seen != (tokens_seen, answer):
            raise LostError(f"after {reading} there are {tokens_seen} tokens and {answer!r}, and were {seen}")
