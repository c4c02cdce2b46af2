"""The compose files keep the server's promises: nothing acknowledged is lost, nothing is open to the world."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from titans_server.settings import Settings

Compose = dict[str, Any]

needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server")


def seconds(duration: str) -> int:
    found = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration)
    assert found and duration, duration
    return 60 * int(found[1] or 0) + int(found[2] or 0)


def redis_options(compose: Compose) -> dict[str, str]:
    program, *words = compose["services"]["redis"]["command"]
    assert program == "redis-server"
    assert all(isinstance(word, str) for word in words), "a bare yes or no is a boolean in YAML"
    names = [word.removeprefix("--") for word in words[::2]]
    return dict(zip(names, words[1::2], strict=True))


def test_redis_syncs_every_commit_to_disk_before_it_answers(compose: Compose) -> None:
    options = redis_options(compose)
    assert options["appendonly"] == "yes"
    assert options["appendfsync"] == "always"
    assert options["no-appendfsync-on-rewrite"] == "no"


def test_redis_refuses_writes_when_full_and_evicts_nothing(compose: Compose) -> None:
    options = redis_options(compose)
    assert options["maxmemory-policy"] == "noeviction"
    assert re.fullmatch(r"[1-9]\d*[mg]b", options["maxmemory"])


def client(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["redis-cli", "-s", "redis.sock", *words]
    return subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True, timeout=30)


@contextmanager
def running_redis(command: list[str], folder: Path) -> Iterator[None]:
    """A Redis with its files in `folder`, killed at the end."""
    where = ["--port", "0", "--unixsocket", "redis.sock"]  # relative: a socket's path must be short
    with subprocess.Popen([*command, *where], cwd=folder, stdout=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 30
            while client(folder, "ping").returncode:  # without -e an error is an answer, too
                assert process.poll() is None and time.monotonic() < until, "Redis does not start"
                time.sleep(0.05)
            yield
        finally:
            process.kill()


@needs_redis
def test_a_killed_redis_with_these_options_forgets_nothing(compose: Compose, tmp_path: Path) -> None:
    command = compose["services"]["redis"]["command"]
    with running_redis(command, tmp_path):
        assert client(tmp_path, "set", "session", "state").stdout == "OK\n"
    with running_redis(command, tmp_path):
        assert client(tmp_path, "get", "session").stdout == "state\n"


@needs_redis
def test_the_check_of_redis_passes_only_where_redis_serves(compose: Compose, tmp_path: Path) -> None:
    redis = compose["services"]["redis"]
    kind, program, *check = redis["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "redis-cli")
    with running_redis(redis["command"], tmp_path):
        assert client(tmp_path, *check).returncode == 0
    assert client(tmp_path, *check).returncode != 0
    with running_redis([*redis["command"], "--requirepass", "secret"], tmp_path):
        assert client(tmp_path, *check).returncode != 0, "an answer that is an error"


def test_the_server_starts_after_a_redis_that_answers(compose: Compose) -> None:
    assert compose["services"]["server"]["depends_on"]["redis"]["condition"] == "service_healthy"


def test_the_server_uses_the_redis_beside_it(compose: Compose) -> None:
    url = urlsplit(compose["services"]["server"]["environment"]["TITANS_STORE"])
    assert (url.scheme, url.port) == ("redis", 6379)
    assert url.hostname in compose["services"]


@pytest.mark.parametrize("service", ["server", "redis"])
def test_a_service_that_dies_is_started_again(compose: Compose, service: str) -> None:
    assert compose["services"][service]["restart"] in {"unless-stopped", "always"}
    assert not compose["services"][service]["healthcheck"].get("disable", False)


def test_the_server_has_time_to_drain_before_it_is_killed(compose: Compose) -> None:
    server = compose["services"]["server"]
    drain = int(server["environment"]["TITANS_DRAIN_SECONDS"])
    grace = seconds(server["stop_grace_period"])
    assert grace >= drain + 15, "the engine and the store are closed after the drain"
    assert grace > Settings.model_fields["drain_seconds"].default


def test_every_variable_given_to_the_server_is_a_setting(compose: Compose, gpu_compose: Compose) -> None:
    known = {f"TITANS_{name.upper()}" for name in Settings.model_fields}
    for each in (compose, gpu_compose):
        given = {name for name in each["services"]["server"]["environment"] if not name.startswith("OTEL_")}
        assert given <= known


def test_every_setting_can_be_given_but_where_it_listens(compose: Compose) -> None:
    settable = {f"TITANS_{name.upper()}" for name in Settings.model_fields.keys() - {"host", "port", "failpoints"}}
    assert settable <= compose["services"]["server"]["environment"].keys()


def test_the_values_given_to_the_server_are_valid(
    compose: Compose, gpu_compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in (compose, gpu_compose):
        for name, value in each["services"]["server"]["environment"].items():
            if value is not None:
                monkeypatch.setenv(name, value)
    assert Settings().device == "cuda"


def test_it_starts_without_a_key_on_loopback_and_not_elsewhere(
    compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TITANS_HOST", "0.0.0.0")
    monkeypatch.setenv("TITANS_PUBLISHED_ON", compose["services"]["server"]["environment"]["TITANS_PUBLISHED_ON"])
    assert not Settings().is_reachable_from_elsewhere
    text = (Path(__file__).parents[2] / "docker-compose.yml").read_text()
    address = "${BIND_ADDRESS:-127.0.0.1}"
    assert f"TITANS_PUBLISHED_ON: {address}\n" in text, "where the port is published"
    assert f'- "{address}:${{TITANS_PORT:-8000}}:8000"\n' in text
    assert not Settings().allow_anonymous and Settings().api_key is None


def test_only_this_machine_reaches_the_server_and_nobody_redis(compose: Compose) -> None:
    assert compose["services"]["server"]["ports"] == ["127.0.0.1:8000:8000"]
    assert "ports" not in compose["services"]["redis"]
    assert all("network_mode" not in service for service in compose["services"].values())


def test_data_lives_in_named_volumes(compose: Compose) -> None:
    for name in ("server", "redis"):
        mounted = [volume.split(":") for volume in compose["services"][name]["volumes"]]
        assert [where for _, where, *_ in mounted] == ["/data"]
        assert all(name in compose["volumes"] for name, *_ in mounted)


def test_the_server_writes_nothing_but_data_and_tmp_and_gains_no_rights(compose: Compose) -> None:
    server = compose["services"]["server"]
    assert server["read_only"] is True
    assert server["tmpfs"] == ["/tmp"]
    assert server["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in server["security_opt"]
    assert not server.get("privileged", False)
    assert "user" not in server, "the image's own user, which is not root"


def test_the_gpu_file_reserves_a_gpu_and_builds_for_it(compose: Compose, gpu_compose: Compose) -> None:
    server, base = gpu_compose["services"]["server"], compose["services"]["server"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]
    assert device["count"] == 1
    assert re.search(r"/cu\d+$", server["build"]["args"]["TORCH_INDEX"])
    assert base["build"]["args"]["TORCH_INDEX"].endswith("/cpu")
    assert server["image"] != base["image"], "or one build would overwrite the other"


def test_the_gpu_file_only_adds_to_the_server(compose: Compose, gpu_compose: Compose) -> None:
    server, base = gpu_compose["services"]["server"], compose["services"]["server"]
    assert gpu_compose.keys() == {"services"}
    assert gpu_compose["services"].keys() == {"server"}
    assert server.keys() == {"build", "image", "environment", "deploy"}
    assert server["environment"].keys() == {"TITANS_DEVICE"}
    assert server["build"]["args"].keys() <= base["build"]["args"].keys()
