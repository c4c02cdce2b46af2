"""The way back: answers from the compute threads to an event loop."""

import asyncio
from collections import deque

from titans.sampling import Drawn

from titans_server.engine.request import Finish, Read

Answer = Read | Drawn | Finish | BaseException


class Mailbox:
    """One event loop's. However many answers come together, it is woken once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._letters = deque[tuple[asyncio.Queue[Answer], Answer]]()
        self._is_due = False  # the loop has been called, and has yet to come

    def send(self, answers: asyncio.Queue[Answer], answer: Answer) -> None:
        """Have an answer put in one of the loop's queues. For any thread."""
        self._letters.append((answers, answer))
        if not self._is_due and not self.loop.is_closed():
            self._is_due = True
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_due = False  # first: a letter that comes too late to be taken along calls again
        while self._letters:
            answers, answer = self._letters.popleft()
            answers.put_nowait(answer)
