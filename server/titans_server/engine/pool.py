"""Streams side by side in one set of tensors, a row each.

The rows in use are the first ones, so a step works on views of them, in place, whatever joins or leaves: joining copies
one stream, leaving one at most, and nothing else is moved. Owned by the compute thread.

Sessions' states are not kept here. They are values: as many answers as like read one state at once, forks share it, and
it is written down while the engine works. Only what an answer changes is its own, from the moment that it begins.
"""

from titans.state import Parts, Stream
from torch import Tensor

_KEPT = 16  # rows that there stays room for: to take it anew for every burst of answers is half of what they begin with


class Pool:
    """Streams of one model, all with the same `write` and `recall`. It grows as it must, and doubles when it does."""

    def __init__(self, capacity: int = 0) -> None:
        """`capacity`: rows that there is room for from the first stream on, and no more: nothing is ever moved."""
        self.capacity = capacity
        self._form: Stream | None = None  # any of its streams: what parts there are
        self._room: dict[str, Tensor] = {}  # [capacity, ...] each
        self._num_rows = 0
        self._stream: Stream | None = None  # of the rows in use, as it was last asked for

    def __len__(self) -> int:
        """Rows in use."""
        return self._num_rows

    @property
    def stream(self) -> Stream:
        """All the streams, one at least: views, good until the next one joins or leaves."""
        assert self._form is not None and self._num_rows
        if self._stream is None:
            self._stream = self._form.map(lambda name, _: self._room[name][: self._num_rows])
        return self._stream

    def last(self, count: int) -> Stream:
        """As `stream`, of those that joined last."""
        return self.stream.map(lambda _, x: x[-count:])

    def first(self, rows: int) -> Stream:
        """The places of the first rows, whoever is in them or nobody; once there was a stream. Of no more than fit."""
        assert self._form is not None and rows <= self.capacity
        return self._form.map(lambda name, _: self._room[name][:rows])

    def join(self, stream: Stream) -> int:
        """Copy a single stream in. Returns its row, the one after the last."""
        self._form = stream
        self._stream = None
        row = self._num_rows
        stream.map(lambda name, x: self._write(name, row, x))
        self._num_rows += 1  # not before: where there was no room for all of it, nobody has the row
        return row

    def leave(self, row: int) -> None:
        """Give a row up; the last one takes its place. With the last one room that has grown large is given back."""
        assert row < self._num_rows
        self._num_rows -= 1
        self._stream = None
        if not (self._num_rows or self.capacity) and any(len(room) > _KEPT for room in self._room.values()):
            self._room.clear()
        if row < self._num_rows:
            for room in self._room.values():
                room[row] = room[self._num_rows]

    def _write(self, name: str, row: int, x: Tensor) -> Tensor:
        room = self._room.get(name)
        if room is None or len(room) == row:
            assert row < self.capacity or not self.capacity, "more streams than it has room for"
            larger = x.new_zeros(max(1, 2 * row, self.capacity), *x.shape[1:])
            if room is not None:
                larger[:row] = room
            room = self._room[name] = larger
        room[row] = x[0]
        return x


def move_on(stream: Stream, after: Stream) -> None:
    """Put what the model has made of a stream in the stream's own place: most of it is there already."""
    for before, now in zip(_parts(stream), _parts(after), strict=True):
        for name, x in now.items():
            if x is not before[name]:
                before[name].copy_(x)


def _parts(stream: Stream) -> list[Parts]:
    state = stream.state
    return [{"position": state.position, "tail": state.tail}, *state.layers, *stream.upper]
