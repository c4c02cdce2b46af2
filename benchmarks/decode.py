"""Time between the tokens of one answer after more and more text, through HTTP, beside others in process.

Ours after a session has read so much; theirs with so much in their cache. Alternating, also between
lengths; medians and ratios.
"""

import argparse
import statistics
from collections import defaultdict

from machine import print_machine, products
from peers import peers
from serving import Book, answer_once, learn, server
from titans.checkpoint import load
from titans_client import Client


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_024, 32_768, 1_000_000])
    parser.add_argument("--peers-up-to", type=int, default=8_192, help="tokens, 0: none; theirs grows with them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    args = parser.parse_args()
    print_machine()
    print(f"{1e3 * products(load().model, 1):.1f} ms a token of products alone")
    book, others = Book(), peers(args.peers_up_to and args.peers_up_to + args.tokens + 8, answering=True)
    print(f"{'tokens':>9} {'ours, ms':>9} {'first':>7}" + "".join(f"{x.name:>14} {'ratio':>7}" for x in others))
    with server() as url, Client(url) as client:
        sessions = {length: learn(client, book.text(length))[0] for length in args.lengths}
        times = {length: defaultdict[str, list[float]](list) for length in args.lengths}
        for _ in range(args.repeats):
            for length, session in sessions.items():
                said = answer_once(url, session, args.tokens)
                times[length]["ours"].append(said.between)
                times[length]["first"].append(said.first)
                for other in others if length <= args.peers_up_to else []:
                    other.read(book.tokens(length))
                    times[length][other.name].append(statistics.mean(other.say(args.tokens)))
        for length, each in times.items():
            ours, first = (1e3 * statistics.median(each.pop(x)) for x in ("ours", "first"))
            line = f"{length:>9,} {ours:>9.1f} {first:>7.0f}"
            for theirs in (1e3 * statistics.median(x) for x in each.values()):
                line += f"{theirs:>14.1f} {theirs / ours:>6.1f}x"
            print(line, flush=True)


if __name__ == "__main__":
    main()
