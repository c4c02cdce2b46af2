"""What the run in a folder is of: written there before all else, so that none of other settings goes on with it."""

import json
from pathlib import Path
from typing import Any

from titans.files import write_whole

_NAME = "run.json"
_MADE = "*.pt"  # what a run goes on from


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


def claim_run(run: Path, ours: dict[str, Any]) -> None:
    """Let the folder `run`, made if need be, be that of a run of these settings. Raises what `check_run` does."""
    check_run(run, ours)
    run.mkdir(parents=True, exist_ok=True)
    write_whole(run / _NAME, json.dumps(ours, indent=1) + "\n")
