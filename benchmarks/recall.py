"""Row 8: what the memory gives back through the server, generated and exact, beside the same sessions with it off.

Several documents, each a part of the book with ten facts of the test split planted in it, go into a session each; then
the facts are asked for. Prints how many are right with a 95 % interval (Wilson 1927), for every length.
"""

import argparse
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from titans.evaluation.facts import Fact, make_facts, plant
from titans_client import APIConnectionError, Client, ServerUnavailableError

BOOK = Path(__file__).parents[1] / "examples" / "sherlock-holmes.txt"
CHARACTERS = 4.1  # of the book to a token, about
FACTS = 10
PORT = 8138


@contextmanager
def server() -> Iterator[Client]:
    """One that keeps its sessions in memory, ready."""
    process = subprocess.Popen([sys.executable, "-m", "titans_server", "--port", str(PORT), "--store", "memory://"])
    try:
        with Client(f"http://127.0.0.1:{PORT}") as client:
            while True:
                try:
                    client.health()
                    break
                except (APIConnectionError, ServerUnavailableError):
                    if process.poll() is not None:
                        raise SystemExit("the server did not start") from None
                    time.sleep(0.2)
            yield client
    finally:
        process.terminate()
        process.wait()


def num_right(client: Client, session: str, facts: list[Fact], *, recall: bool) -> int:
    """Of greedy answers, those that name the fact's number first."""
    right = 0
    for fact in facts:
        memory = "read" if recall else "off"
        answer = client.complete(session, fact.prompt, temperature=0, max_tokens=32, stop="\n", memory=memory)  # type: ignore[arg-type]
        right += fact.is_answered_by(answer.text)
    return right


def interval(right: int, total: int) -> str:
    """Wilson's 95 % score interval."""
    z, share = 1.96, right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return f"{middle - reach:.0%} to {middle + reach:.0%}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4_000, 16_000])
    parser.add_argument("--documents", type=int, default=5)
    args = parser.parse_args()
    book = BOOK.read_text(encoding="utf-8")
    with server() as client:
        print(f"{'tokens':>8} {'asked':>6} {'right':>6} {'95 % interval':>16} {'memory off':>11}")
        for length in args.tokens:
            size, total, on, off = int(length * CHARACTERS), 0, 0, 0
            for i in range(args.documents):
                facts = make_facts(FACTS, random.Random(f"{length}/{i}"))
                start = i * max(0, len(book) - size) // max(1, args.documents - 1)
                session = client.sessions.create().id
                client.ingest(session, plant(book[start : start + size], facts))
                total += FACTS
                on += num_right(client, session, facts, recall=True)
                off += num_right(client, session, facts, recall=False)
                client.sessions.delete(session)
            print(f"{length:>8,} {total:>6} {on:>6} {interval(on, total):>16} {off:>11}", flush=True)


if __name__ == "__main__":
    main()
