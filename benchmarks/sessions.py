"""What a session weighs, and how soon it answers when it has to be read from the store.

Beside reading its text again, and beside the keys and values that full attention would keep of it.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from machine import print_machine
from serving import Book, answer_once, learn, server
from titans.backbone import find_default_body, load_backbone
from titans_client import Client


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_024, 32_768])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print_machine()
    book, body = Book(), load_backbone(find_default_body()).config
    a_token = 2 * 2 * body.num_layers * body.num_kv_heads * body.head_dim  # keys and values, two bytes each
    heads = ("tokens", "state, MB", "KV cache, MB", "ratio", "cold, s", "warm, s", "read again, s", "ratio")
    print("seconds to the first token\n" + " ".join(f"{head:>13}" for head in heads))
    with (
        tempfile.TemporaryDirectory() as folder,
        server(f"sqlite:///{Path(folder) / 'titans.db'}", resident_bytes="0") as url,  # one state stays: the last used
        Client(url) as client,
    ):
        other, _, _ = learn(client, book.text(300))
        answer_once(url, other, 2)
        for length in args.lengths:
            session, tokens, reading = learn(client, book.text(length))
            cold, warm = [], []
            for _ in range(args.repeats):
                answer_once(url, other, 2)
                cold.append(answer_once(url, session, 2).first)
                warm.append(answer_once(url, session, 2).first)
            size, full = client.sessions.get(session).state_bytes, a_token * tokens
            first, again = statistics.median(cold), statistics.median(warm)
            shown = f"{tokens:,}", f"{size / 1e6:.1f}", f"{full / 1e6:,.0f}", f"{full / size:.0f}x"
            seconds = f"{first:.2f}", f"{again:.2f}", f"{reading + again:.1f}", f"{(reading + again) / first:.0f}x"
            print(" ".join(f"{x:>13}" for x in (*shown, *seconds)), flush=True)


if __name__ == "__main__":
    main()
