"""A response and its events, in OpenAI's objects."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from titans_server.api.openai.convert import Json, scored
from titans_server.api.openai.growing import JsonList, filled
from titans_server.api.openai.responses.schemas import CreateResponse, InputItem
from titans_server.api.sse import Framing, as_json
from titans_server.api.streams.ring import Frame
from titans_server.errors import TitansError
from titans_server.events import AnswerPiece, AnswerToken, Usage
from titans_server.service import ServedModel

Pieces = AsyncGenerator[AnswerPiece, None]


class ResponseForm:
    """One response: what its object and all of its events have in common."""

    def __init__(self, body: CreateResponse, session_id: str | None, model: ServedModel) -> None:
        self._item_id = f"msg_{secrets.token_hex(12)}"
        self._told = JsonList()  # of all tokens of the answer
        self._head: Json = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model.name,
            "conversation": None if session_id is None else {"id": session_id},
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_logprobs": body.top_logprobs,
            "previous_response_id": None,
            "background": False,
            "store": False,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            "error": None,
        }

    async def whole(self, pieces: Pieces) -> str:
        """The response in one piece, as JSON."""
        texts = []
        async with aclosing(pieces) as source:
            async for last in source:
                texts.append(last.text)
                self._told.extend(_logprobs(last.tokens))
        return self.json(self._ended("".join(texts), last))

    def json(self, fields: Json) -> str:
        """The response, or one of its events, as JSON."""
        return filled(as_json(fields), [self._told])

    async def events(self, pieces: Pieces) -> AsyncGenerator[Json, None]:
        """The response as it comes, for `ResponseFraming`; none of it before the first piece: see `stream_answer`."""
        at = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        texts: list[str] = []
        async with aclosing(pieces) as source:
            async for last in source:
                if not texts:
                    item, begun = self._item("", "in_progress"), self._response("in_progress", [])
                    yield {"type": "response.created", "response": begun}
                    yield {"type": "response.in_progress", "response": begun}
                    yield {"type": "response.output_item.added", "output_index": 0, "item": item | {"content": []}}
                    yield {"type": "response.content_part.added", **at, "part": item["content"][0]}
                texts.append(last.text)
                told = _logprobs(last.tokens)
                self._told.extend(told)
                if last.text or told:
                    yield {"type": "response.output_text.delta", **at, "delta": last.text, "logprobs": told}
        response = self._ended("".join(texts), last)
        item = response["output"][0]
        part = item["content"][0]
        yield {"type": "response.output_text.done", **at, "text": part["text"], "logprobs": part["logprobs"]}
        yield {"type": "response.content_part.done", **at, "part": part}
        yield {"type": "response.output_item.done", "output_index": 0, "item": item}
        yield {"type": f"response.{response['status']}", "response": response}

    def _ended(self, text: str, last: AnswerPiece) -> Json:
        assert last.usage is not None
        status = "incomplete" if last.finish_reason == "length" else "completed"
        return self._response(status, [self._item(text, status)], last.usage)

    def _response(self, status: str, output: list[Json], usage: Usage | None = None) -> Json:
        why = {"reason": "max_output_tokens"} if status == "incomplete" else None
        told = {"status": status, "incomplete_details": why, "output": output, "usage": _usage(usage)}
        return self._head | told | ({"completed_at": int(time.time())} if status == "completed" else {})

    def _item(self, text: str, status: str) -> Json:
        """With what is told of the tokens so far, as its mark."""
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": self._told.mark}
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": [part]}


class ResponseFraming(Framing):
    """Events under their types' names, counted."""

    def __init__(self, form: ResponseForm) -> None:
        self._form = form
        self._num_events = 0

    def event(self, event: Any) -> Frame:
        """See Framing."""
        event = event | {"sequence_number": self._num_events}
        self._num_events += 1
        return Frame(self._form.json(event), event["type"])

    def failure(self, error: TitansError) -> Frame:
        """In the shape of a response's events, and with the body that errors have everywhere."""
        body = error.body()
        told = {name: body["error"][name] for name in ("code", "message", "param")}
        return replace(self.event({"type": "error", **told, **body}), error=error)


def conversation_object(session_id: str, created_at: float, metadata: Any) -> Json:
    """A session, as a conversation."""
    return {
        "id": session_id,
        "object": "conversation",
        "created_at": int(created_at),
        "metadata": dict(metadata),
    }


def item_list(items: Sequence[InputItem]) -> Json:
    """Items that were learnt; their ids are good for nothing but telling them apart."""
    data = [
        {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": item.role,
            "status": "completed",
            "content": [_part(item)],
        }
        for item in items
    ]
    return {"object": "list", "data": data, "first_id": data[0]["id"], "last_id": data[-1]["id"], "has_more": False}


def _part(item: InputItem) -> Json:
    if item.role != "assistant":
        return {"type": "input_text", "text": item.content}
    return {"type": "output_text", "text": item.content, "annotations": [], "logprobs": []}


def _usage(usage: Usage | None) -> Json | None:
    if usage is None:
        return None
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }


def _logprobs(tokens: Sequence[AnswerToken]) -> list[Json]:
    return [scored(token.score) | {"top_logprobs": [scored(x) for x in token.top]} for token in tokens]
