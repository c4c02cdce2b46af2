"""`titans keys`, as typed."""

import contextlib
import sqlite3
from pathlib import Path

import pytest
from titans_client.cli import main

SQLITE = "sqlite:///{}/titans.db"


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = SQLITE.format(tmp_path)
    monkeypatch.setenv("TITANS_STORE", url)
    return url


def titans(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    """What it prints; on stderr where it fails."""
    assert main(["keys", *words]) == status
    out, err = capsys.readouterr()
    return str(err if status else out).strip()


def test_a_key_from_its_making_to_its_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = titans(capsys, "create", "Bob's laptop", "--sessions", "3", "--tokens-per-minute", "50000")
    _, key_id, secret = text.split("-", 2)
    (line,) = titans(capsys, "list").splitlines()
    assert line.split("\t")[::2] == [key_id, "active", "sessions=3"]
    assert line.split("\t")[3:] == ["Bob's laptop", "sessions=3", "tokens_per_minute=50000"]
    assert titans(capsys, "revoke", key_id) == f"revoked {key_id}"
    assert titans(capsys, "revoke", key_id) == f"revoked {key_id}", "again, and nothing changes"
    assert "\trevoked 20" in titans(capsys, "list")
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes()


def test_a_key_that_replaces_another_has_its_sessions(capsys: pytest.CaptureFixture[str]) -> None:
    first = titans(capsys, "create", "Bob").split("-")[1]
    second = titans(capsys, "create", "Bob, renewed", "--owner", first).split("-")[1]
    third = titans(capsys, "create", "Bob, once more", "--owner", second).split("-")[1]
    lines = {line.split("\t")[0]: line for line in titans(capsys, "list").splitlines()}
    assert lines[second].endswith(f"owner={first}") and lines[third].endswith(f"owner={first}")


def test_a_key_whose_secret_nobody_was_told_lets_nobody_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.suppress(OSError), Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", full)
        assert main(["keys", "create", "Bob"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert "\trevoked 20" in titans(capsys, "list")


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["revoke", "0123456789abcdef"], 1, "there is no key"),
        (["create", "Bob", "--owner", "0123456789abcdef"], 1, "there is no key"),
        (["list", "--store", "memory://"], 2, "own memory"),
        (["list", "--store", "mysql://x"], 2, "known are"),
        (["list", "--store", "redis://127.0.0.1:1/0"], 1, "Redis"),
        (["create"], 2, "name"),
        (["create", "Bob\tactive"], 2, "not all of it can be printed"),
        (["revoke", "\udcff"], 2, "not all of it can be printed"),
        (["create", "Bob", "--owner", "\udcff"], 2, "not all of it can be printed"),
        (["create", "Bob\n"], 2, "not all of it can be printed"),
        (["create", "Bob", "--sessions", "-1"], 2, "--sessions"),
        (["create", "Bob", "--sessions", "many"], 2, "not a number"),
        (["create", "Bob", "--requests-per-minute", "0"], 2, "at least 1"),
        (["create", "Bob", "--tokens-per-minute", "0"], 2, "at least 1"),
        (["create", "Bob", "--requests-at-once", "0"], 2, "at least 1"),
    ],
)
def test_what_cannot_be_done_is_said(
    capsys: pytest.CaptureFixture[str], words: list[str], status: int, reason: str
) -> None:
    assert reason in titans(capsys, *words, status=status)


@pytest.mark.parametrize("words", [["list"], ["revoke", "0123456789abcdef"]])
def test_who_looks_where_there_is_no_store_makes_none(tmp_path: Path, words: list[str]) -> None:
    main(["keys", *words, "--store", SQLITE.format(tmp_path / "mistaken")])
    assert not list(tmp_path.iterdir())


def test_who_looks_into_another_database_leaves_it_as_it_is(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "titans.db")) as other:
        other.execute("CREATE TABLE theirs (id TEXT)")
        assert main(["keys", "list"]) == 0
        assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]


def test_an_empty_store_has_no_keys(capsys: pytest.CaptureFixture[str], store: str) -> None:
    assert titans(capsys, "list", "--store", store) == ""
