import asyncio
import threading
from collections.abc import Callable

import pytest
from titans.sampling import Drawn
from titans_server.engine.mailbox import Answer, Mailbox


async def test_what_comes_together_wakes_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, calls = asyncio.get_running_loop(), list[Callable[[], object]]()
    call, mailbox = loop.call_soon_threadsafe, Mailbox(loop)

    def noted(callback: Callable[[], object]) -> asyncio.Handle:
        calls.append(callback)
        return call(callback)

    monkeypatch.setattr(loop, "call_soon_threadsafe", noted)
    queues = [asyncio.Queue[Answer]() for _ in range(16)]
    for turn in (1, 2):
        for token, queue in enumerate(queues):
            mailbox.send(queue, Drawn(token))
        assert [await queue.get() for queue in queues] == [Drawn(token) for token in range(16)]
        assert len(calls) == turn


async def test_nothing_is_lost_or_overtaken_whoever_sends_at_once() -> None:
    mailbox, queues = Mailbox(asyncio.get_running_loop()), [asyncio.Queue[Answer]() for _ in range(4)]

    def send(queue: asyncio.Queue[Answer]) -> None:
        for token in range(5_000):
            mailbox.send(queue, Drawn(token))

    threads = [threading.Thread(target=send, args=(queue,)) for queue in queues]
    for thread in threads:
        thread.start()
    for queue in queues:
        async with asyncio.timeout(30):
            assert [await queue.get() for _ in range(5_000)] == [Drawn(token) for token in range(5_000)]
    for thread in threads:
        thread.join()


def test_a_loop_that_has_gone_is_left_alone() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    Mailbox(loop).send(asyncio.Queue(), Drawn(1))
