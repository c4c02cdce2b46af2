"""What OpenAI's clients send. Fields of theirs that ask for what is not here are refused by name."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from titans.sampling import SamplingParams

from titans_server.api.schemas import Body, Stops
from titans_server.errors import InvalidRequest
from titans_server.prompts import Chat, CompletionRequest, Prompt

MAX_CHOICES = 32  # of one request: prompts times n
MAX_MESSAGES = 2_048  # as many as OpenAI takes
_NOTHING: dict[str, Sequence[Any]] = {  # values that ask for nothing, of fields that are not supported
    "audio": (),
    "background": (False,),
    "best_of": (1,),
    "functions": ([],),
    "include": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "stream_options": ({}, {"include_obfuscation": False}),
    "suffix": ("",),
    "text": ({}, {"format": {"type": "text"}}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncation": ("disabled",),
}
_OF_ANSWERS = {"annotations", "tool_calls"}  # of a message that was an answer; given back, they are empty lists
_INSTEAD = {
    "previous_response_id": ": responses are not kept; name a conversation, which remembers what was said in it",
    "store": ": responses are not kept; name a conversation, which remembers what was said in it",
    "background": ": ask for a stream with the header Prefer: resumable, and come back to it",
}


def _prompts(value: Any) -> Any:
    """One prompt or several, as several."""
    prompts = [value] if isinstance(value, str) or _is_tokens(value) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(x, str) or _is_tokens(x) for x in prompts):
        raise ValueError("must be a string, a list of token ids, or a list of either")
    return prompts


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


_Tokens = Annotated[list[int], Field(min_length=1)]
_Prompt = str | _Tokens | Annotated[list[str] | list[_Tokens] | list[str | _Tokens], Field(min_length=1)]
Memory = Literal["read", "write", "off"]
_Bias = Annotated[float, Field(ge=-100.0, le=100.0)]


def _shown(schema: dict[str, Any]) -> None:
    """A field that may be left out may be null; one that is not supported may ask for nothing."""
    for name, shown in schema["properties"].items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = {"anyOf": [shown, {"type": "null"}]}
    for name, values in _NOTHING.items():
        schema["properties"].setdefault(name, {"enum": [None, *values], "description": "not supported"})


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False  # not supported: events are as long as what they tell

    @model_validator(mode="before")
    @classmethod
    def _are_supported(cls, options: Any) -> Any:
        """Without what is null. Raises InvalidRequest where they ask for what is not supported."""
        if not isinstance(options, dict):
            return options
        options = {name: x for name, x in options.items() if x is not None}
        if options.get("include_obfuscation") is True:
            message = "include_obfuscation is not supported"
            raise InvalidRequest(message, code="unsupported_parameter", param="stream_options")
        return options


class Asked(Body):
    """What every kind of answer is asked with."""

    model_config = ConfigDict(json_schema_extra=_shown)

    model: str
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: Stops = Field([])
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    logit_bias: Annotated[dict[Annotated[int, Field(strict=False)], _Bias], Field(max_length=1_024)] = Field({})
    stream: bool = False
    user: str | None = None  # not looked at
    session: str | None = None
    memory: Memory = "read"

    @model_validator(mode="before")
    @classmethod
    def _is_supported(cls, fields: Any) -> Any:
        """Without what is null or asks for nothing. Raises InvalidRequest at what is not supported."""
        if not isinstance(fields, dict):
            return fields
        for name, value in fields.items():
            if name not in cls.model_fields and value is not None and value not in _NOTHING.get(name, ()):
                why = _INSTEAD.get(name, "")
                raise InvalidRequest(f"{name} is not supported{why}", code="unsupported_parameter", param=name)
        return {name: x for name, x in fields.items() if x is not None and name in cls.model_fields}

    @property
    def prompts(self) -> Sequence[Prompt]:
        """What is to be answered, each n times."""
        raise NotImplementedError

    @property
    def token_limit(self) -> int | None:
        """Tokens of an answer, None: as many as the server gives."""
        raise NotImplementedError

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell of at each place; None: of no probability at all."""
        raise NotImplementedError

    @property
    def is_echoed(self) -> bool:
        """Whether an answer begins with its prompt."""
        return False

    def to_requests(self, max_tokens: int, memory: Memory) -> list[CompletionRequest]:
        """What the service is asked for, one a prompt. `max_tokens`: the most that the server gives."""
        limit = max_tokens if self.token_limit is None else self.token_limit
        if limit > max_tokens:
            names = ("max_output_tokens", "max_completion_tokens", "max_tokens")
            name = next((name for name in names if name in self.model_fields_set), None)
            if name is not None:
                raise InvalidRequest(f"{name} is at most {max_tokens}", param=name)
            limit = max_tokens
        sampling = SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            seed=None if self.seed is None else self.seed % (1 << 63),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            num_logprobs=self.num_logprobs,
        )
        stops, echo = tuple(self.stop), self.is_echoed
        return [CompletionRequest(prompt, limit, sampling, stops, memory, echo) for prompt in self.prompts]


class CreateAnswer(Asked):
    """What both kinds of completion are asked with."""

    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> "CreateAnswer":
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options are for stream: true", param="stream_options")
        num_choices = len(self.prompts) * self.n
        if num_choices > MAX_CHOICES:
            raise InvalidRequest(f"prompts times n is at most {MAX_CHOICES}", param="n")
        if self.memory == "write" and num_choices > 1:
            raise InvalidRequest("a session learns one answer: one prompt, n 1", param="memory")
        return self


class CreateCompletion(CreateAnswer):
    """The body of POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts, _Prompt)]
    max_tokens: int = Field(default=16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _asks_for_something(self) -> "CreateCompletion":
        if not self.max_tokens and not self.echo:
            raise InvalidRequest("max_tokens is at least 1, but with echo: true", param="max_tokens")
        return self

    @property
    def is_echoed(self) -> bool:
        """As asked."""
        return self.echo

    @property
    def prompts(self) -> Sequence[Prompt]:
        """Texts or tokens."""
        return self.prompt

    @property
    def token_limit(self) -> int | None:
        """OpenAI's default is 16."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """A number that may be 0."""
        return self.logprobs


class Message(Body):
    """A message of a conversation: text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, fields: Any) -> Any:
        """With the parts of its text joined. Raises InvalidRequest where it is not text alone."""
        if not isinstance(fields, dict):
            return fields
        nothing = {name for name, x in fields.items() if x is None or (x == [] and name in _OF_ANSWERS)} - {"content"}
        fields = {name: x for name, x in fields.items() if name not in nothing}
        for name in fields.keys() - cls.model_fields.keys():
            raise InvalidRequest(
                f"{name} of a message is not supported", code="unsupported_parameter", param="messages"
            )
        parts = fields.get("content")
        if isinstance(parts, list):
            for part in parts:
                is_part = isinstance(part, dict) and {x for x in part if part[x] is not None} == {"type", "text"}
                if not is_part or part["type"] != "text":
                    raise InvalidRequest(
                        "only parts of text are supported", code="unsupported_parameter", param="messages"
                    )
            if all(isinstance(part["text"], str) for part in parts):
                fields["content"] = "".join(part["text"] for part in parts)
        return fields


class CreateChatCompletion(CreateAnswer):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _asks_for_logprobs(self) -> "CreateChatCompletion":
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs are for logprobs: true", param="top_logprobs")
        return self

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The one conversation. OpenAI's newer name of the system is the model's old one."""
        roles = {"developer": "system"}
        return [Chat(tuple({"role": roles.get(m.role, m.role), "content": m.content} for m in self.messages))]

    @property
    def token_limit(self) -> int | None:
        """By its new name or its old one."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """None unless asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None
