"""Answers that are told at once, gathered as they come.

What is told of a long answer's tokens is megabytes of JSON: made at its end, it would keep the event loop from others.
"""

import re
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from titans_server.api.sse import as_json

_MARK = re.compile('"([0-9a-f]{32})"')


class JsonList:
    """A list whose items are JSON from when they come. Its mark stands for it in an object, until `filled`."""

    def __init__(self) -> None:
        self.mark = secrets.token_hex(16)
        self._items: list[str] = []

    def extend(self, items: Sequence[Any]) -> None:
        """More items."""
        if items:
            self._items.append(as_json(items)[1:-1])

    def __str__(self) -> str:
        return f"[{','.join(self._items)}]"


def filled(text: str, lists: Iterable[JsonList]) -> str:
    """JSON with lists in the places of their marks."""
    by_mark = {each.mark: each for each in lists}
    return _MARK.sub(lambda found: str(by_mark.get(found[1], found[0])), text)
