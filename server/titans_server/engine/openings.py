"""Sessions' states opened: what an answer begins from, kept as long as the state is.

Opening takes the last window through the layers above the memory, a layer at a time, so that others need not wait for
all of it. It is done when somebody asks, or before, when there is nothing else to do: who has read a document is likely
to be asked about it. Owned by the compute thread; states may be let go of on any.
"""

import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from titans.state import State, Stream

from titans_server.engine.steps import Steps

_KEPT = 64  # of 2.4 MB each with the shipped model; the rest of a stream is the state's own
_UNDER_WAY = 8


class _Opened(NamedTuple):
    state: "weakref.ref[State]"
    stream: Stream  # shares what it can with the state


class _Begun(NamedTuple):
    state: State  # kept, for another could have its id as soon as it is gone
    layers: Iterator[Stream | None]


class Openings:
    """Streams by the states that they are on."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._opened = OrderedDict[int, _Opened]()  # by the state's id; the one least lately asked first
        self._under_way = OrderedDict[int, _Begun]()  # likewise
        self._lately: deque[weakref.ref[State]] = deque(maxlen=_KEPT)  # states that nobody has asked yet

    def is_open(self, state: State) -> bool:
        """Whether a state has been opened to its end, and is kept so."""
        return id(state) in self._opened

    def stream(self, state: State, *, recall: bool) -> Stream:
        """The stream on a state that is open: to be copied, for whoever asks has the same."""
        self._opened.move_to_end(id(state))
        return replace(self._opened[id(state)].stream, recall=recall)

    def open(self, state: State, seconds: float) -> None:
        """Go on opening a state, a layer at least, for so many seconds."""
        until, key = time.perf_counter() + seconds, id(state)
        begun = self._under_way.pop(key, None) or _Begun(state, self._steps.opening(state))
        for stream in begun.layers:
            if stream is not None:
                gone = weakref.ref(state, lambda _: self._opened.pop(key, None))
                self._opened[key] = _Opened(gone, stream)
                break
            if time.perf_counter() >= until:
                self._under_way[key] = begun
                break
        for some, most in ((self._opened, _KEPT), (self._under_way, _UNDER_WAY)):
            if len(some) > most:
                some.popitem(last=False)

    def abandon(self, state: State) -> None:
        """Whoever wanted this state opened does so no more; what has been opened to its end stays."""
        self._under_way.pop(id(state), None)

    def expect(self, state: State) -> None:
        """Somebody may ask this state soon."""
        self._lately.append(weakref.ref(state))

    def has_expected(self) -> bool:
        """Whether `prepare` has something to do; drops what has been done or is gone."""
        while self._lately:
            state = self._lately[-1]()
            if state is not None and not self.is_open(state):
                return True
            self._lately.pop()
        return False

    def prepare(self) -> None:
        """Take the last state that is expected to be asked a layer further."""
        if self.has_expected() and (state := self._lately[-1]()) is not None:
            try:
                self.open(state, 0.0)
            except Exception:
                self._lately.pop()  # no further try: whoever asks will hear of it
                raise
