"""Sessions' states kept in memory, the most recently used ones. Losing one costs a load, nothing else."""

from collections import OrderedDict

from titans.state import State


class StateCache:
    """Least recently used states leave when the bytes run out. Owned by the event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._states: OrderedDict[str, tuple[str, State]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    @property
    def num_bytes(self) -> int:
        """Bytes of the states that are here."""
        return self._num_bytes

    def get(self, session_id: str, write_id: str) -> State | None:
        """The state that exactly this commit made, where it is here."""
        held = self._states.get(session_id)
        if held is None or held[0] != write_id:
            return None
        self._states.move_to_end(session_id)
        return held[1]

    def put(self, session_id: str, write_id: str, state: State) -> None:
        """Keep a state in place of any older one of the session."""
        self.drop(session_id)
        self._states[session_id] = (write_id, state)
        self._num_bytes += state.num_bytes
        while self._num_bytes > self._max_bytes and len(self._states) > 1:
            self.drop(next(iter(self._states)))

    def drop(self, session_id: str) -> None:
        """Forget a session's state, if it is here."""
        held = self._states.pop(session_id, None)
        if held is not None:
            self._num_bytes -= held[1].num_bytes
