"""What the service reports while it works: plain values, turned into JSON by the api and into nothing else."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Progress:
    """How much of a document has been learnt; not yet durable."""

    tokens: int
    bytes: int  # of its text in UTF-8
    seconds: float


@dataclass(frozen=True)
class DocumentLearnt:
    """A document is part of the session, durably."""

    session: str
    version: int
    tokens: int
    bytes: int
    tokens_seen: int  # by the session, all in all
    seconds: float
    object: Literal["document"] = "document"


@dataclass(frozen=True)
class Usage:
    """Tokens of a completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class CompletionChunk:
    """Text that is new; the last chunk says how the answer ended."""

    id: str
    session: str
    version: int  # of the session that was asked; after memory "write", the one that learnt the answer
    model: str
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    usage: Usage | None = None
    object: Literal["completion.chunk"] = "completion.chunk"
