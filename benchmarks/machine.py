"""What every benchmark asks of the machine: the time of a call, how fast it multiplies, copies and reads weights."""

import statistics
import time
from collections.abc import Callable

import torch
from titans.checkpoint import preferred_device
from titans.model import TitansModel
from titans.native.matrix import Team
from titans.packed import PackedLinear
from torch import Tensor


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def finished(x: Tensor) -> Tensor:
    """`x`, once it is there."""
    if x.is_cuda:
        torch.cuda.synchronize()
    return x


def ceiling(dtype: torch.dtype, size: int = 2_048) -> float:
    """FLOP/s of a matrix product."""
    a, b = (torch.randn(size, size).to(preferred_device(), dtype) for _ in range(2))
    times = [seconds(lambda: finished(a @ b)) for _ in range(8)]
    return 2 * size**3 / statistics.median(times[2:])


def copying(megabytes: int = 256) -> float:
    """Bytes a second, read and written, of a copy."""
    source = torch.zeros(megabytes << 18, device=preferred_device())
    target = torch.empty_like(source)
    times = [seconds(lambda: finished(target.copy_(source))) for _ in range(6)]
    return 2 * source.numel() * 4 / statistics.median(times[1:])


@torch.inference_mode()
def products(model: TitansModel, rows: int) -> float:
    """Seconds of a token's large matrix products for `rows` answers at once: what a step cannot go below.

    The model is not good for much else afterwards: its kernels have one thread.
    """
    if model.device.type != "cpu":
        return float("nan")  # a step there is not bound by products
    layers = [x for x in model.modules() if isinstance(x, PackedLinear)]
    matrices = [x.native for x in layers if x.native]
    for matrix in matrices:  # one by one: to wake others for every single product takes longer than a product
        matrix.team = Team(1)
    num_threads = torch.get_num_threads() if matrices else 1
    inputs = {x.num_inputs: torch.randn(rows, x.num_inputs).to(model.dtype) for x in layers}
    times = [seconds(lambda: [x(inputs[x.num_inputs]) for x in layers]) for _ in range(12)]
    return statistics.median(times[2:]) / num_threads


def print_machine() -> None:
    """One line: what the numbers below were measured on."""
    flops, copied = ceiling(torch.bfloat16) / 1e12, copying() / 1e9
    device = torch.cuda.get_device_name() if preferred_device().type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{device}, {flops:.2f} TFLOP/s bfloat16 product, {copied:.0f} GB/s copied", flush=True)
