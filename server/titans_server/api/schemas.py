"""What goes over the wire. The client has its own copy on purpose; a contract test holds them together."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from titans.sampling import SamplingParams

from titans_server.events import Usage
from titans_server.prompts import CompletionRequest
from titans_server.sessions.store import SessionRecord

_Key = Annotated[str, StringConstraints(min_length=1, max_length=64)]
_Value = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[dict[_Key, _Value], Field(max_length=16)]
_Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class CreateSession(BaseModel):
    """The body of POST /v1/sessions."""

    model_config = ConfigDict(extra="forbid")

    metadata: Metadata = {}


class Session(BaseModel):
    """A session as it is shown."""

    id: str
    object: Literal["session"] = "session"
    version: int
    tokens_seen: int
    state_bytes: int
    model: str
    fingerprint: str
    created_at: float
    updated_at: float
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, record: SessionRecord) -> Self:
        """What may be shown of a record."""
        return cls(**{name: getattr(record, name) for name in cls.model_fields if name != "object"})


class CreateCompletion(BaseModel):
    """The body of POST /v1/sessions/{id}/completions."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    max_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    stream: bool = False
    memory: Literal["read", "write", "off"] = "read"

    def to_request(self) -> CompletionRequest:
        """What the service is asked for."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        sampling = SamplingParams(self.temperature, self.top_p, self.top_k, self.seed)
        return CompletionRequest(self.prompt, self.max_tokens, sampling, stops, self.memory)


class Completion(BaseModel):
    """An answer in one piece."""

    id: str
    object: Literal["completion"] = "completion"
    session: str
    version: int
    model: str
    text: str
    finish_reason: Literal["stop", "length"]
    usage: Usage


class Health(BaseModel):
    """What GET /health/ready tells."""

    status: Literal["ready"] = "ready"
    model: str
    fingerprint: str
    device: str
    store: str
