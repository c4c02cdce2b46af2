"""States as files in one folder. A file is there whole or not at all, and is never changed.

A name is used once, so that no two writers ever write one file, and what nothing points at stays that way.
"""

import logging
import os
import re
import time
import uuid
from contextlib import suppress
from pathlib import Path

from titans.files import make_folder, sync_folder

_log = logging.getLogger(__name__)
_SUFFIX = ".state"
_PARTIAL = ".partial"  # after the suffix, until the file is whole


class BlobFolder:
    """The files beside a database. Blocking; every method may raise OSError unless it says otherwise."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self) -> None:
        """Make the folder if need be, to stay."""
        make_folder(self._path)
        sync_folder(self._path.parent)  # who made it before may have been killed before this

    def write(self, session_id: str, blob: bytes) -> str:
        """Keep a blob, durably. Returns its name: readable, new, and inside the folder whatever the id is."""
        readable = re.sub(r"[^A-Za-z0-9_-]", "_", session_id)[:80]
        name = f"{readable}-{uuid.uuid4().hex}{_SUFFIX}"
        partial = self._path / (name + _PARTIAL)
        try:
            with partial.open("xb") as file:
                file.write(blob)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self._path / name)
            sync_folder(self._path)
        except BaseException:
            self.remove(partial.name)
            self.remove(name)
            raise
        return name

    def read(self, name: str) -> bytes | None:
        """A blob, or None where there is no such file."""
        try:
            return (self._path / name).read_bytes()
        except FileNotFoundError:
            return None

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self._path / name).exists()

    def remove(self, name: str) -> None:
        """Remove a blob that nothing points at, or will. Never raises: what stays is swept later."""
        try:
            (self._path / name).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("cannot remove the unused state file %s: %s", name, error)

    def older_than(self, seconds: float) -> set[str]:
        """The names of files, whole or partial, that were last written that long ago."""
        limit, names = time.time() - seconds, set()
        for path in self._path.iterdir():
            if path.name.endswith((_SUFFIX, _SUFFIX + _PARTIAL)):
                with suppress(FileNotFoundError):  # another process removed it meanwhile
                    if path.stat().st_mtime < limit:
                        names.add(path.name)
        return names
