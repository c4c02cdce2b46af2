"""Sessions' states kept in memory, the most recently used ones. Losing one costs a load, nothing else."""

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from titans.state import State

from titans_server.sessions.record import Version


@dataclass
class Held:
    """A session's state at a version."""

    session_id: str
    version: Version
    state: State
    used_at: float = 0.0  # seconds, monotonic
    is_stored: bool = False  # the version has a snapshot of its own, or has read nothing


class StateCache:
    """Least recently used states leave when the bytes run out. Owned by the event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._held: OrderedDict[str, Held] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def num_bytes(self) -> int:
        """Bytes of the states that are here."""
        return self._num_bytes

    def __iter__(self) -> Iterator[Held]:
        return iter(list(self._held.values()))

    def get(self, session_id: str, version: Version) -> State | None:
        """The state of exactly this version, where it is here."""
        held = self._held.get(session_id)
        if held is None or held.version.write_id != version.write_id:
            return None
        self._held.move_to_end(session_id)
        held.used_at = time.monotonic()
        return held.state

    def put(self, session_id: str, version: Version, state: State) -> tuple[Held, list[Held]]:
        """Keep a state in place of any older one of the session. Returns it, and those that had to leave for it."""
        self.drop(session_id)
        held = Held(session_id, version, state, time.monotonic(), is_stored=not version.num_to_replay)
        self._held[session_id] = held
        self._num_bytes += state.num_bytes
        left = []
        while self._num_bytes > self._max_bytes and len(self._held) > 1:
            left.append(next(iter(self._held.values())))
            self.drop(left[-1].session_id)
        return held, left

    def drop(self, session_id: str) -> None:
        """Forget a session's state, if it is here."""
        held = self._held.pop(session_id, None)
        if held is not None:
            self._num_bytes -= held.state.num_bytes
