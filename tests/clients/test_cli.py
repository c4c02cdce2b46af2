"""The `titans` command line against a real server: what it prints where, and how it ends."""

import io
import json
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from titans_client import Client, _extensions, _terminal, cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(contract: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run one command line: its status, its stdout, its stderr."""
    monkeypatch.setenv("TITANS_BASE_URL", contract.url)

    def run(*argv: str) -> tuple[int, str, str]:
        status = cli.main(list(argv))
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


@pytest.fixture
def session(run: Run) -> str:
    return run("sessions", "create")[1].strip()


@pytest.fixture
def _ctrl_c_is_heard() -> Iterator[None]:
    """A shell has what it runs in the background ignore it, and what is ignored is inherited."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def process(contract: Any, session: str, _ctrl_c_is_heard: None) -> Iterator[subprocess.Popen[bytes]]:
    """`titans ask` in a process of its own, in the midst of an answer that does not end."""
    contract.endless = True
    command = [sys.executable, "-m", "titans_client.cli", "--url", contract.url, "ask", session, "Why?"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(2) == b"48"
        yield process
        process.kill()


def test_a_session_is_made_shown_and_deleted(run: Run, contract: Any) -> None:
    assert run("sessions", "create") == (0, "ses_1\n", "")
    status, out, err = run("sessions", "show", "ses_1")
    assert (status, json.loads(out), err) == (0, contract.sessions["ses_1"], "")
    assert run("sessions", "delete", "ses_1") == (0, "deleted ses_1\n", "")
    assert run("sessions", "show", "ses_1") == (1, "", "titans: no session ses_1 (session_not_found)\n")


@pytest.mark.parametrize("key", ["", " x ", "a\nb", "é", "k" * 256])
def test_a_key_that_cannot_be_sent_is_refused_before_a_session_is_made(
    run: Run, contract: Any, tmp_path: Path, key: str
) -> None:
    (tmp_path / "one.txt").write_text("text")
    assert run("ingest", str(tmp_path / "one.txt"), "--key", key)[0] == 2
    assert not contract.sessions
    with Client(contract.url) as client, pytest.raises(ValueError, match="printable ASCII"):
        client.ingest("ses_1", "text", key=key)


def test_health_is_shown(run: Run) -> None:
    status, out, _ = run("health")
    assert (status, json.loads(out)["status"]) == (0, "ready")


@pytest.mark.parametrize("argv", [["--url", "URL", "health"], ["health", "--url", "URL"], ["--url=URL", "health"]])
def test_the_url_may_stand_before_or_after_the_command(
    run: Run, contract: Any, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    monkeypatch.setenv("TITANS_BASE_URL", "http://127.0.0.1:1")
    assert run(*[word.replace("URL", contract.url) for word in argv])[0] == 0


def test_ingesting_makes_a_session_and_says_which(run: Run, contract: Any, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"All work and no play. " * 10_000)
    status, out, err = run("ingest", str(path))
    assert status == 0
    session, summary = out.splitlines()
    assert session == "ses_1"
    assert summary == "ses_1 version 1: 55,000 tokens (220,000 bytes) in 0.5 s, 110,000 tokens/s"
    assert contract.seen[-1].body == path.read_bytes()
    assert contract.seen[-1].headers["content-type"] == "text/plain; charset=utf-8"
    assert "learning: 100%" in err
    assert "215k/215k" in err
    assert "tokens/s" in err


def test_ingesting_from_stdin_into_a_session(
    run: Run, session: str, contract: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"a text of no known size")))
    status, out, err = run("ingest", "-", "--session", session)
    assert status == 0
    assert out.startswith(f"{session} version 1: ")
    assert contract.seen[-1].body == b"a text of no known size"
    assert "learning: 100%" in err
    assert len(contract.sessions) == 1


def test_a_file_that_cannot_be_read_makes_no_session(run: Run, contract: Any, tmp_path: Path) -> None:
    assert run("ingest", str(tmp_path / "no")) == (1, "", f"titans: {tmp_path}/no: No such file or directory\n")
    assert run("ingest", str(tmp_path)) == (1, "", f"titans: {tmp_path}: Is a directory\n")
    assert contract.seen == []


@pytest.mark.parametrize(
    ("code", "options", "is_left"),
    [
        ("invalid_utf8", [], False),
        ("document_too_large", [], False),
        ("invalid_utf8", ["--key", "k"], True),  # under which it may be sent again
        ("shutting_down", [], True),  # what becomes of it is not known
    ],
)
def test_a_session_that_was_made_for_a_document_goes_where_that_is_refused(
    run: Run, contract: Any, tmp_path: Path, code: str, options: list[str], is_left: bool
) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"text")
    contract.fail = (200, code, "no")
    status, out, err = run("ingest", str(path), *options)
    assert (status, out) == (1, "ses_1\n")
    assert err.endswith(f"titans: no ({code})\n")
    assert list(contract.sessions) == (["ses_1"] if is_left else [])


def test_an_ingest_that_fails_half_way_says_why(run: Run, contract: Any, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"text")
    contract.sessions["ses_1"] = {}
    contract.fail = (200, "version_conflict", "the session has moved on")
    status, out, err = run("ingest", str(path), "--session", "ses_1")
    assert (status, out) == (1, "")
    assert err.endswith("titans: the session has moved on (version_conflict)\n")
    assert "Traceback" not in err


def test_an_answer_is_printed_as_a_line(run: Run, session: str, contract: Any) -> None:
    assert run("ask", session, "What is the code?") == (0, "4819203.\n", "")
    assert contract.seen[-1].json == {
        "prompt": "\n\nQuestion: What is the code?\nAnswer:",
        "temperature": 0.0,
        "stop": "\n",
        "stream": True,
    }


def test_a_raw_text_is_sent_and_answered_as_it_is(run: Run, session: str, contract: Any) -> None:
    contract.answer = ["  once", " upon\n", "\n"]
    options = ["--max-tokens", "9", "--temperature", "0.5", "--memory", "write", "--seed", "3"]
    assert run("ask", session, "Tell me", "--raw", *options) == (0, "  once upon\n\n", "")
    assert contract.seen[-1].json == {
        "prompt": "Tell me",
        "max_tokens": 9,
        "temperature": 0.5,
        "seed": 3,
        "memory": "write",
        "stream": True,
    }


def test_an_empty_answer_is_an_empty_line(run: Run, session: str, contract: Any) -> None:
    contract.answer = ["", " "]
    assert run("ask", session, "What?") == (0, "\n", "")


def test_an_answer_that_fails_half_way_keeps_what_has_come(run: Run, session: str, contract: Any) -> None:
    contract.fail = (200, "internal_error", "out of\nmemory")
    status, out, err = run("ask", session, "What?")
    assert (status, out) == (1, "4819203.")
    assert err == "titans: out of memory (internal_error)\n"


def test_a_busy_server_says_when_to_come_again(run: Run, contract: Any) -> None:
    contract.fail = (503, "overloaded", "too much to do")
    contract.retry_after = "5"
    assert run("health") == (1, "", "titans: too much to do (overloaded); try again in 5 s\n")


def test_a_server_that_is_not_there_is_one_line(run: Run) -> None:
    status, out, err = run("--url", "http://127.0.0.1:1", "health")
    assert (status, out) == (1, "")
    assert err.startswith("titans: cannot connect to http://127.0.0.1:1: ")
    assert err.count("\n") == 1


def closing(contract: Any, stream: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """A command line with a stream that the shell has closed."""
    command = [sys.executable, "-m", "titans_client.cli", "--url", contract.url, *argv]
    words = ["sh", "-c", f'exec "$@" {stream}', "sh", *command]
    return subprocess.run(words, check=False, capture_output=True, text=True)


def test_without_stderr_there_are_results_all_the_same(session: str, contract: Any, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"text")
    learnt = closing(contract, "2>&-", "ingest", str(path))
    answered = closing(contract, "2>&-", "ask", session, "Why?")
    assert (learnt.returncode, learnt.stdout.splitlines()[0]) == (0, "ses_2")
    assert (answered.returncode, answered.stdout) == (0, "4819203.\n")
    assert closing(contract, "2>&-", "ask", "ses_9", "Why?").returncode == 1
    assert closing(contract, "2>&-", "fly").returncode == 2


@pytest.mark.parametrize("words", [["health"], ["ask", "SESSION", "Why?"]])
def test_without_stdout_a_result_is_an_error(session: str, contract: Any, words: list[str]) -> None:
    ended = closing(contract, ">&-", *[word.replace("SESSION", session) for word in words])
    assert (ended.returncode, ended.stderr) == (1, "titans: standard output is closed\n")


@pytest.mark.parametrize(
    "argv",
    [
        ["--url", "nowhere", "health"],
        ["ask", "SESSION", "\udcff"],
        ["ask", "SESSION", "Why?", "--temperature", "nan"],
    ],
)
def test_a_value_that_cannot_be_sent_is_one_line(run: Run, session: str, argv: list[str]) -> None:
    status, out, err = run(*[session if word == "SESSION" else word for word in argv])
    assert (status, out) == (1, "")
    assert err.startswith("titans: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["sessions"],
        ["ask", "ses_1"],
        ["sessions", "show", ".."],
        ["ask", "ses_1", "Q", "--memory", "all"],
    ],
)
def test_a_wrong_usage_is_2(run: Run, contract: Any, argv: list[str]) -> None:
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("usage: titans")
    assert contract.seen == []


def test_ctrl_c_is_130(process: subprocess.Popen[bytes], contract: Any) -> None:
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert contract.client_left.wait(10)


def test_a_reader_that_has_gone_ends_it_quietly(process: subprocess.Popen[bytes], contract: Any) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(10) == 141
    assert process.stderr.read() == b""
    assert contract.client_left.wait(10)


COMMAND = """
def command():
    def add_arguments(parser):
        parser.add_argument("words", nargs="*")
        parser.add_argument("--run")
        parser.add_argument("--url")
    def run(args):
        print(args.words, args.run, args.url)
        return 7
    return "does something heavy", add_arguments, run
"""


@pytest.fixture
def extensions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Other packages' subcommands: one that works, one whose dependency is missing."""
    (tmp_path / "heavy_command.py").write_text(COMMAND)
    (tmp_path / "broken_command.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    targets = {"serve": "broken_command:command", "train": "broken_command:command", "health": "broken_command:command"}
    points = [EntryPoint("heavy", "heavy_command:command", "titans.commands")]
    points += [EntryPoint(name, target, "titans.commands") for name, target in targets.items()]
    points += [EntryPoint("other", "broken_command:command", "titans.commands")]
    monkeypatch.setattr("titans_client._extensions.entry_points", lambda group: points)
    yield
    sys.modules.pop("heavy_command", None)


@pytest.mark.usefixtures("extensions")
class TestExtensions:
    def test_they_are_listed_but_not_imported(self, run: Run) -> None:
        status, out, _ = run("--help")
        assert status == 0
        assert "heavy" in out
        assert 'serve     (needs "titans-server[server]")' in out
        assert "heavy_command" not in sys.modules

    def test_the_chosen_one_has_its_own_arguments(self, run: Run) -> None:
        assert run("heavy", "--run", "x", "health", "--url", "y") == (7, "['health'] x y\n", "")

    def test_the_chosen_one_has_its_own_help(self, run: Run) -> None:
        status, out, _ = run("heavy", "--help")
        assert status == 0
        assert "does something heavy" in out
        assert "--run RUN" in out

    def test_its_wrong_usage_is_2(self, run: Run) -> None:
        assert run("heavy", "--fly")[0] == 2

    @pytest.mark.parametrize(("name", "extra"), [("serve", "server"), ("train", "train")])
    def test_a_missing_extra_is_named(self, run: Run, name: str, extra: str) -> None:
        status, out, err = run(name)
        assert (status, out) == (1, "")
        assert err.startswith(f"titans: {name} cannot be loaded: No module named 'a_package_that_is_not_installed'")
        assert err.endswith(f'pip install "titans-server[{extra}]"\n')

    def test_another_packages_failure_is_told(self, run: Run) -> None:
        status, _, err = run("other")
        assert (status, err.count("\n")) == (1, 1)

    def test_a_built_in_command_cannot_be_taken_over(self, run: Run) -> None:
        assert run("health")[0] == 0
        assert "health" in run("--help")[1]


def test_every_command_of_this_package_is_known_by_the_extra_that_it_needs() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert _extensions.EXTRAS.keys() == project["entry-points"][_extensions.GROUP].keys()
    assert set(_extensions.EXTRAS.values()) <= project["optional-dependencies"].keys()


def test_a_built_in_command_does_not_look_for_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titans_client._extensions.entry_points", None)
    assert run("health")[0] == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_waiting_is_drawn_on_a_terminal_and_wiped_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    before = threading.active_count()
    with _terminal.Waiting("remembering") as waiting:
        while "remembering 0 s" not in terminal.getvalue():
            time.sleep(0.01)
        waiting.stop()
        assert terminal.getvalue().endswith("\r\033[K")
        assert threading.active_count() == before


def test_waiting_for_less_than_a_moment_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with _terminal.Waiting("remembering"):
        pass
    assert terminal.getvalue() == ""


def test_waiting_off_a_terminal_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    with _terminal.Waiting("remembering"):
        time.sleep(0.2)
    assert stderr.getvalue() == ""
