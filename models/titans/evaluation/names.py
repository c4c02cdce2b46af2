"""Which tokens of a text are of names that it has said before, but not of late: what a window alone cannot see."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from titans.tokenizer import Tokenizer

_NAME, _WORD = re.compile(rb"\b[A-Z][a-z]{3,}\b"), re.compile(rb"\b[a-z]+\b")


def met_again(tokens: Sequence[int], tokenizer: Tokenizer, window: int) -> list[int]:
    """The places, in `tokens`, of the tokens of such names.

    A name is a word of four letters or more, in ASCII, that has a capital wherever the text has it. It is met again
    where it was said before, and last more than `window` tokens ago.
    """
    pieces = [tokenizer.token_bytes(token) for token in tokens]
    text, ends = b"".join(pieces), [*accumulate(map(len, pieces))]
    common = {*_WORD.findall(text)}
    said: dict[bytes, int] = {}  # where a name ended last
    places: list[int] = []
    for match in _NAME.finditer(text):
        name, first, last = match[0], bisect_right(ends, match.start()), bisect_right(ends, match.end() - 1)
        if name.lower() in common:
            continue
        if name in said and first - said[name] > window:
            places += range(first, last + 1)
        said[name] = last
    return places
