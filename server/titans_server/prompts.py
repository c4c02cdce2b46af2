"""An answer that is asked for, and what its prompt is in tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from titans.chat import ChatError
from titans.sampling import SamplingParams
from titans.tokenizer import Tokenizer

from titans_server.errors import InvalidRequest

_FRAME = 32  # characters that a template writes around a message, about: its role, and where it begins and ends


@dataclass(frozen=True)
class Chat:
    """A conversation, to be put into the model's own form."""

    messages: tuple[Mapping[str, str], ...]  # "role" and "content"
    param: str = "messages"  # the request's field that they are from


Prompt = str | Sequence[int] | Chat  # text, tokens, or what the model's chat template makes text of


@dataclass(frozen=True)
class CompletionRequest:
    """An answer that is asked for."""

    prompt: Prompt
    max_tokens: int
    sampling: SamplingParams
    stops: tuple[str, ...] = ()
    memory: Literal["read", "write", "off"] = "read"
    echo: bool = False  # the answer begins with the prompt
    if_match: int | None = None  # the version that the session has to be at

    @property
    def num_told(self) -> int:
        """Tokens that the answer has at most; the prompt has to be in tokens."""
        return self.max_tokens + (0 if isinstance(self.prompt, Chat) or not self.echo else len(self.prompt))


def prepare(request: CompletionRequest, tokenizer: Tokenizer, max_tokens: int) -> CompletionRequest:
    """The request with its prompt in tokens. Raises InvalidRequest where it is empty, too long or not for it."""
    param = _param(request.prompt)
    at_least = _least_tokens(request.prompt, tokenizer)
    if at_least > max_tokens:  # so much text would take others' time only to be refused
        raise _too_long(f"at least {at_least}", max_tokens, param)
    tokens = encode(request.prompt, tokenizer)
    if not tokens:
        raise InvalidRequest("the prompt is empty", param=param)
    if len(tokens) > max_tokens:
        raise _too_long(str(len(tokens)), max_tokens, param)
    _check(tokens, tokenizer, param)
    _check([token for token, _ in request.sampling.logit_bias], tokenizer, "logit_bias")
    return replace(request, prompt=tokens)


def num_characters(prompt: Prompt) -> int:
    """How much of it is still text, about: what making tokens of it takes follows from that."""
    if isinstance(prompt, Chat):
        return sum(_FRAME + len(message["content"]) for message in prompt.messages)
    return len(prompt) if isinstance(prompt, str) else 0


def encode(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a prompt; those given as tokens are not checked. Raises InvalidRequest where it has none."""
    try:
        if isinstance(prompt, str):
            return tokenizer.encode(prompt)
        return tokenizer.encode_chat(prompt.messages) if isinstance(prompt, Chat) else list(prompt)
    except ChatError as error:
        raise InvalidRequest(str(error), code="no_chat_template", param=_param(prompt)) from error
    except TypeError as error:
        raise InvalidRequest("half a surrogate pair is no text", code="invalid_utf8", param=_param(prompt)) from error


def _least_tokens(prompt: Prompt, tokenizer: Tokenizer) -> int:
    """No more than it has; found without making them. A message is one at least, whatever its template writes."""
    if isinstance(prompt, Chat):
        return sum(max(1, len(message["content"]) // tokenizer.longest) for message in prompt.messages)
    return num_characters(prompt) // tokenizer.longest


def _too_long(num_tokens: str, max_tokens: int, param: str) -> InvalidRequest:
    message = f"the prompt has {num_tokens} tokens, at most {max_tokens} are taken: post long texts as documents"
    return InvalidRequest(message, code="prompt_too_long", param=param)


def _param(prompt: Prompt) -> str:
    return prompt.param if isinstance(prompt, Chat) else "prompt"


def _check(tokens: Sequence[int], tokenizer: Tokenizer, param: str) -> None:
    last = tokenizer.vocab_size - 1
    if tokens and not 0 <= min(tokens) <= max(tokens) <= last:
        raise InvalidRequest(f"the model's tokens are 0 to {last}", param=param)
