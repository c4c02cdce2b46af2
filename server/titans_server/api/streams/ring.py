"""The last events of a stream: numbered from 1, bounded in bytes. No I/O here."""

from collections import deque
from dataclasses import dataclass

from sse_starlette import ServerSentEvent

from titans_server.errors import EventsLost, InvalidRequest, TitansError

_OVERHEAD = 128  # bytes that keeping an event costs beside its own


@dataclass(frozen=True)
class Frame:
    """An event before it has its number."""

    data: str
    name: str | None = None  # None: "message", as a reader of events sees it
    error: TitansError | None = None  # that it tells of
    is_passing: bool = False  # the next passing one may take its place, as long as no reader has it


@dataclass(frozen=True)
class Numbered:
    """An event as it goes over the wire."""

    id: int
    wire: bytes
    is_passing: bool
    error: TitansError | None = None  # that it tells of

    @property
    def num_bytes(self) -> int:
        """What keeping it costs."""
        return len(self.wire) + _OVERHEAD


class Ring:
    """A stream's newest events. The newest is always kept, however large; the oldest go when there are too many."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._events: deque[Numbered] = deque()
        self.num_bytes = 0
        self.last = 0  # the newest event's number, 0 before there is one

    @property
    def first(self) -> int:
        """The oldest kept event's number; the next one's where none is kept."""
        return self.last - len(self._events) + 1

    @property
    def last_to_go(self) -> int:
        """The newest event that the next one pushes out; the one before the oldest where it pushes out none."""
        number, num_bytes = self.first - 1, self.num_bytes
        for event in self._events:
            if num_bytes < self._max_bytes:
                break
            number, num_bytes = event.id, num_bytes - event.num_bytes
        return number

    def append(self, frame: Frame, *, pushing: bool = True) -> None:
        """Keep one more event. `pushing`: no longer those that it pushes out."""
        if pushing:
            self.forget(self.last_to_go)
        self.last += 1
        wire = ServerSentEvent(frame.data, event=frame.name, id=str(self.last)).encode()
        event = Numbered(self.last, wire, frame.is_passing, frame.error)
        self._events.append(event)
        self.num_bytes += event.num_bytes

    def supersede(self, frame: Frame, beyond: int) -> bool:
        """Have a frame take the newest event's place and number: where both are passing and that is beyond a number."""
        newest = self._events[-1] if self._events else None
        if newest is None or not (frame.is_passing and newest.is_passing and newest.id > beyond):
            return False
        self._events.pop()
        self.num_bytes -= newest.num_bytes
        self.last -= 1
        self.append(frame, pushing=False)
        return True

    def check(self, number: int) -> None:
        """Raises EventsLost where what follows `number` is not all there, InvalidRequest where it was never sent."""
        if number > self.last:
            raise InvalidRequest(f"the stream's last event is {self.last}", param="Last-Event-ID")
        if number < self.first - 1:
            raise EventsLost(f"the events before {self.first} are kept no more")

    def after(self, number: int) -> Numbered | None:
        """The event that follows `number`, which `check` has passed; None while there is none."""
        return self._events[number + 1 - self.first] if number < self.last else None

    def forget(self, number: int) -> None:
        """Keep the events up to this one no more."""
        while self._events and self.first <= number:
            self.num_bytes -= self._events.popleft().num_bytes
