"""Many sessions at once, each making an answer, a quarter as many learning a document: through HTTP.

Beside the same answers one by one, beside what the products of a step alone would allow and, where there are no
documents, beside llama.cpp with as many slots, in process.
"""

import argparse
import asyncio
import itertools
import statistics
import time

import httpx
from machine import print_machine, products
from peers import LlamaCppSlots, has_llama_cpp
from serving import PROMPT, Answer, Book, answer, learn, server
from titans.checkpoint import load
from titans_client import AsyncClient, Client


async def together(
    url: str, sessions: list[str], count: int, documents: list[str]
) -> tuple[list[Answer], float, float]:
    """All answers at once while documents are learnt; the documents' share of the server's time; seconds."""

    async def read(text: str) -> None:
        async with AsyncClient(url) as client:
            session = (await client.sessions.create()).id
            async for _ in client.ingest_stream(session, text):
                pass  # a stream that is cut is noticed at once; without one the rest of the text would still be learnt

    async def learning() -> float:
        metrics = (await http.get("/metrics")).text
        (line,) = (line for line in metrics.splitlines() if line.startswith("titans_chunk_seconds_sum"))
        return float(line.split()[-1])

    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=None)) as http:
        before, reading = await learning(), [asyncio.create_task(read(text)) for text in documents]
        started = time.perf_counter()
        answers = await asyncio.gather(*(answer(url, session, count) for session in sessions))
        seconds, learnt = time.perf_counter() - started, await learning() - before
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
    return answers, learnt / seconds, seconds


def with_slots(book: Book, num: int, count: int) -> float:
    """Tokens a second of llama.cpp: as many answers of as many tokens, each of 512 tokens of its own."""
    peer = LlamaCppSlots(num, 512 + count + 8, flash=False)
    for slot in range(num):
        peer.read(slot, book.tokens(512, 512 * slot))
    seconds = peer.say(book.tokenizer.encode(PROMPT), count)
    peer.close()
    return num * count / seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    args = parser.parse_args()
    print_machine()
    book, model = Book(), load().model
    print("learning: the documents' share of the time; slowest: the last answer's time in the first one's;")
    print("ceiling: what the products of a step alone would allow, as measured before the server has started")
    products_alone = {num: products(model, num) for num in args.sessions}
    heads = (
        *("sessions", "documents", "said, tok/s", "learning", "p50, ms", "p99, ms", "slowest", "ceiling"),
        *(("llama.cpp", "ratio") if has_llama_cpp() else ()),
    )
    print(" ".join(f"{head:>13}" for head in heads))
    with server(max_requests="512") as url, Client(url) as client:
        sessions = [learn(client, book.text(512, 512 * i))[0] for i in range(max(args.sessions))]
        first = asyncio.run(together(url, sessions, 1, []))[2] / len(sessions)
        print(f"{1e3 * first:.0f} ms a session to open it for its first answer; from here on they are open")
        for num, share in itertools.product(args.sessions, (0, 4)):
            documents = [book.text(20_000)] * (max(1, num // share) if share else 0)
            answers, learnt, took = asyncio.run(together(url, sessions[:num], args.tokens, documents))
            gaps = sorted(b - a for said in answers for a, b in itertools.pairwise(said.times))
            rate = sum(said.num_tokens for said in answers) / took
            p50, p99 = (1e3 * gaps[int(len(gaps) * q)] for q in (0.5, 0.99))
            ends = [said.times[-1] for said in answers]
            shown = f"{rate:.1f}", f"{learnt:.0%}", f"{p50:.0f}", f"{p99:.0f}", f"{max(ends) / min(ends):.2f}"
            share_of_ceiling = f"{rate * products_alone[num] / num:.0%}"
            theirs = []
            if not documents and has_llama_cpp():
                peer = with_slots(book, num, args.tokens)
                theirs = [f"{peer:.1f}", f"{rate / peer:.1f}x"]
            print(" ".join(f"{x:>13}" for x in (num, len(documents), *shown, share_of_ceiling, *theirs)), flush=True)
        one_by_one = [asyncio.run(together(url, [session], args.tokens, [])) for session in sessions[:4]]
        rate = statistics.median(args.tokens / took for _, _, took in one_by_one)
        print(f"one by one: {rate:.1f} tokens/s")


if __name__ == "__main__":
    main()
