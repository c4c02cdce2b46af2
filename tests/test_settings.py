"""What a server does that nobody has told otherwise."""

import pytest
from pydantic import ValidationError
from titans_server.settings import Settings


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 4_096), ("cuda", 65_536)])
def test_a_state_is_written_down_as_often_as_suits_the_device(device: str, tokens: int) -> None:
    assert Settings().snapshot_tokens_on(device) == tokens
    assert Settings(snapshot_tokens=500).snapshot_tokens_on(device) == 500


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name.endswith("_seconds")])
@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
def test_a_time_is_a_number_of_seconds(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"TITANS_{name.upper()}", value)
    with pytest.raises(ValidationError):
        Settings()
