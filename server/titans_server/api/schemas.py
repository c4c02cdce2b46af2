"""What goes over the wire. The client has its own copy on purpose; a contract test holds them together."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from titans.sampling import SamplingParams

from titans_server.events import Usage
from titans_server.prompts import CompletionRequest
from titans_server.sessions.record import SessionRecord, Version

_Key = Annotated[str, StringConstraints(min_length=1, max_length=64)]
_Value = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[dict[_Key, _Value], Field(max_length=16)]
Seconds = Annotated[int, Field(ge=1, le=10 * 366 * 86_400)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_Stops = Annotated[list[_Stop], Field(max_length=4)]
Stops = Annotated[_Stops, BeforeValidator(_listed, _Stop | _Stops)]


class Body(BaseModel):
    """What a client sends: no field that is not known, no value that only looks like what it should be."""

    model_config = ConfigDict(extra="forbid", strict=True)


class CreateSession(Body):
    """The body of POST /v1/sessions."""

    metadata: Metadata = {}
    ttl_seconds: Seconds | None = None


class ForkSession(Body):
    """The body of POST /v1/sessions/{id}/fork."""

    version: int | None = Field(default=None, ge=0)
    metadata: Metadata | None = None
    ttl_seconds: Seconds | None = None


class RestoreSession(Body):
    """The body of POST /v1/sessions/{id}/restore."""

    version: int = Field(ge=0)


class ForkedFrom(BaseModel):
    """The session and the version that a session was forked from."""

    session: str
    version: int


class Session(BaseModel):
    """A session as it is shown."""

    id: str
    object: Literal["session"] = "session"
    version: int
    tokens_seen: int
    state_bytes: int
    stored_bytes: int
    model: str
    fingerprint: str
    created_at: float
    updated_at: float
    expires_at: float | None
    parent: ForkedFrom | None
    ingestions: list[str]
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, record: SessionRecord) -> Self:
        """What may be shown of a record."""
        own = {"object", "parent", "ingestions"}
        fields = {name: getattr(record, name) for name in cls.model_fields if name not in own}
        parent = record.parent and ForkedFrom(session=record.parent.session, version=record.parent.version)
        return cls(**fields, parent=parent, ingestions=[draft.ingestion for draft in record.drafts])


class SessionList(BaseModel):
    """Some of the caller's sessions."""

    object: Literal["list"] = "list"
    data: list[Session]
    has_more: bool


class KeptVersion(BaseModel):
    """A version that can be forked, restored or exported."""

    version: int
    tokens_seen: int
    created_at: float

    @classmethod
    def of(cls, version: Version) -> Self:
        """What may be shown of a version."""
        return cls(version=version.number, tokens_seen=version.tokens, created_at=version.created_at)


class VersionList(BaseModel):
    """The versions of a session that are kept, newest first."""

    object: Literal["list"] = "list"
    data: list[KeptVersion]


class CreateCompletion(Body):
    """The body of POST /v1/sessions/{id}/completions."""

    prompt: str
    max_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    stop: Stops | None = None
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    stream: bool = False
    memory: Literal["read", "write", "off"] = "read"

    def to_request(self) -> CompletionRequest:
        """What the service is asked for."""
        sampling = SamplingParams(self.temperature, self.top_p, self.top_k, self.seed)
        return CompletionRequest(self.prompt, self.max_tokens, sampling, tuple(self.stop or ()), self.memory)


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
