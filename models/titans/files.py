"""Files that are there whole or as they were."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the block's end: durable then, and never a part of it.

    It is a .part beside it until then, and left there by a block that fails: `path` is as it was. Raises OSError.
    """
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it is in, where they are missing: durable when this returns. Raises OSError."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


def write_whole(path: Path, text: str) -> None:
    """Let the file hold this text, as `replacing` does. Raises OSError."""
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until nobody else is in such a block on this folder, and let nobody in until it ends. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_text(path: Path) -> str:
    """A text in UTF-8. Raises OSError, ValueError for another one."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable: a rename alone may not survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
