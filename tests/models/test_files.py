"""Files are there whole or as they were, durably, and for whoever may read the others of their maker."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.models import TinyCheckpoint
from titans.files import read_text, replacing
from titans.training.saving import save_whole


def test_a_file_takes_its_place_when_it_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "trainer.pt", []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_ino, path.exists())))
    save_whole({"step": 1}, path)
    assert synced == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_a_file_is_as_it_was_where_another_could_not_be_made(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"after")
        raise ZeroDivisionError
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("size", [100, 20_000])
def test_no_room_is_told_as_such_of_tensors_too(tmp_path: Path, size: int) -> None:
    """torch would say `unexpected pos 768 vs 662`."""
    save_whole({"step": 1}, tmp_path / "trainer.pt")
    before = (tmp_path / "trainer.pt").read_bytes()
    with room_for(size), pytest.raises(OSError) as raised:
        save_whole({"step": 2, "weights": torch.zeros(10_000)}, tmp_path / "trainer.pt")
    assert raised.value.errno == errno.EFBIG
    assert (tmp_path / "trainer.pt").read_bytes() == before


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let no file grow past so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_memory_is_for_whoever_may_read_the_body(tiny: TinyCheckpoint) -> None:
    """A container's user is not the one who trained it."""
    assert tiny.memory.stat().st_mode == (tiny.body / "config.json").stat().st_mode


def test_a_text_of_another_encoding_is_told_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("Käse".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{path} is not a text in UTF-8"):
        read_text(path)
