"""What OpenAI's clients send to /v1/responses and /v1/conversations."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from titans_server.api.openai.schemas import MAX_MESSAGES, Asked, Memory
from titans_server.api.schemas import Body, Metadata
from titans_server.errors import InvalidRequest
from titans_server.prompts import Chat, Prompt

_LOGPROBS = "message.output_text.logprobs"
_OF_ITEMS = {"id", "type", "status", "role", "content", "phase"}  # an answer is given back with the next question
_OF_PARTS = {"type", "text", "annotations", "logprobs"}


class InputItem(Body):
    """A message that goes into a model: text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, item: Any) -> Any:
        """Its role and its text. Raises InvalidRequest where it is something else."""
        if not isinstance(item, dict):
            return item
        item = _given(item)
        if item.get("type", "message") != "message":
            raise _unsupported(f"only items of the type message are supported, not {item['type']!r}")
        for name in sorted(item.keys() - _OF_ITEMS):
            raise _unsupported(f"{name} of an item is not supported")
        content = item.get("content")
        if isinstance(content, list):
            content = "".join(_text(part) for part in content)
        return {name: x for name, x in item.items() if name == "role"} | {"content": content}


class Named(Body):
    """A conversation by its id."""

    id: str


def _items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _named(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


def _known(values: Any) -> Any:
    for value in values if isinstance(values, list) else []:
        if value != _LOGPROBS:
            raise InvalidRequest(f"{value} cannot be included", code="unsupported_parameter", param="include")
    return values


class CreateResponse(Asked):
    """The body of POST /v1/responses."""

    input: Annotated[
        list[InputItem],
        Field(min_length=1, max_length=MAX_MESSAGES),
        BeforeValidator(_items, str | list[InputItem]),
    ]
    instructions: str | None = None
    conversation: Annotated[Named, BeforeValidator(_named, str | Named)] | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    include: Annotated[list[Literal["message.output_text.logprobs"]], BeforeValidator(_known)] = Field(default=[])
    top_logprobs: int = Field(default=0, ge=0, le=20)
    metadata: Metadata = Field(default={})
    memory: Memory | None = None  # type: ignore[assignment]  # None: "write" in a conversation, else "read"

    @model_validator(mode="after")
    def _names_one_conversation(self) -> "CreateResponse":
        if self.conversation is not None:
            if self.session not in {None, self.conversation.id}:
                raise InvalidRequest("conversation and session name two sessions", param="conversation")
            self.session = self.conversation.id
        return self

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The instructions, then the input."""
        first = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return [Chat((*first, *(as_message(item) for item in self.input)), param="input")]

    @property
    def token_limit(self) -> int | None:
        """None: as many as the server gives."""
        return self.max_output_tokens

    @property
    def num_logprobs(self) -> int | None:
        """None unless they are to be included."""
        return self.top_logprobs if _LOGPROBS in self.include else None


def _are_unicode(items: list[InputItem]) -> list[InputItem]:
    """Raises InvalidRequest: what is learnt goes into the log as UTF-8."""
    try:
        "".join(item.content for item in items).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest("half a surrogate pair is no text", code="invalid_utf8") from error
    return items


def _as_items(items: Any, read: ValidatorFunctionWrapHandler) -> Any:
    """What is refused is called by the name that it has here."""
    try:
        return read(items)
    except InvalidRequest as error:
        error.param = "items"
        raise


_Learnt = Annotated[list[InputItem], Field(max_length=20), AfterValidator(_are_unicode), WrapValidator(_as_items)]


class AddItems(Body):
    """The body of POST /v1/conversations/{id}/items."""

    items: _Learnt = Field(min_length=1)


class CreateConversation(Body):
    """The body of POST /v1/conversations."""

    items: _Learnt | None = None
    metadata: Metadata | None = None


def as_message(item: InputItem) -> dict[str, str]:
    """As a chat template takes it: OpenAI's newer name of the system is the model's old one."""
    return {"role": "system" if item.role == "developer" else item.role, "content": item.content}


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    """Without those that are null, which is the same as leaving them out."""
    return {name: x for name, x in fields.items() if x is not None}


def _text(part: Any) -> str:
    part = _given(part) if isinstance(part, dict) else part
    is_text = isinstance(part, dict) and part.get("type") in ("input_text", "output_text") and part.keys() <= _OF_PARTS
    if not is_text or not isinstance(part.get("text"), str):
        raise _unsupported("only parts of text are supported")
    text: str = part["text"]
    return text


def _unsupported(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="unsupported_parameter", param="input")
