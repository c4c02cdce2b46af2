"""The deployment's files, parsed just far enough to ask them questions."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, its continuation lines joined."""

    stage: int  # which FROM it follows, from 0; -1 before the first
    name: str
    value: str


def _interpolate(text: str) -> str:
    """As Compose does where nothing is set: every ${NAME:-default} becomes its default."""
    return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", text)


def _compose(name: str) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(_interpolate((ROOT / name).read_text()))
    return parsed


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def compose() -> dict[str, Any]:
    return _compose("docker-compose.yml")


@pytest.fixture(scope="session")
def gpu_compose() -> dict[str, Any]:
    return _compose("docker-compose.gpu.yml")


@pytest.fixture(scope="session")
def dockerfile() -> list[Instruction]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    stage, found = -1, []
    for line in filter(None, text.replace("\\\n", "").splitlines()):
        name, _, value = line.partition(" ")
        stage += name == "FROM"
        found.append(Instruction(stage, name, value.strip()))
    return found


@pytest.fixture(scope="session")
def final_stage(dockerfile: list[Instruction]) -> list[Instruction]:
    return [x for x in dockerfile if x.stage == dockerfile[-1].stage]
