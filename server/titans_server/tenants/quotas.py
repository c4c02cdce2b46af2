"""How much one tenant may have. Pure arithmetic; whoever calls brings the time."""

import math
from dataclasses import dataclass, fields

_MINUTE = 60.0


@dataclass(frozen=True)
class Quotas:
    """Bounds for one owner; None: none."""

    sessions: int | None = None
    bytes: int | None = None  # that its sessions take in the store
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts, answers and documents
    requests_at_once: int | None = None  # streams among them

    def over(self, others: "Quotas") -> "Quotas":
        """These, and those of the others where there is none here."""
        mine = {field.name: getattr(self, field.name) for field in fields(self)}
        return Quotas(**{k: getattr(others, k) if v is None else v for k, v in mine.items()})


class Bucket:
    """A token bucket that holds a minute's worth: at once, or spread out. It may be overdrawn."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def take(self, amount: int, now: float) -> None:
        """Take out, below nothing if need be."""
        self._level = self._level_at(now) - amount
        self._at = now

    def remaining(self, now: float) -> int:
        """What can be taken now; 0 where it is overdrawn."""
        return max(0, int(self._level_at(now)))

    def seconds_until(self, amount: int, now: float) -> float:
        """Until that much can be taken; 0: now; infinite where nothing ever comes in."""
        missing = amount - self._level_at(now)
        if missing <= 0:
            return 0.0
        return missing * _MINUTE / self.per_minute if self.per_minute else math.inf

    def seconds_until_full(self, now: float) -> float:
        """Until a whole minute's worth can be taken."""
        return self.seconds_until(self.per_minute, now)

    def _level_at(self, now: float) -> float:
        return min(self.per_minute, self._level + (now - self._at) * self.per_minute / _MINUTE)
