"""What is tried until it succeeds: the pauses between the tries, and what the log says of each."""

import asyncio
import logging

from titans_server.errors import TitansError


class Retries:
    """The failures so far of one thing. Each pause is twice the one before."""

    def __init__(self, log: logging.Logger, what: str, *, first: float, most: float) -> None:
        """`what`: what does not work, as the log says it. `first`, `most`: seconds, of the first pause and of any."""
        self._log = log
        self._what = what
        self._seconds = first
        self._most = most
        self._told: type[Exception] | None = None  # of which the log has a traceback

    async def pause(self, error: Exception) -> None:
        """Log a failure in one line, an unforeseen one the first time with its traceback; wait for the next try."""
        if isinstance(error, TitansError):
            self._log.warning("%s: %s", self._what, error)
        else:
            is_new, self._told = type(error) is not self._told, type(error)
            self._log.error("%s: a fault of the server's: %r", self._what, error, exc_info=error if is_new else None)
        seconds, self._seconds = self._seconds, min(self._most, 2 * self._seconds)
        await asyncio.sleep(seconds)
