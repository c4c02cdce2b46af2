"""What every benchmark asks of the machine: the time of a call, and how fast it multiplies."""

import statistics
import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ceiling(dtype: torch.dtype, size: int = 2_048) -> float:
    """FLOP/s of a matrix product."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    times = [seconds(lambda: a @ b) for _ in range(8)]
    return 2 * size**3 / statistics.median(times[2:])
