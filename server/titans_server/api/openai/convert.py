"""What the service answers, in OpenAI's objects."""

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from titans_server.api.openai.growing import JsonList, filled
from titans_server.api.sse import as_json
from titans_server.events import AnswerPiece, AnswerToken, TokenScore, Usage
from titans_server.service import ServedModel

Json = dict[str, Any]


class AnswerForm:
    """One response: what all of its chunks have in common, and how a choice of it looks."""

    prefix: ClassVar[str]  # of its id
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: ServedModel, *, with_logprobs: bool) -> None:
        self._with_logprobs = with_logprobs
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }

    def whole(self, answers: Sequence["WholeAnswer"], usage: Json) -> str:
        """The response in one piece, as JSON; the answers by index."""
        choices = [self._choice(i, x.logprobs, x.finish_reason) | self._message(x.text) for i, x in enumerate(answers)]
        text = as_json(self._head | {"object": self.whole_object, "choices": choices, "usage": usage})
        return filled(text, [each for answer in answers for each in answer.lists])

    def chunk(self, index: int, piece: AnswerPiece, *, first: bool) -> Json:
        """A piece of one answer."""
        choice = self._choice(index, self.logprobs(piece.tokens), piece.finish_reason)
        choice |= self._delta(piece.text, first=first)
        return self._head | {"object": self.chunk_object, "choices": [choice]}

    def last_chunk(self, usage: Json) -> Json:
        """What `include_usage` asks for."""
        return self._head | {"object": self.chunk_object, "choices": [], "usage": usage}

    def logprobs(self, tokens: Sequence[AnswerToken]) -> Json | None:
        """What is told of some tokens; its lists go on with the next ones."""
        return self._logprobs(tokens) if self._with_logprobs else None

    def _choice(self, index: int, logprobs: Json | None, finish_reason: str | None) -> Json:
        return {"index": index, "logprobs": logprobs, "finish_reason": finish_reason}

    def _message(self, text: str) -> Json:
        raise NotImplementedError

    def _delta(self, text: str, *, first: bool) -> Json:
        raise NotImplementedError

    def _logprobs(self, tokens: Sequence[AnswerToken]) -> Json:
        raise NotImplementedError


class TextForm(AnswerForm):
    """As /v1/completions answers."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def _message(self, text: str) -> Json:
        return {"text": text}

    def _delta(self, text: str, *, first: bool) -> Json:
        return {"text": text}

    def _logprobs(self, tokens: Sequence[AnswerToken]) -> Json:
        return {
            "tokens": [_text(token.score) for token in tokens],
            "token_logprobs": [token.score.logprob for token in tokens],
            "top_logprobs": [_top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


class ChatForm(AnswerForm):
    """As /v1/chat/completions answers."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _message(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str, *, first: bool) -> Json:
        role = {"role": "assistant"} if first else {}
        return {"delta": role | ({"content": text} if text or first else {})}

    def _logprobs(self, tokens: Sequence[AnswerToken]) -> Json:
        return {
            "content": [scored(t.score) | {"top_logprobs": [scored(x) for x in t.top]} for t in tokens],
            "refusal": None,
        }


class WholeAnswer:
    """One answer of a response in one piece."""

    def __init__(self, form: AnswerForm) -> None:
        self._form = form
        self._texts: list[str] = []
        self._told = {name: JsonList() for name, x in (form.logprobs(()) or {}).items() if x is not None}
        self.finish_reason: str | None = None
        self.usage: Usage | None = None

    def add(self, piece: AnswerPiece) -> None:
        """What is new of it; the last piece says how it ended."""
        self._texts.append(piece.text)
        for name, items in (self._form.logprobs(piece.tokens) or {}).items():
            if items is not None:
                self._told[name].extend(items)
        self.finish_reason, self.usage = piece.finish_reason, piece.usage

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self._texts)

    @property
    def logprobs(self) -> Json | None:
        """What is told of its tokens, with marks in the places of lists."""
        told = self._form.logprobs(())
        return told and told | {name: each.mark for name, each in self._told.items()}

    @property
    def lists(self) -> Iterable[JsonList]:
        """What the marks stand for."""
        return self._told.values()


def model_object(model: ServedModel) -> Json:
    """A model, as it is listed."""
    return {"id": model.name, "object": "model", "created": model.loaded_at, "owned_by": "titans-server"}


def total(usages: Mapping[int, Usage], num_answers_each: int) -> Json:
    """What all the answers, by index, cost; a prompt counts once however many answers it has."""
    prompts = sum(usage.prompt_tokens for i, usage in usages.items() if i % num_answers_each == 0)
    answers = sum(usage.completion_tokens for usage in usages.values())
    return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}


def scored(score: TokenScore) -> Json:
    """A token with its probability, as chats tell it."""
    return {"token": _text(score), "logprob": score.logprob, "bytes": list(score.text)}


def _top(token: AnswerToken) -> Json | None:
    if token.score.logprob is None:
        return None
    return {_text(x): x.logprob for x in (*token.top, token.score)}


def _text(score: TokenScore) -> str:
    """A token's text; where it is a part of a character, its bytes as OpenAI writes them."""
    try:
        return score.text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in score.text)
