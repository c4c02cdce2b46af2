"""What the memory gives back through the server, generated and exact, beside the same sessions with it off.

Starts a server that keeps its sessions in memory and has `titans eval` ask it for the project's own facts, ten a
document. `titans eval` has the other tasks, and runs that go on where they were cut.
"""

import argparse

from serving import server
from titans_client import cli

FACTS = 10


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", default=["4000", "16000"])
    parser.add_argument("--documents", type=int, default=5)
    args = parser.parse_args()
    asked = ["--tokens", *args.tokens, "--samples", str(FACTS * args.documents)]
    with server() as url:
        raise SystemExit(cli.main(["--url", url, "eval", "--tasks", "facts", *asked]))


if __name__ == "__main__":
    main()
