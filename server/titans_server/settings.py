"""What an operator can set: `TITANS_…` in the environment. Nothing else reads it."""

from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


def _sendable(key: SecretStr) -> SecretStr:
    """Raises ValueError: whoever has it could not show it, and the server would let nobody in."""
    text = key.get_secret_value()
    if not (text.isascii() and text.isprintable() and text == text.strip()):
        raise ValueError("must be printable ASCII, without space around it, as a header takes it")
    return key


_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_PREFIX = "TITANS_"
_OF_CLIENTS = {"TITANS_BASE_URL"}
_SNAPSHOT_TOKENS = {"cpu": 4_096, "cuda": 65_536}  # by device: what it reads again in two seconds, and in one


class Settings(BaseSettings):
    """One field a variable: `port` is TITANS_PORT. docs/settings.md says the same to a user."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, hide_input_in_errors=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535)
    published_on: str | None = None
    api_key: Annotated[SecretStr, Field(min_length=16), AfterValidator(_sendable)] | None = None
    allow_anonymous: bool = False
    metrics: Literal["open", "key", "off"] = "key"
    store: str = "sqlite:///.titans/titans.db"
    body: Path | None = None
    memory: Path | None = None
    device: str = Field(default="auto", pattern=r"^(auto|cpu(,cpu)*|cuda(:\d+)?(,cuda(:\d+)?)*)$")
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    max_running: int = Field(default=64, ge=1)
    max_requests: int = Field(default=256, ge=1)
    portion_seconds: _Seconds = 0.1
    max_prompt_tokens: int = Field(default=4_096, ge=1)
    max_completion_tokens: int = Field(default=4_096, ge=1)
    max_document_bytes: int | None = Field(default=None, ge=1)
    max_header_bytes: int = Field(default=16_384, ge=1_024)
    max_body_bytes: int = Field(default=2 << 20, ge=1_024)
    upload_idle_seconds: _Seconds = 30.0
    max_waiting_writers: int = Field(default=4, ge=0)
    quota_sessions: int | None = Field(default=None, ge=0)
    quota_bytes: int | None = Field(default=None, ge=0)
    quota_requests_per_minute: int | None = Field(default=None, ge=1)
    quota_tokens_per_minute: int | None = Field(default=None, ge=1)
    quota_requests_at_once: int | None = Field(default=None, ge=1)
    resident_bytes: int = Field(default=1 << 30, ge=0)
    max_streams: int = Field(default=128, ge=1)
    stream_bytes: int = Field(default=2 << 20, ge=1)
    stream_keep_seconds: float = Field(default=60.0, ge=0, allow_inf_nan=False)
    stream_ping_seconds: _Seconds = 15.0
    stream_stall_seconds: _Seconds = 60.0
    kept_versions: int = Field(default=8, ge=1)
    snapshot_tokens: int | None = Field(default=None, ge=1)  # None: as suits the device
    snapshot_idle_seconds: _Seconds = 30.0
    drain_seconds: int = Field(default=60, ge=0)
    failpoints: str = ""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    traces: bool = False

    @property
    def devices(self) -> list[str]:
        """Each of which runs the model."""
        return self.device.split(",")

    def snapshot_tokens_on(self, device_type: str) -> int:
        """How many tokens may have to be learnt again after a crash."""
        return self.snapshot_tokens or _SNAPSHOT_TOKENS[device_type]

    @property
    def is_reachable_from_elsewhere(self) -> bool:
        """Whether other machines reach the server, as far as its settings tell."""
        host = self.published_on or self.host
        try:
            return not ip_address(host.strip("[]")).is_loopback
        except ValueError:
            return host != "localhost"


def not_settings(variables: Iterable[str]) -> list[str]:
    """Those of an environment's variables that look like settings and are none: misspelt, maybe."""
    known = {_PREFIX + name.upper() for name in Settings.model_fields} | _OF_CLIENTS
    return sorted(x for x in variables if x.upper().startswith(_PREFIX) and x.upper() not in known)


def told(error: ValueError) -> str:
    """What is wrong with settings, a line each, by the name that an operator knows and without the value."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "\n".join(f"{_PREFIX}{str(x['loc'][0]).upper()}: {x['msg']}" for x in error.errors())
