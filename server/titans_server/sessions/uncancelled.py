"""Work that the cancellation of whoever asked for it cannot reach.

A request is cancelled whenever its client leaves. A connection to a store that is cut off between a command and
its answer would give that answer to whoever uses it next (CVE-2023-28858), so no store is ever cut off.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Uncancelled:
    """Runs each operation as a task of its own, and knows which are under way. For one event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()  # the loop itself keeps only weak references

    async def __call__(self, operation: Coroutine[Any, Any, T]) -> T:
        """The operation's result or exception. It is carried through even where the caller is cancelled."""
        task = asyncio.create_task(operation)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    async def drain(self) -> None:
        """Return once all that were under way have ended, well or not."""
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved: a caller that has left must not make asyncio complain
