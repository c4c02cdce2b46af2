import pytest
from support.models import TinyCheckpoint, write_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TITANS_BASE_URL", raising=False)
    monkeypatch.delenv("TITANS_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
