"""A process that is told to ends at the moment that was named, and not before."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from titans_server import failpoints

REACH = """
import sys
from titans_server import failpoints
failpoints.arm(sys.argv[1])
for i in range(5):
    failpoints.reach("before_append")
    failpoints.reach("after_blob")
    print(i, flush=True)
"""


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


@pytest.mark.parametrize(("text", "passed"), [("after_blob=kill", 0), ("before_append=kill@3", 2)])
def test_the_process_is_killed_when_the_moment_comes(text: str, passed: int) -> None:
    done = subprocess.run([sys.executable, "-c", REACH, text], check=False, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (-signal.SIGKILL, [b"%d" % i for i in range(passed)])


def test_a_stopped_process_goes_on_when_it_is_told_to() -> None:
    with subprocess.Popen([sys.executable, "-c", REACH, "before_append=stop@2"], stdout=subprocess.PIPE) as process:
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=60)[0].split() == [b"0", b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("text", ["somewhere=kill", "after_blob", "after_blob=raise", "after_blob=kill@0"])
def test_what_is_no_failpoint_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no failpoint"):
        failpoints.arm(text)


def test_nothing_happens_unarmed() -> None:
    failpoints.reach("after_commit")
