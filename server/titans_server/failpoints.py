"""Named moments at which a test may end or stop this process: TITANS_FAILPOINTS, read by `__main__` alone.

    TITANS_FAILPOINTS="after_append=kill"             SIGKILL at the first time
    TITANS_FAILPOINTS="after_blob=stop@3,before_append=kill@9"

`stop` is SIGSTOP: whoever started the process sees it stopped, does what it likes to the world, and sends SIGCONT.
Unarmed, which is always but in such tests, a moment costs one look into an empty dictionary.
"""

import os
import re
import signal
from dataclasses import dataclass
from typing import Literal, get_args

Moment = Literal[
    "before_append",  # tokens are about to be appended to a session's log
    "after_append",  # they are durable
    "before_blob",  # a snapshot is about to be written
    "after_blob",  # it is durable, and nothing points at it yet
    "after_commit",  # a version is durable, and nobody has been told
    "during_replay",  # a snapshot is loaded, and some of the log is learnt
    "during_eviction",  # a state has left memory for a snapshot that is not yet written
]

_FORM = re.compile(r"(?P<moment>\w+)=(?P<action>kill|stop)(?:@(?P<times>[1-9]\d*))?")
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass
class _Armed:
    signal: signal.Signals
    left: int  # times that the moment passes before the signal


_armed: dict[str, _Armed] = {}


def arm(text: str) -> None:
    """Replace what is armed. Raises ValueError for a moment or action that is none."""
    armed = {}
    for part in filter(None, text.split(",")):
        match = _FORM.fullmatch(part.strip())
        if match is None or match["moment"] not in get_args(Moment):
            raise ValueError(f"{part!r} is no failpoint; known are {', '.join(get_args(Moment))}, each =kill or =stop")
        armed[match["moment"]] = _Armed(_SIGNALS[match["action"]], int(match["times"] or 1))
    _armed.clear()
    _armed.update(armed)


def reach(moment: Moment) -> None:
    """Say that a moment has come."""
    armed = _armed.get(moment)
    if armed is None:
        return
    armed.left -= 1
    if armed.left == 0:
        os.kill(os.getpid(), armed.signal)
