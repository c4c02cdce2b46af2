"""The kernels as a shared library: compiled once a machine, where its processor has what they are written for."""

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
_SOURCES = FOLDER / "kernels"
_SETS = "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512vnni avx512bf16".split()
_FLAGS = ["-O3", "-std=c++20", "-shared", "-fPIC", "-pthread", *(f"-m{x}" for x in _SETS)]
_COMPILERS = "c++", "g++", "clang++"
_SECONDS = 300
_NOEXEC = "failed to map segment"  # what a file system that runs nothing says, also of what is compiled anew


@cache
def library() -> ctypes.CDLL | None:
    """The kernels; None on another processor, and where there is neither a compiler nor what one has made before.

    They are looked for in this folder, where `python -m titans.native` puts them, and in `~/.cache/titans`.
    """
    if not torch.cpu._is_avx512_bf16_supported():
        return None
    try:
        beside = FOLDER / _name()
        return ctypes.CDLL(str(beside)) if beside.exists() else _kept()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: a user without a home
        log.warning("answers are slower than they need be: no compiled kernels (%s)", error)
        return None


def _kept() -> ctypes.CDLL:
    """Those of this user, compiled where they are not there yet, or cannot be loaded.

    Raises RuntimeError, and as `compile_into`.
    """
    folder = Path.home() / ".cache" / "titans"
    path = folder / _name()
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            if _NOEXEC in str(error):
                raise
            log.warning("compiling the kernels again: %s", error)
    return ctypes.CDLL(str(compile_into(folder)))


def compile_into(folder: Path) -> Path:
    """Compile, whatever there is; atomic. Returns the library's path. Raises OSError, subprocess.SubprocessError."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        made = Path(own) / "kernels.so"
        command = [compiler, *_FLAGS, str(_SOURCES / "kernels.cpp"), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            raise OSError(f"{compiler}: {done.stderr.strip()[-500:]}")
        return made.replace(folder / _name())


def _name() -> str:
    digest = hashlib.sha256(" ".join([*_FLAGS, *platform.libc_ver()]).encode())  # machines may share a home
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.read_bytes())
    return f"kernels-{digest.hexdigest()[:16]}.so"
