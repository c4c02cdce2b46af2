"""The main job, shown: a book goes into a session, and the session answers what only its memory can know.

Starts the server on the embedded store, plants ten seven-digit numbers in the text, asks for them with the memory
and without it, restarts the server and asks again. `make demo` runs it; it needs no network and no GPU.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from titans.evaluation.facts import Fact, make_facts, plant
from titans_client import Client, Document, Progress, TitansError
from tqdm import tqdm

BOOK = Path(__file__).parent / "sherlock-holmes.txt"
PORT = 8137
SHORT = 64_000  # characters, about 16,000 tokens
NUM_FACTS = 10


@contextmanager
def server(folder: Path) -> Iterator[Client]:
    """`titans serve` on the embedded store in `folder`, ready; ended by SIGTERM."""
    store = f"sqlite:///{folder}/titans.db"
    command = [sys.executable, "-m", "titans_server", "--port", str(PORT), "--store", store]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"TITANS_LOG_LEVEL": "warning"})
    try:
        with Client(f"http://127.0.0.1:{PORT}") as client:
            try:
                health = client.wait_until_ready(is_alive=lambda: process.poll() is None)
            except TitansError as error:
                raise SystemExit(f"the server did not start: {error}\n{(folder / 'server.log').read_text()}") from None
            print(f"serving {health.model} on {health.device}, sessions in {health.store}")
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def learn(client: Client, text: str) -> tuple[str, Document]:
    """Post a text into a new session, with a progress bar."""
    session = client.sessions.create()
    data = text.encode()
    with tqdm(total=len(data), unit="B", unit_scale=True, desc="  learning", leave=False) as bar:
        for event in client.ingest_stream(session.id, data):
            bar.update(event.bytes - bar.n)
            bar.set_postfix_str(f"{event.tokens / max(event.seconds, 1e-9):,.0f} tokens/s")
            if not isinstance(event, Progress):
                return session.id, event
    raise AssertionError("an ingestion ends with the document")


def ask(client: Client, session: str, facts: list[Fact], memory: Literal["read", "off"]) -> list[str]:
    """Stream an answer to each question; print it as it comes."""
    answers = []
    for fact in facts:
        print(f"  {fact.question:<62}", end="", flush=True)
        answer = ""
        for chunk in client.stream(session, fact.prompt, memory=memory, temperature=0, max_tokens=32, stop="\n"):
            print(chunk.text, end="", flush=True)
            answer += chunk.text
        print("   ✓" if fact.is_answered_by(answer) else f"   ✗ {fact.value}")
        answers.append(answer)
    right = sum(f.is_answered_by(a) for f, a in zip(facts, answers, strict=True))
    print(f"  memory {'on' if memory == 'read' else 'off'}: {right} of {len(facts)} right\n")
    return answers


def show(client: Client, title: str, text: str, facts: list[Fact]) -> tuple[str, list[str]]:
    """One document: learn it, ask with the memory, ask without."""
    print(f"\n{title}")
    session, document = learn(client, plant(text, facts))
    rate = document.tokens / document.seconds
    state = client.sessions.get(session).state_bytes
    print(
        f"  learnt {document.tokens:,} tokens in {document.seconds:.1f} s, {rate:,.0f} tokens/s; "
        f"the session is {state:,} bytes\n"
    )
    answers = ask(client, session, facts, "read")
    ask(client, session, facts, "off")
    return session, answers


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="the 16,000 tokens only, not the whole book")
    args = parser.parse_args()
    text = BOOK.read_text(encoding="utf-8")
    facts = make_facts(2 * NUM_FACTS, random.Random(7))
    asked = []
    with tempfile.TemporaryDirectory(prefix="titans-demo-") as name:
        folder = Path(name)
        with server(folder) as client:
            part = facts[:NUM_FACTS]
            asked.append((*show(client, "Ten facts in 16,000 tokens of a book", text[:SHORT], part), part))
            if not args.short:
                part = facts[NUM_FACTS:]
                asked.append((*show(client, "Ten facts in the whole book", text, part), part))
        print("The server has ended; another process takes over.")
        with server(folder) as client:
            for session, before, part in asked:
                after = ask(client, session, part, "read")
                print(f"  {'the same answers' if after == before else 'OTHER ANSWERS'} as before the restart\n")


if __name__ == "__main__":
    main()
