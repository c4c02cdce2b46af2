"""What HTTP and SSE cost: answers through a server beside the same engine called in process, alternating."""

import argparse
import asyncio
import statistics
import time

import torch
from machine import print_machine
from serving import PROMPT, Book, answer, learn, server
from titans.checkpoint import load
from titans.sampling import SamplingParams
from titans.state import State
from titans_client import Client
from titans_server.engine import Engine
from titans_server.engine.runner import Runner

GREEDY = SamplingParams(temperature=0, logit_bias=((0, -100.0), (2, -100.0)))


async def through_http(url: str, sessions: list[str], count: int) -> float:
    """Tokens a second."""
    started = time.perf_counter()
    answers = await asyncio.gather(*(answer(url, session, count) for session in sessions))
    return sum(said.num_tokens for said in answers) / (time.perf_counter() - started)


async def in_process(runner: Runner, states: list[State], prompt: list[int], count: int) -> float:
    """Tokens a second."""
    engine = Engine([runner], ends={2})
    engine.start()

    async def one(state: State) -> int:
        return len([x async for x in engine.generate(state, prompt, max_tokens=count, sampling=GREEDY)]) - 1

    started = time.perf_counter()
    num_tokens = sum(await asyncio.gather(*map(one, states)))
    rate = num_tokens / (time.perf_counter() - started)
    await engine.close()
    return rate


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print_machine()
    loaded, book = load(), Book()
    runner, prompt = Runner(loaded.model), book.tokenizer.encode(PROMPT)
    print(f"{'answers':>8} {'HTTP, tok/s':>12} {'in process':>12} {'share':>7}")
    with server() as url, Client(url) as client:
        sessions = [learn(client, book.text(512, 512 * i))[0] for i in range(max(args.sessions))]
        empty = loaded.model.new_state()
        states = [
            loaded.model.ingest(torch.tensor([book.tokens(512, 512 * i)], device=loaded.model.device), empty)
            for i in range(max(args.sessions))
        ]
        for num in args.sessions:
            theirs, ours = [], []
            for _ in range(args.repeats + 1):
                ours.append(asyncio.run(through_http(url, sessions[:num], args.tokens)))
                theirs.append(asyncio.run(in_process(runner, states[:num], prompt, args.tokens)))
            a, b = (statistics.median(x[1:]) for x in (ours, theirs))
            print(f"{num:>8} {a:>12.1f} {b:>12.1f} {a / b:>6.0%}", flush=True)


if __name__ == "__main__":
    main()
