"""What the run in a folder is of: written there before all else, so that none of other settings goes on with it."""

import argparse
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from titans.files import write_whole

_NAME = "run.json"
_LOCK = "run.lock"
_MADE = "*.pt"  # what a run goes on from
_SEEDS = 1 << 32  # as many as NumPy takes; what is drawn of a step is of a number some million times as large


def check_run(run: Path, ours: dict[str, Any]) -> None:
    """Raises ValueError where the folder `run` has a run of other settings, or one that does not tell its own.

    One that ended before it made anything leaves its folder to any: its texts may have been too short.
    """
    path = run / _NAME
    if not any(run.glob(_MADE)):
        return
    try:
        theirs = dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise ValueError(f"{path} does not tell what the run is of: name another folder with --run") from error
    for name, value in json.loads(json.dumps(ours)).items():
        if theirs.get(name) != value:
            raise ValueError(f"{run} has a run of another {name}: name another folder with --run")


@contextmanager
def claimed(run: Path, ours: dict[str, Any]) -> Iterator[None]:
    """Let the folder `run`, made if need be, be that of a run of these settings, and nobody else's within the block.

    Raises what `check_run` does, and ValueError where another process is at work in it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of by the system, however the process ends
        except BlockingIOError:
            raise ValueError(f"another process is at work in {run}: name another folder with --run") from None
        check_run(run, ours)
        write_whole(run / _NAME, json.dumps(ours, indent=1) + "\n")
        yield


def seed(text: str) -> int:
    """Of a run, for its command line: a number that every generator takes."""
    if not text.isdecimal() or int(text) >= _SEEDS:
        raise argparse.ArgumentTypeError(f"not a number from 0 to {_SEEDS - 1}: {text!r}")
    return int(text)
