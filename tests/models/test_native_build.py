"""Kernels are compiled once and found again, and where there can be none it is said."""

import subprocess
from pathlib import Path

import pytest
from titans.native import build

pytestmark = pytest.mark.skipif(build.library() is None, reason="no kernels for this machine, or no compiler")


def test_kept_kernels_that_cannot_be_loaded_are_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    kept = tmp_path / ".cache" / "titans" / build._name()
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"of another machine")
    assert build._kept().titans_layers
    assert "compiling the kernels again" in caplog.text
    assert build._kept().titans_layers
    assert caplog.text.count("compiling the kernels again") == 1


def test_where_a_home_runs_nothing_kernels_are_not_compiled_at_each_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr("ctypes.CDLL", refuse)
    monkeypatch.setattr(build, "compile_into", lambda _: pytest.fail("compiled again"))
    kept = tmp_path / ".cache" / "titans" / build._name()
    kept.parent.mkdir(parents=True)
    kept.touch()
    with pytest.raises(OSError, match="map segment"):
        build._kept()


def test_what_was_compiled_is_found_and_what_does_not_compile_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    broken = tmp_path / "kernels" / "kernels.cpp"
    broken.parent.mkdir()
    broken.write_text("this is not C++")
    monkeypatch.setattr(build, "_SOURCES", broken.parent)
    assert build.library.__wrapped__() is None
    assert "no compiled kernels" in caplog.text
    broken.write_text('extern "C" int titans_answer() { return 42; }')
    library = build.library.__wrapped__()
    assert library is not None and library.titans_answer() == 42

    def nothing(*_: object, **__: object) -> None:
        raise subprocess.SubprocessError("compiled a second time")

    monkeypatch.setattr(subprocess, "run", nothing)
    assert build.library.__wrapped__() is not None
    assert [path.suffix for path in (tmp_path / ".cache" / "titans").iterdir()] == [".so"]


@pytest.mark.parametrize("home", [None, "x" * 300])
def test_a_user_without_a_home_has_the_kernels_beside_the_sources_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, home: str | None
) -> None:
    """Nobody knows one, or to look into it is refused: a container that runs as some number, say."""

    def of_nobody() -> Path:
        if home is None:
            raise RuntimeError("Could not determine home directory.")
        return tmp_path / home

    kernels = build.library()
    assert kernels is not None
    made = Path(kernels._name)
    monkeypatch.setattr(Path, "home", of_nobody)
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    assert build.library.__wrapped__() is None
    assert "no compiled kernels" in caplog.text
    (tmp_path / made.name).write_bytes(made.read_bytes())
    assert build.library.__wrapped__() is not None
