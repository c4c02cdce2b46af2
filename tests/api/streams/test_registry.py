"""Streams without a network: who waits for whom, what ends what, and that nothing is left."""

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator

import pytest
from titans_server.api.streams.registry import StreamLimits, Streams
from titans_server.api.streams.ring import Frame
from titans_server.api.streams.stream import Reader
from titans_server.errors import EventsLost, Overloaded, StreamNotFound

LIMITS = StreamLimits(max_streams=2, max_bytes=1_000, keep_seconds=60, ping_seconds=15, stall_seconds=60)


def farewell() -> list[Frame]:
    return [Frame("stopped", name="error")]


class Source:
    """Numbers as events, and how far they have come."""

    def __init__(self, limit: int | None = None) -> None:
        self.num_made = 0
        self.is_closed = False
        self._limit = limit

    async def frames(self) -> AsyncGenerator[Frame, None]:
        try:
            for i in itertools.count(1):
                if self._limit is not None and i > self._limit:
                    return
                await asyncio.sleep(0)
                self.num_made = i
                yield Frame(str(i))
        finally:
            self.is_closed = True


async def texts(reader: Reader, limit: int | None = None) -> list[str]:
    found: list[str] = []
    async for wire in reader.events():
        found.append(wire.decode().split("data: ")[1].strip())
        if len(found) == limit:
            break
    return found


async def settle() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


@pytest.fixture
async def streams() -> AsyncGenerator[Streams, None]:
    streams = Streams(LIMITS)
    yield streams
    await streams.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert not len(streams)


@pytest.mark.parametrize("resumable", [True, False])
async def test_a_reader_gets_every_event_though_they_are_more_than_the_ring_holds(
    streams: Streams, resumable: bool
) -> None:
    reader = streams.open(Source(2_000).frames(), farewell, owner="me", resumable=resumable)
    assert await texts(reader) == [str(i) for i in range(1, 2_001)]


@pytest.mark.parametrize("resumable", [True, False])
async def test_passing_events_hold_nothing_up_and_the_newest_is_there(streams: Streams, resumable: bool) -> None:
    async def frames() -> AsyncGenerator[Frame, None]:
        for i in range(5_000):
            await asyncio.sleep(0)
            yield Frame(str(i), is_passing=True)
        yield Frame("done")

    reader = streams.open(frames(), farewell, owner="me", resumable=resumable)
    await asyncio.wait_for(asyncio.shield(reader.stream.task), 30)
    assert reader.stream.ring.num_bytes < 1_000
    assert await texts(reader) == ["0", "4999", "done"]


@pytest.mark.parametrize("resumable", [True, False])
async def test_what_a_reader_has_or_may_be_getting_keeps_its_number(streams: Streams, resumable: bool) -> None:
    go_on = asyncio.Event()

    async def frames() -> AsyncGenerator[Frame, None]:
        for i in range(6):
            yield Frame(str(i), is_passing=True)
        await go_on.wait()
        for i in range(6, 9):
            yield Frame(str(i), is_passing=True)

    reader = streams.open(frames(), farewell, owner="me", resumable=resumable)
    wires = reader.events()
    got = [await anext(wires)]
    await settle()
    got.append(await anext(wires))  # the newest, and it is on its way from here on
    go_on.set()
    await settle()
    got += [wire async for wire in wires]
    assert got == [f"id: {i}\r\ndata: {text}\r\n\r\n".encode() for i, text in ((1, 0), (2, 5), (3, 8))]


@pytest.mark.parametrize("resumable", [True, False])
async def test_a_slow_reader_holds_the_work_up(streams: Streams, resumable: bool) -> None:
    source = Source()
    reader = streams.open(source.frames(), farewell, owner="me", resumable=resumable)
    await settle()
    stalled_at = source.num_made
    await settle()
    assert source.num_made == stalled_at < 20
    assert reader.stream.ring.num_bytes < 2 * LIMITS.max_bytes
    events = reader.events()
    for _ in range(100):
        await anext(events)
        await settle()
    assert stalled_at + 90 < source.num_made < stalled_at + 110
    await events.aclose()


async def test_a_slow_reader_loses_nothing_where_events_are_of_many_sizes(streams: Streams) -> None:
    chance = random.Random(1)
    said = [f"{i} {'x' * chance.choice([0, 50, 400, 2_000])}".strip() for i in range(300)]

    async def frames() -> AsyncGenerator[Frame, None]:
        for text in said:
            yield Frame(text)

    reader = streams.open(frames(), farewell, owner="me", resumable=True)
    found: list[str] = []
    async for wire in reader.events():
        found.append(wire.decode().split("data: ")[1].strip())
        assert reader.stream.ring.num_bytes < LIMITS.max_bytes + 2_500
        await settle()
    assert found == said


@pytest.mark.parametrize("resumable", [True, False])
async def test_a_reader_who_is_behind_when_a_stream_is_stopped_hears_all_of_it(
    streams: Streams, resumable: bool
) -> None:
    reader = streams.open(Source().frames(), farewell, owner="me", resumable=resumable)
    await settle()
    await streams.stop(reader.stream.id, "me")
    *said, last = await texts(reader)
    assert len(said) > 3, "a ring of them"
    assert said == [str(i) for i in range(1, len(said) + 1)]
    assert last == "stopped"


async def test_a_stream_ends_with_its_reader(streams: Streams) -> None:
    source = Source()
    reader = streams.open(source.frames(), farewell, owner="me", resumable=False)
    await texts(reader, 3)
    reader.leave()
    await settle()
    assert source.is_closed
    assert not len(streams)
    with pytest.raises(StreamNotFound):
        streams.resume(reader.stream.id, "me", 3)


async def test_a_stream_that_can_be_resumed_goes_on_without_a_reader(streams: Streams) -> None:
    reader = streams.open(Source(6).frames(), farewell, owner="me", resumable=True)
    assert await texts(reader, 2) == ["1", "2"]
    reader.leave()
    await settle()
    again = streams.resume(reader.stream.id, "me", 2)
    assert again is not None
    assert await texts(again) == ["3", "4", "5", "6"]
    assert streams.resume(reader.stream.id, "me", 6) is None, "it has ended there"


async def test_without_a_reader_the_newest_events_are_kept(streams: Streams) -> None:
    source = Source(100)
    reader = streams.open(source.frames(), farewell, owner="me", resumable=True)
    reader.leave()
    await settle()
    assert source.is_closed
    with pytest.raises(EventsLost):
        streams.resume(reader.stream.id, "me", 0)
    late = streams.resume(reader.stream.id, "me", 97)
    assert late is not None
    assert await texts(late) == ["98", "99", "100"]


async def test_a_new_reader_takes_the_place_of_the_old_one(streams: Streams) -> None:
    reader = streams.open(Source().frames(), farewell, owner="me", resumable=True)
    old = asyncio.create_task(texts(reader))
    await settle()
    new = streams.resume(reader.stream.id, "me", reader.number)
    assert new is not None
    await asyncio.wait_for(old, 5)
    reader.leave()
    assert len(await texts(new, 5)) == 5, "the old one's leaving does not touch the new one"


async def test_a_stopped_stream_says_so_and_its_work_has_ended(streams: Streams) -> None:
    source = Source()
    reader = streams.open(source.frames(), farewell, owner="me", resumable=True)
    reading = asyncio.create_task(texts(reader))
    await settle()
    await streams.stop(reader.stream.id, "me")
    assert source.is_closed
    assert (await asyncio.wait_for(reading, 5))[-1] == "stopped"
    await streams.stop(reader.stream.id, "me")
    with pytest.raises(StreamNotFound):
        await streams.stop(reader.stream.id, "me")


async def test_a_stream_is_forgotten_some_time_after_its_end() -> None:
    streams = Streams(StreamLimits(2, 1_000, keep_seconds=0.05, ping_seconds=15, stall_seconds=60))
    reader = streams.open(Source(1).frames(), farewell, owner="me", resumable=True)
    await texts(reader)
    assert len(streams) == 1
    await asyncio.sleep(0.1)
    assert not len(streams)
    await streams.close()


async def test_those_that_have_ended_make_room_and_those_under_way_do_not(streams: Streams) -> None:
    ended = streams.open(Source(1).frames(), farewell, owner="me", resumable=True)
    await texts(ended)
    for _ in range(2):
        streams.open(Source().frames(), farewell, owner="me", resumable=True)
    with pytest.raises(StreamNotFound):
        streams.resume(ended.stream.id, "me", 0)
    with pytest.raises(Overloaded):
        streams.open(Source().frames(), farewell, owner="me", resumable=True)
    assert await texts(streams.open(Source(1).frames(), farewell, owner="me", resumable=False)) == ["1"]


async def test_closing_ends_what_is_under_way() -> None:
    streams, source = Streams(LIMITS), Source()
    streams.open(source.frames(), farewell, owner="me", resumable=True).leave()
    await settle()
    await streams.close()
    assert source.is_closed


async def test_a_strangers_stream_is_not_found(streams: Streams) -> None:
    reader = streams.open(Source().frames(), farewell, owner="me", resumable=True)
    with pytest.raises(StreamNotFound):
        streams.resume(reader.stream.id, "you", 0)
    with pytest.raises(StreamNotFound):
        await streams.stop(reader.stream.id, "you")
    assert not reader.stream.has_ended
