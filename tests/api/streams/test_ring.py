"""The ring: numbers, bounds, and what is asked for too late or too early."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from titans_server.api.streams.ring import Frame, Ring
from titans_server.errors import EventsLost, InvalidRequest


def after(ring: Ring, number: int) -> list[int]:
    """The numbers of the events that follow one."""
    ring.check(number)
    numbers = []
    while (event := ring.after(number)) is not None:
        numbers.append(number := event.id)
    return numbers


def test_an_event_goes_over_the_wire_with_its_number_and_name() -> None:
    ring = Ring(10_000)
    for frame in (Frame('{"a": 1}'), Frame("x", name="error")):
        ring.append(frame)
    first, second = ring.after(0), ring.after(1)
    assert first is not None
    assert second is not None
    assert first.wire == b'id: 1\r\ndata: {"a": 1}\r\n\r\n'
    assert second.wire == b"id: 2\r\nevent: error\r\ndata: x\r\n\r\n"
    assert ring.after(2) is None


@given(sizes=st.lists(st.integers(0, 400), max_size=60), max_bytes=st.integers(1, 2_000))
def test_the_newest_events_are_kept_within_the_bound(sizes: list[int], max_bytes: int) -> None:
    ring = Ring(max_bytes)
    for count, size in enumerate(sizes, 1):
        ring.append(Frame("x" * size))
        kept = after(ring, ring.first - 1)
        assert kept == list(range(ring.first, count + 1))
        assert kept, "the newest is always there"
        events = [event for i in kept if (event := ring.after(i - 1)) is not None]
        assert ring.num_bytes == sum(event.num_bytes for event in events)
        assert ring.num_bytes - events[-1].num_bytes < max_bytes
    if ring.first > 1:
        with pytest.raises(EventsLost):
            ring.check(ring.first - 2)
    with pytest.raises(InvalidRequest):
        ring.check(len(sizes) + 1)


def test_what_is_forgotten_is_lost_and_the_rest_is_not() -> None:
    ring = Ring(10_000)
    for _ in range(5):
        ring.append(Frame("x"))
    ring.forget(3)
    assert after(ring, 3) == [4, 5]
    with pytest.raises(EventsLost):
        ring.check(2)
    ring.forget(100)
    assert (after(ring, 5), ring.num_bytes, ring.first) == ([], 0, 6)
    ring.append(Frame("x"))
    assert after(ring, 5) == [6]
