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
    ingestion: str
    replayed: bool = False  # it was learnt before, under the same Idempotency-Key: this is what was said then
    object: Literal["document"] = "document"


@dataclass(frozen=True)
class Fault:
    """Why something has failed."""

    code: str
    message: str


@dataclass(frozen=True)
class IngestionStatus:
    """How far a document has come."""

    id: str
    session: str
    # receiving: it is being sent; interrupted: no more comes; learning: all of it is durable
    status: Literal["receiving", "interrupted", "learning", "done", "failed", "cancelled"]
    committed_bytes: int  # of its text that are durable: from here on it is learnt when it is sent again
    tokens: int  # that these are
    tokens_learnt: int  # of them, as far as this server knows
    version: int | None  # that it made, once it is done
    created_at: float
    error: Fault | None = None
    object: Literal["ingestion"] = "ingestion"


@dataclass(frozen=True)
class Usage:
    """Tokens of a completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class TokenScore:
    """A token, and the logarithm of its probability."""

    text: bytes  # maybe a part of a character
    logprob: float | None  # None: nothing stands before it


@dataclass(frozen=True)
class AnswerToken:
    """A token of an answer."""

    score: TokenScore
    top: tuple[TokenScore, ...]  # the likeliest at its place, the first one first
    offset: int  # characters of the answer before it


@dataclass(frozen=True)
class AnswerPiece:
    """What is new of an answer; the last piece says how it ended."""

    text: str
    tokens: tuple[AnswerToken, ...] = ()  # where logprobs are asked for
    version: int = 0  # of the session that was asked; after memory "write", the one that learnt the answer
    finish_reason: Literal["stop", "length"] | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class CompletionChunk:
    """A piece of an answer on its way out of the native endpoint."""

    id: str
    session: str
    version: int  # of the session that was asked; after memory "write", the one that learnt the answer
    model: str
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    usage: Usage | None = None
    object: Literal["completion.chunk"] = "completion.chunk"
