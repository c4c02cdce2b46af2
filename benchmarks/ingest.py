"""Reading a text through HTTP until it is durable, beside a prefill by others, the same weights, alternating.

Ours runs the layers below the memory with a window, trains the memory and commits the state; theirs run the whole body
with full attention in process, up to the scores of the next token. Prints medians and ratios.
"""

import argparse
import statistics
from collections import defaultdict

from machine import print_machine
from peers import peers
from serving import Book, learn, server
from titans_client import Client


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2_048, 8_192, 32_768, 131_072])
    parser.add_argument("--peers-up-to", type=int, default=8_192, help="tokens, 0: none; theirs grows with the square")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print_machine()
    book, others = Book(), peers(args.peers_up_to and args.peers_up_to + 8, answering=False)
    print(f"{'tokens':>8} {'ours, tokens/s':>15}" + "".join(f"{x.name:>15} {'ratio':>7}" for x in others))
    with server() as url, Client(url) as client:
        learn(client, book.text(512))
        for other in others:
            other.read(book.tokens(min(512, args.peers_up_to)))
        for length in args.lengths:
            rates = defaultdict[str, list[float]](list)
            for _ in range(args.repeats):
                _, tokens, took = learn(client, book.text(length))
                rates["ours"].append(tokens / took)
                for other in others if length <= args.peers_up_to else []:
                    rates[other.name].append(length / other.read(book.tokens(length)))
            ours = statistics.median(rates.pop("ours"))
            line = f"{length:>8,} {ours:>15,.0f}"
            for theirs in map(statistics.median, rates.values()):
                line += f"{theirs:>15,.0f} {ours / theirs:>6.1f}x"
            print(line, flush=True)


if __name__ == "__main__":
    main()
