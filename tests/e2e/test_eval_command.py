"""`titans eval` as a user has it: a real server, or the model in process; the table, the file, the errors."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import TinyCheckpoint
from support.servers import ServerProcess
from titans.evaluation.table import HEAD
from titans_client import Session, Sessions, cli

BOOK = Path(__file__).parents[2] / "examples" / "sherlock-holmes.txt"
TASKS = ["facts", "single_1", "verbatim"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def server(checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess("memory://", tmp_path_factory.mktemp("eval") / "log", checkpoint.environment) as process:
        yield process


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `titans eval` on a short text: its status, its stdout, its stderr."""
    text = tmp_path / "text.txt"
    text.write_text(BOOK.read_text(encoding="utf-8")[20_000:25_000], encoding="utf-8")

    def run(*argv: str) -> tuple[int, str, str]:
        status = cli.main(["eval", "--text", str(text), *argv])
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


def rows(out: str) -> dict[str, list[str]]:
    """The table's rows by task; every line of it is as wide as its head."""
    lines = out.splitlines()
    lines = lines[lines.index(HEAD) + 1 :]
    assert {len(line) for line in lines} == {len(HEAD)}
    return {line.split()[0]: line.split()[1:] for line in lines}


def test_the_same_questions_are_asked_through_a_server_and_in_process(
    run: Run, server: ServerProcess, checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("titans.checkpoint.preferred_dtype", lambda device: torch.float32)  # as the server's
    asked = ["--tokens", "1200", "--samples", "2", "--questions-per-document", "2", "--tasks", *TASKS]
    weights = ["--in-process", "--body", str(checkpoint.body), "--memory", str(checkpoint.memory)]
    ways = {"server": ["--url", server.url], "process": [*weights, "--full-attention"]}
    found: dict[str, list[Any]] = {}
    for name, way in ways.items():
        status, out, err = run(*asked, *way, "--out", str(tmp_path / name), "--plot", str(tmp_path / f"{name}.png"))
        assert status == 0
        table = rows(out)
        assert list(table) == TASKS
        for task, (tokens, num_asked, right, *_) in table.items():
            assert (tokens, num_asked) == ("1,200", "2")
            assert 0 <= int(right) <= 2
            assert f"{task} at 1,200" in err
        assert " of 2" in out
        assert (tmp_path / f"{name}.png").exists()
        found[name] = json.loads((tmp_path / name).read_text())["documents"]
    for there, here in zip(found["server"], found["process"], strict=True):
        assert there["read"] == here["read"] == pytest.approx(1_200, rel=0.2), "bytes, in whole sentences"
        for one, other in zip(there["questions"], here["questions"], strict=True):
            assert (one["values"], one["depths"]) == (other["values"], other["depths"])
            assert one.keys() == {"depths", "values", "memory", "off"}
            assert other.keys() == {"depths", "values", "memory", "off", "full"}
            assert one["memory"]["answer"] != one["off"]["answer"], "the memory makes a difference"
            assert (one["memory"], one["off"]) == (other["memory"], other["off"])


def test_a_run_goes_on_where_its_file_ends(run: Run, server: ServerProcess, tmp_path: Path) -> None:
    out = str(tmp_path / "results.json")
    args = ["--url", server.url, "--tokens", "600", "--samples", "2", "--questions-per-document", "1", "--out", out]
    status, first, _ = run(*args, "--tasks", "facts")
    assert status == 0
    results = json.loads(Path(out).read_text())
    whole = results["documents"][1]
    results["documents"] = [results["documents"][0] | {"read": 7}, results["documents"][1] | {"index": 9}]
    Path(out).write_text(json.dumps(results))
    status, again, _ = run(*args, "--tasks", "facts")
    assert (status, rows(again)) == (0, rows(first))
    kept, _, added = json.loads(Path(out).read_text())["documents"]
    assert (kept["read"], added) == (7, whole), "the first was not read again, and the second was"
    status, _, err = run(*args, "--tasks", "facts", "--seed", "1")
    assert (status, err.count("\n")) == (1, 1)
    assert "results of another seed" in err


def test_no_session_is_left_behind(run: Run, server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    made, create = list[str](), Sessions.create

    def spy(sessions: Sessions, metadata: Mapping[str, str] | None = None) -> Session:
        session = create(sessions, metadata)
        made.append(session.id)
        return session

    monkeypatch.setattr(Sessions, "create", spy)
    assert run("--url", server.url, "--tokens", "600", "--samples", "1", "--tasks", "facts")[0] == 0
    assert len(made) >= 2, "one to measure the text, one to ask"
    assert {server.http.get(f"/v1/sessions/{session}").status_code for session in made} == {404}


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["--tasks", "no_such_task"], 2, "invalid choice: 'no_such_task'"),
        (["--tokens", "many"], 2, "not a number of tokens: 'many'"),
        (["--samples", "0"], 2, "not a number from 1: '0'"),
        (["--tasks", "perplexity"], 2, "perplexity needs --in-process"),
        (["--plot", "/nowhere/recall.png"], 1, "/nowhere is not a folder"),
        (["--full-attention"], 2, "--full-attention needs --in-process"),
        (["--url", "http://127.0.0.1:1"], 1, "cannot connect to http://127.0.0.1:1"),
        (["--url", "nonsense"], 1, "nonsense"),
        (["--in-process", "--body", "/nowhere"], 1, "/nowhere"),
        (["--url", "SERVER", "--tokens", "16K", "--tasks", "verbatim"], 1, "cannot repeat a text to fill 16,384"),
        (["--url", "SERVER", "--tokens", "100", "--tasks", "facts"], 1, "100 tokens are too few for facts"),
        (["--url", "SERVER", "--text", "/nowhere"], 1, "/nowhere: No such file"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(
    run: Run, server: ServerProcess, argv: list[str], status: int, message: str
) -> None:
    found, out, err = run(*[server.url if word == "SERVER" else word for word in argv])
    assert found == status
    assert message in err.splitlines()[-1]
    assert status == 2 or (out, len(err.splitlines())) == ("", 1)


def test_perplexity_is_printed_in_process(run: Run, checkpoint: TinyCheckpoint) -> None:
    weights = ["--in-process", "--body", str(checkpoint.body), "--memory", str(checkpoint.memory)]
    status, out, _ = run(*weights, "--tokens", "300", "--tasks", "perplexity")
    assert status == 0
    (row,) = (line for line in out.splitlines() if line.startswith("all "))
    _, tokens, *nats = row.split()
    assert tokens == "300"
    assert all(0 < float(value) < 20 for value in nats)
    assert len(nats) == 5, "the tiny memory has adapted its body"
