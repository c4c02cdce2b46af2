"""The memory alone: our deep memory beside titans-pytorch's `NeuralMemory`, the same shape, one run, alternating.

Width 512, 4 heads of 128, a two-layer perceptron of expansion 4 with momentum and forgetting, every token written and
read. Each figure is the median of several runs in a process of its own, which also gives the peak of its memory.
Prints tokens a second, peak bytes above the start, the ratios, and the share of the measured float32 matrix product
that ours reaches. "compiled" is ours with a chunk's step through torch.compile (it needs a C++ compiler on a CPU);
"again" is the backward pass with `memory.checkpointing`: chunks are computed again, not kept.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from machine import ceiling, seconds
from titans import MemoryConfig, NeuralMemory

SIZE, HEADS, HEAD, EXPANSION = 512, 4, 128, 4
_BUDGET = 10.0  # seconds for one figure, about
Forward = Callable[[torch.Tensor], torch.Tensor]


def ours(chunk: int, *, way: str) -> tuple[torch.nn.Module, Forward]:
    """Every equation of the paper's memory, chunk rule."""
    shape = MemoryConfig(num_heads=HEADS, key_dim=HEAD, value_dim=HEAD, chunk_size=chunk)
    memory = NeuralMemory(replace(shape, momentum=True, rule="chunk", depth=2, expansion=EXPANSION), SIZE)
    memory.checkpointing = way == "again"
    if way == "compiled":
        memory.rule.step = torch.compile(memory.rule.step, dynamic=False)  # type: ignore[method-assign]
    return memory, lambda h: memory(h, memory.new_state(h.shape[0]))[0]


def theirs(chunk: int) -> tuple[torch.nn.Module, Forward]:
    """The same shape, gradients taken at the start of each chunk."""
    import titans_pytorch  # noqa: PLC0415 — the bench extra

    inner = titans_pytorch.MemoryMLP(HEAD, depth=2, expansion_factor=EXPANSION)
    shape = {"dim_head": HEAD, "heads": HEADS, "chunk_size": chunk, "batch_size": chunk}
    memory = titans_pytorch.NeuralMemory(SIZE, **shape, model=inner)
    return memory, lambda h: memory(h)[0]


def measure(side: str, chunk: int, batch: int, tokens: int, *, backward: bool) -> None:
    """One figure; prints it as JSON."""
    limit = int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # what needs more is to fail, and alone
    torch.manual_seed(0)
    memory, forward = theirs(chunk) if side == "theirs" else ours(chunk, way=side)
    h = torch.randn(batch, tokens, SIZE)

    def work() -> None:
        with torch.set_grad_enabled(backward):
            y = forward(h)
            if backward:
                memory.zero_grad()
                y.square().mean().backward()

    before, times = peak(), list[float]()
    work()  # what happens once
    while len(times) < 2 or (sum(times) < _BUDGET and len(times) < 7):
        times.append(seconds(work))
    rate = batch * tokens / statistics.median(times)
    print(json.dumps({"rate": rate, "bytes": peak() - before}))


def peak() -> int:
    """Most bytes this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_process(side: str, chunk: int, batch: int, tokens: int, *, backward: bool) -> dict[str, float] | None:
    """`measure` in a process of its own; None where it does not end well, out of memory above all: stderr says why."""
    command = [sys.executable, __file__, "--measure", side, str(chunk), str(batch), str(tokens), str(int(backward))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{side}: {(done.stderr.splitlines() or ['killed'])[-1]}", file=sys.stderr)
        return None
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def operations(chunk: int) -> float:
    """Multiplications and additions a token of our forward pass, projections and memory, in matrix products."""
    width, hidden = HEADS * HEAD, EXPANSION * HEAD
    projections = 2 * SIZE * width * 5  # queries, keys, values, the gate and the way out
    layers = ((HEAD, hidden), (hidden, HEAD))
    dense = HEADS * sum(2 * i * o * 5 for i, o in layers)  # of each: keys; queries on W and S; updates of W and S
    dense += HEADS * 2 * HEAD * hidden  # errors, back through the last layer
    causal = HEADS * sum(2 * chunk * (i + o) for i, o in layers) + HEADS * 2 * 2 * chunk * chunk
    return projections + dense + causal


def rows(limit: float, chunk: int, batch: int, tokens: int, *, backward: bool) -> Iterator[str]:
    """Lines of the table; ours and the peer's one after the other. `limit`: operations a second of a product."""
    sides = ("theirs", "ours", "again" if backward else "compiled")
    figures = {side: in_process(side, chunk, batch, tokens, backward=backward) for side in sides}
    theirs = figures.pop("theirs")
    for side, own in figures.items():
        name = f"{chunk:>5} {batch:>5}  {side if side != 'ours' else 'fwd+bwd' if backward else 'forward':<8}"
        if own is None:
            yield f"{name} {'did not end':>19}"
            continue
        line = f"{name} {own['rate']:>9,.0f} {own['bytes'] / 1e6:>9,.0f}"
        if theirs is None:
            yield f"{line} {'did not end':>20}"
            continue
        share = "" if backward else f" {own['rate'] * operations(chunk) / limit:>8.0%}"
        ratios = f"{own['rate'] / theirs['rate']:>7.1f}x {theirs['bytes'] / max(own['bytes'], 1):>7.1f}x"
        yield f"{line} {theirs['rate']:>9,.0f} {theirs['bytes'] / 1e6:>9,.0f} {ratios}{share}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        side, chunk, batch, tokens, backward = args.measure
        measure(side, int(chunk), int(batch), int(tokens), backward=backward == "1")
        return
    limit = max(ceiling(torch.float32) for _ in range(3))
    print(f"{torch.get_num_threads()} threads, {limit / 1e12:.2f} TFLOP/s float32 product, {args.tokens:,} tokens")
    print("chunk batch  pass     ours tok/s, MB      theirs tok/s, MB    speed   memory  ceiling")
    for backward in (False, True):
        for chunk in args.chunks:
            for batch in args.batches:
                for line in rows(limit, chunk, batch, args.tokens, backward=backward):
                    print(line, flush=True)


if __name__ == "__main__":
    main()
