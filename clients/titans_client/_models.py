"""What goes over the wire. Written apart from the server on purpose; docs/api.md is what both follow.

Models are frozen. A field that this version does not know is kept, and readable by its name.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict

from pydantic import BaseModel, ConfigDict

Memory = Literal["read", "write", "off"]
FinishReason = Literal["stop", "length"]


class Wire(BaseModel):
    """Base of what the server sends."""

    model_config = ConfigDict(frozen=True, extra="allow")


class ForkedFrom(Wire):
    """The session and the version that a session was forked from."""

    session: str
    version: int


class Session(Wire):
    """A memory with a name: what it is made of and how far it has come."""

    id: str
    object: Literal["session"]
    version: int  # grows by one with every document learnt
    tokens_seen: int
    state_bytes: int  # in memory, however much it has read
    model: str
    fingerprint: str  # of the weights that made the state
    created_at: float  # seconds since the epoch
    updated_at: float
    stored_bytes: int = 0  # in the store, now
    expires_at: float | None = None
    parent: ForkedFrom | None = None
    ingestions: list[str] = []  # documents under way
    metadata: dict[str, str]


class SessionList(Wire):
    """Some of the caller's sessions, newest first."""

    data: tuple[Session, ...]
    has_more: bool


class Version(Wire):
    """A version that can be forked, restored or exported."""

    version: int
    tokens_seen: int
    created_at: float


class VersionList(Wire):
    """The versions that are kept, newest first."""

    data: tuple[Version, ...]


class Fault(Wire):
    """Why something has failed."""

    code: str
    message: str


class Ingestion(Wire):
    """How far a document has come."""

    id: str
    object: Literal["ingestion"]
    session: str
    status: Literal["receiving", "interrupted", "learning", "done", "failed", "cancelled"]
    committed_bytes: int  # durable; sent again under its key, it is learnt from here on
    tokens: int
    tokens_learnt: int
    version: int | None  # that it made
    created_at: float
    error: Fault | None = None


class Progress(Wire):
    """How much of a document has been learnt so far."""

    tokens: int
    bytes: int
    seconds: float


class Document(Wire):
    """A document that has been learnt; the session's new state is durable."""

    object: Literal["document"]
    session: str
    version: int  # of the session, now
    tokens: int  # of the document
    bytes: int
    tokens_seen: int  # by the session, in all
    seconds: float
    ingestion: str = ""
    replayed: bool = False  # it had been learnt before, under the same key


IngestEvent = Progress | Document
"""What an ingest stream is made of: any number of Progress, then one Document."""


class Usage(Wire):
    """What a completion cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(Wire):
    """A whole answer."""

    id: str
    object: Literal["completion"]
    session: str
    version: int
    model: str
    text: str
    finish_reason: FinishReason
    usage: Usage


class CompletionChunk(Wire):
    """A piece of an answer: the text that is new. Only the last has a finish_reason and usage."""

    id: str
    object: Literal["completion.chunk"]
    session: str
    version: int
    model: str
    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class Health(Wire):
    """A server that takes work."""

    status: str
    model: str
    fingerprint: str
    device: str
    store: str


class CompletionOptions(TypedDict, total=False):
    """How to answer. What is left out, or None, is as the server has it by default."""

    max_tokens: int | None  # 128
    temperature: float | None  # 1.0; 0: the likeliest token, always
    top_p: float | None  # 1.0
    top_k: int | None  # 0: no limit
    stop: str | Sequence[str] | None  # up to 4; not part of the answer
    seed: int | None  # same seed, session version and request: same answer
    memory: Memory | None  # "read"; "write": then learn prompt and answer; "off": as if there were no memory
