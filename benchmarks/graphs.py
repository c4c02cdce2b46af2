"""On a CUDA device, in process: the engine's steps as CUDA graphs beside the same steps kernel by kernel, alternating.

Reading: a window's tokens of each of so many sessions; answers: a token of each. Then few documents that are
read several windows at a time beside a window at a time, both in graphs; what comes before an answer's first token; and
what it takes to move a session's state between device and host, through memory that is pinned and memory that is not.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from machine import print_machine, seconds
from serving import Book
from titans.checkpoint import load
from titans.model import TitansModel
from titans.state import State, Stream
from titans_server.engine.graphs import GraphSteps
from titans_server.engine.steps import Steps


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("graphs need a CUDA device: nothing is measured")
        return
    print_machine()
    model, book = load().model, Book()
    window, kinds = model.config.window, (GraphSteps(model), Steps(model))
    print(f"{'':>8} {'reading, tokens/s':>30} {'':>7} {'a token of each answer, ms':>30} {'':>7}")
    print(f"{'sessions':>8} {'graphs':>15} {'kernels':>14} {'ratio':>7} {'graphs':>15} {'kernels':>14} {'ratio':>7}")
    for count in args.sessions:
        parts = [book.tokens(window, window * i) for i in range(count)]
        states = [model.new_state() for _ in range(count)]
        took = defaultdict[str, list[float]](list)
        with torch.inference_mode():
            pools = [steps.new_pool(count) for steps in kinds]
            for pool in pools:
                for state in states:
                    pool.join(model.open(state))
            for _ in range(args.repeats):
                for name, steps, pool in zip(("graphs", "kernels"), kinds, pools, strict=True):
                    took[f"say {name}"].append(seconds(_to_the_end(partial(steps.decode, pool, [5] * count))))
        for _ in range(args.repeats):
            for name, steps in zip(("graphs", "kernels"), kinds, strict=True):
                took[f"read {name}"].append(seconds(partial(_read, steps, parts, states)))
        middle = {name: statistics.median(times[3:]) for name, times in took.items()}
        read = [count * window / middle[f"read {name}"] for name in ("graphs", "kernels")]
        say = [1e3 * middle[f"say {name}"] for name in ("graphs", "kernels")]
        line = f"{count:>8} {read[0]:>15,.0f} {read[1]:>14,.0f} {read[0] / read[1]:>6.1f}x"
        print(f"{line} {say[0]:>15.2f} {say[1]:>14.2f} {say[1] / say[0]:>6.1f}x", flush=True)
    _print_wide(kinds[0], model, book, args.repeats)
    _print_beginnings(kinds, states[0], book, args.repeats)
    _print_moves(states[0], args.repeats)


def _read(steps: Steps, parts: list[list[int]], states: list[State]) -> None:
    steps.ingest(parts, states)
    torch.cuda.synchronize()


def _print_wide(steps: Steps, model: TitansModel, book: Book, repeats: int) -> None:
    """Whole blocks, and such as a document has that begins somewhere in a window."""
    widest, window = steps.largest_block, model.config.window
    print(f"\n{'':>8} {'':>12} {'reading in graphs, tokens/s':>32}")
    print(f"{'sessions':>8} {'tokens each':>12} {'a block':>15} {'a window':>16} {'ratio':>7}")
    for count, length in ((1, widest), (1, widest - 44), (2, widest), (4, widest)):
        documents = [book.tokens(length, widest * i) for i in range(count)]
        states, took = [model.new_state() for _ in documents], defaultdict[int, list[float]](list)
        for _ in range(repeats):
            for size in (widest, window):
                took[size].append(seconds(_to_the_end(partial(_read_in_blocks, steps, documents, states, size))))
        wide, narrow = (count * length / statistics.median(took[size][3:]) for size in (widest, window))
        print(f"{count:>8} {length:>12} {wide:>15,.0f} {narrow:>16,.0f} {wide / narrow:>6.1f}x", flush=True)


def _read_in_blocks(steps: Steps, documents: list[list[int]], states: list[State], size: int) -> None:
    for start in range(0, len(documents[0]), size):
        states = steps.ingest([tokens[start : start + size] for tokens in documents], states)


def _print_beginnings(kinds: tuple[Steps, Steps], state: State, book: Book, repeats: int) -> None:
    works: dict[str, Callable[[Steps], Callable[[], object]]] = {
        "opening a session": lambda steps: partial(_open, steps, state)
    }
    for count in (12, 60, 250):
        works[f"a prompt of {count} tokens"] = partial(_prompt, book.tokens(count), state)
    for count in (12, 60, 250):
        works[f"{count} tokens of a document"] = partial(_part, book.tokens(count), state)
    print(f"\n{'':<30} {'graphs, ms':>12} {'kernels, ms':>12} {'ratio':>7}")
    for name, work in works.items():
        took = defaultdict[Steps, list[float]](list)
        for _ in range(repeats):
            for steps in kinds:
                took[steps].append(seconds(_to_the_end(work(steps))))
        graphs, kernels = (1e3 * statistics.median(took[steps][3:]) for steps in kinds)
        print(f"{name:<30} {graphs:>12.2f} {kernels:>12.2f} {kernels / graphs:>6.1f}x", flush=True)


@torch.inference_mode()
def _open(steps: Steps, state: State) -> Stream:
    *_, stream = steps.opening(state)
    assert stream is not None
    return stream.map(lambda _, x: x.clone())


def _prompt(tokens: list[int], state: State, steps: Steps) -> Callable[[], object]:
    return partial(torch.inference_mode()(steps.read), tokens, _open(steps, state))


def _part(tokens: list[int], state: State, steps: Steps) -> Callable[[], object]:
    return partial(steps.ingest, [tokens], [state])


def _to_the_end(work: Callable[[], object]) -> Callable[[], None]:
    def done() -> None:
        work()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return done


def _print_moves(state: State, repeats: int) -> None:
    def out(state: State, pinned: bool) -> State:
        there = state.map(lambda _, x: torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned))
        parts = there.parts()
        state.map(lambda name, x: parts[name].copy_(x, non_blocking=pinned))
        torch.cuda.synchronize()
        return there

    def back(state: State, pinned: bool) -> None:
        state.map(lambda _, x: x.to("cuda", non_blocking=pinned))
        torch.cuda.synchronize()

    for pinned in (False, True):
        there = out(state, pinned)
        times = [(seconds(partial(out, state, pinned)), seconds(partial(back, there, pinned))) for _ in range(repeats)]
        to_host, to_device = (1e3 * statistics.median(x[3:]) for x in zip(*times, strict=True))
        kind = "pinned" if pinned else "pageable"
        print(f"a state of {state.num_bytes / 1e6:.1f} MB, {kind}: {to_host:.2f} ms out, {to_device:.2f} ms back")


if __name__ == "__main__":
    main()
