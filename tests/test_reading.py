"""A document's portions, one ahead of whoever learns them."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from titans_server.errors import InvalidRequest
from titans_server.reading import ahead


class Source:
    """Counts to 3, and remembers how far it was asked."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault = fault
        self.begun: list[int] = []
        self.is_closed = False
        self.stalls = asyncio.Event()  # set: the third item never comes

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for i in (1, 2, 3):
                self.begun.append(i)
                await asyncio.sleep(0)
                if i == 2 and self.fault:
                    raise self.fault
                if i == 3 and self.stalls.is_set():
                    await asyncio.Event().wait()
                yield i
        finally:
            self.is_closed = True


async def test_all_items_come_in_order_each_while_the_one_before_is_dealt_with() -> None:
    source, seen = Source(), list[int]()
    async with aclosing(source.items()) as items, aclosing(ahead(items)) as coming:
        async for item in coming:
            await asyncio.sleep(0.01)
            assert source.begun[-1] == min(item + 1, 3), "the next one is on its way, and no more"
            seen.append(item)
    assert seen == [1, 2, 3]


async def test_what_is_raised_for_the_next_item_comes_when_this_one_has_been_dealt_with() -> None:
    source, seen = Source(InvalidRequest("not UTF-8")), list[int]()
    async with aclosing(source.items()) as items, aclosing(ahead(items)) as coming:
        with pytest.raises(InvalidRequest):
            async for item in coming:
                await asyncio.sleep(0.01)
                seen.append(item)
    assert seen == [1]


async def test_who_leaves_leaves_nothing_under_way() -> None:
    source = Source()
    source.stalls.set()
    before = asyncio.all_tasks()
    async with aclosing(source.items()) as items, aclosing(ahead(items)) as coming:
        async for item in coming:
            if item == 2:
                await asyncio.sleep(0.01)
                assert source.begun == [1, 2, 3]
                break
    assert source.is_closed
    assert asyncio.all_tasks() == before


async def test_who_is_cancelled_while_he_waits_leaves_nothing_under_way() -> None:
    source = Source()
    source.stalls.set()

    async def learn() -> None:
        async with aclosing(source.items()) as items, aclosing(ahead(items)) as coming:
            async for _ in coming:
                pass

    before = asyncio.all_tasks()
    task = asyncio.create_task(learn())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.is_closed
    assert asyncio.all_tasks() == before
