"""How much is tried: everything in `make chaos`, which sets CHAOS=whole, otherwise what represents it."""

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

WHOLE = os.environ.get("CHAOS") == "whole"


def whole_or(representative: T, everything: T) -> T:
    """One or the other."""
    return everything if WHOLE else representative


def first(number: int, everything: Sequence[T]) -> Sequence[T]:
    """Everything, or as many as represent it; so the telling ones stand first."""
    return everything if WHOLE else everything[:number]
