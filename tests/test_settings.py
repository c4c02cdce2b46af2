"""What a server does that nobody has told otherwise."""

import os
import subprocess
import sys

import pytest
from pydantic import ValidationError
from titans_server.settings import Settings


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 4_096), ("cuda", 65_536)])
def test_a_state_is_written_down_as_often_as_suits_the_device(device: str, tokens: int) -> None:
    assert Settings().snapshot_tokens_on(device) == tokens
    assert Settings(snapshot_tokens=500).snapshot_tokens_on(device) == 500


@pytest.mark.parametrize("key", [16 * " ", "0123456789abcdef\r", "0123456789abcdef ", "0123456789abcdéf"])
def test_a_key_that_nobody_could_send_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITANS_API_KEY", key)
    with pytest.raises(ValidationError, match="printable ASCII"):
        Settings()


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name.endswith("_seconds")])
@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
def test_a_time_is_a_number_of_seconds(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"TITANS_{name.upper()}", value)
    with pytest.raises(ValidationError):
        Settings()


def test_a_misspelt_setting_is_warned_of_by_its_name_alone() -> None:
    others = {k: v for k, v in os.environ.items() if not k.startswith("TITANS_")}
    environment = others | {"TITANS_APIKEY": "a secret", "TITANS_BASE_URL": "http://x", "TITANS_LOG_FORMAT": "text"}
    command = [sys.executable, "-m", "titans_server", "--host", "0.0.0.0", "--port", "0", "--store", "memory://"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1, "it has no key"
    assert "TITANS_APIKEY is no setting" in ended.stderr
    assert ended.stderr.count("is no setting") == 1
    assert "a secret" not in ended.stderr


def test_a_value_that_makes_no_sense_is_told_of_by_its_variable() -> None:
    others = {k: v for k, v in os.environ.items() if not k.startswith("TITANS_")}
    environment = others | {"TITANS_PORT": "tcp://10.0.0.1:8000", "TITANS_API_KEY": "a secret"}
    command = [sys.executable, "-m", "titans_server", "--store", "memory://"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert [line.partition(":")[0] for line in ended.stderr.splitlines()] == ["TITANS_PORT", "TITANS_API_KEY"]
    assert "a secret" not in ended.stderr
