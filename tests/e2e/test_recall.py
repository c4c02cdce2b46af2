"""The shipped memory through the public door: generated answers, exact match, beside the memory-off control."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.servers import ServerProcess
from titans.evaluation.facts import Fact, make_facts, plant
from titans_client import Client

TEXT = Path(__file__).parents[2] / "examples" / "sherlock-holmes.txt"
NUM_FACTS = 10


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("recall")
    with ServerProcess(f"sqlite:///{folder}/titans.db", folder / "log") as process:
        yield process


def num_right(client: Client, session: str, facts: list[Fact], memory: str) -> int:
    answers = [
        client.complete(session, fact.prompt, temperature=0, max_tokens=32, stop="\n", memory=memory).text  # type: ignore[arg-type]
        for fact in facts
    ]
    return sum(fact.is_answered_by(answer) for fact, answer in zip(facts, answers, strict=True))


def test_facts_far_outside_the_window_are_recalled_and_only_by_the_memory(server: ServerProcess) -> None:
    facts = make_facts(NUM_FACTS, random.Random(3))
    document = (
        plant(TEXT.read_text(encoding="utf-8")[100_000:108_000], facts) + TEXT.read_text(encoding="utf-8")[:3_000]
    )
    with Client(server.url) as client:
        session = client.sessions.create()
        learnt = client.ingest(session.id, document)
        assert learnt.tokens > 2_500, "ten windows: nothing but the memory reaches back"
        assert num_right(client, session.id, facts, "off") == 0
        assert num_right(client, session.id, facts, "read") >= 8, "8 of 10 where it was measured: docs/recall.md"
        assert client.sessions.get(session.id).state_bytes < 8_000_000
