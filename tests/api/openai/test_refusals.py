"""What OpenAI's client is refused, by which name, and what is taken though it asks for nothing."""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from support.models import write_tiny_checkpoint
from support.openai_client import CHAT, MODEL, Driver
from support.servers import LiveServer, free_port
from titans.tokenizer import Tokenizer
from titans_server.api.openai.answers import check_scores
from titans_server.api.openai.schemas import MAX_CHOICES, CreateCompletion
from titans_server.settings import Settings


@pytest.mark.parametrize("stream", [False, True])
def test_what_one_request_is_told_is_bounded(http: httpx.Client, stream: bool) -> None:
    body = {"model": MODEL, "messages": CHAT, "n": 7, "logprobs": True, "top_logprobs": 20, "stream": stream}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        error = json.loads(answer.read())["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", "top_logprobs")


def test_as_much_is_told_as_an_evaluation_asks_for() -> None:
    """lm-eval's local-completions: all of its prompts echoed, and the likeliest token at each place."""
    body = CreateCompletion(model=MODEL, prompt=["a"], max_tokens=1, echo=True, logprobs=1)
    (request,) = body.to_requests(4_096, "read")
    check_scores(body, [replace(request, prompt=[5] * 4_096)] * MAX_CHOICES)


@pytest.mark.parametrize("session", ["ses_nobody", "", "../etc"])
@pytest.mark.parametrize("stream", [True, False])
async def test_an_unknown_session_is_not_found(ai: Driver, session: str, stream: bool) -> None:
    for options in ({"extra_body": {"session": session}}, {"extra_headers": {"X-Session-ID": session}}):
        with pytest.raises(openai.NotFoundError) as caught:
            await ai.chat(stream=stream, **options)
        assert (caught.value.code, caught.value.type) == ("session_not_found", "invalid_request_error")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_request"),
        ({"top_p": 0}, "top_p", "invalid_request"),
        ({"max_tokens": 0}, "max_tokens", "invalid_request"),
        ({"max_tokens": 4_097}, "max_tokens", "invalid_request"),
        ({"n": 0}, "n", "invalid_request"),
        ({"n": 33}, "n", "invalid_request"),
        ({"stop": ["a"] * 5}, "stop", "invalid_request"),
        ({"stop": ""}, "stop.0", "invalid_request"),
        ({"seed": 1 << 63}, "seed", "invalid_request"),
        ({"presence_penalty": 2.1}, "presence_penalty", "invalid_request"),
        ({"frequency_penalty": -2.1}, "frequency_penalty", "invalid_request"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_request"),
        ({"logit_bias": {"259": 1}}, "logit_bias", "invalid_request"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_request"),
        ({"extra_body": {"min_p": 2}}, "min_p", "invalid_request"),
        ({"extra_body": {"memory": "maybe"}}, "memory", "invalid_request"),
        ({"extra_body": {"memory": "write"}}, "memory", "invalid_request"),
        ({"extra_body": {"tempratur": 1}}, "tempratur", "unsupported_parameter"),
        ({"extra_body": {"response_format": {"type": "json_object"}}}, "response_format", "unsupported_parameter"),
        ({"extra_body": {"best_of": 2}}, "best_of", "unsupported_parameter"),
        ({"extra_body": {"tools": [{"type": "function"}]}}, "tools", "unsupported_parameter"),
    ],
)
async def test_what_makes_no_sense_is_named(
    ai: Driver, fields: dict[str, Any], param: str, code: str, stream: bool
) -> None:
    for ask, asked in ((ai.text, "what now"), (ai.chat, CHAT)):
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(asked, stream=stream, **fields)
        assert (caught.value.param, caught.value.code, caught.value.status_code) == (param, code, 400)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "messages"),
        ([{"role": "clown", "content": "x"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "assistant", "content": None}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages"),
        ([{"role": "user", "content": "x" * 1_001}], "messages"),
    ],
)
async def test_a_message_that_is_not_text_is_refused(ai: Driver, messages: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ai.chat(messages)
    assert caught.value.param == param


@pytest.fixture
def rendering(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads in which conversations were made tokens."""
    threads: list[str] = []
    encode = Tokenizer.encode_chat

    def encode_chat(self: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
        threads.append(threading.current_thread().name)
        return encode(self, messages)

    monkeypatch.setattr(Tokenizer, "encode_chat", encode_chat)
    return threads


@pytest.mark.parametrize(("path", "param"), [("chat/completions", "messages"), ("responses", "input")])
def test_more_empty_messages_than_tokens_are_refused_unread(
    http: httpx.Client, rendering: list[str], path: str, param: str
) -> None:
    refused = http.post(f"/v1/{path}", json={"model": MODEL, param: [{"role": "user", "content": ""}] * 1_001})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "prompt_too_long", param)
    assert not rendering


@pytest.mark.parametrize(("path", "param"), [("chat/completions", "messages"), ("responses", "input")])
def test_what_follows_the_last_message_that_is_taken_is_not_looked_at(
    http: httpx.Client, path: str, param: str
) -> None:
    messages: list[Any] = [{"role": "user", "content": ""}] * 2_049
    refused = http.post(f"/v1/{path}", json={"model": MODEL, param: [*messages, "no message"]})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "invalid_request", param)


def test_many_empty_messages_are_made_tokens_beside_the_event_loop(http: httpx.Client, rendering: list[str]) -> None:
    messages = [{"role": "user", "content": ""}]
    assert http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages}).status_code == 200
    (loop,) = set(rendering)
    rendering.clear()
    refused = http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages * 900})
    assert refused.json()["error"]["code"] == "prompt_too_long"
    assert rendering and loop not in rendering


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], 5, [5, "a"], [5.5], [True], [[1], [259]], [-1], ["a"] * 33])
async def test_a_prompt_that_is_none_is_refused(ai: Driver, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ai.text(prompt)
    assert caught.value.param in {"prompt", "n"}


async def test_another_model_than_the_served_one_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-5", prompt="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_two_sessions_in_one_request_are_refused(client: OpenAI, told: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(
            model=MODEL, prompt="a", extra_body={"session": told}, extra_headers={"X-Session-ID": "ses_other"}
        )
    assert caught.value.param == "session"


def test_a_session_learns_one_answer_at_a_time(client: OpenAI, told: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a", n=2, extra_body={"session": told, "memory": "write"})
    assert caught.value.param == "memory"


def test_values_that_ask_for_nothing_are_taken(http: httpx.Client) -> None:
    nothing = {"tools": [], "response_format": {"type": "text"}, "store": False, "user": "me", "n": None, "audio": None}
    body = {"model": MODEL, "messages": CHAT, "max_tokens": 2, "parallel_tool_calls": True, **nothing}
    assert http.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(("annotations", "status"), [([], 200), ([{"type": "url_citation"}], 400)])
def test_an_answer_of_openais_may_be_given_back_where_it_was_text(
    http: httpx.Client, annotations: list[Any], status: int
) -> None:
    nothing: dict[str, Any] = {"refusal": None, "audio": None, "function_call": None, "tool_calls": []}
    answer = {"role": "assistant", "content": "a", "annotations": annotations, **nothing}
    body = {"model": MODEL, "messages": [*CHAT, answer, *CHAT], "max_tokens": 2}
    assert http.post("/v1/chat/completions", json=body).status_code == status


@pytest.mark.parametrize("options", [None, {}, {"include_obfuscation": False}])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("completions", {"prompt": "a", "max_tokens": 2}),
        ("chat/completions", {"messages": CHAT, "max_tokens": 2}),
        ("responses", {"input": "a", "max_output_tokens": 2}),
    ],
)
def test_stream_options_that_ask_for_nothing_are_taken(
    http: httpx.Client, path: str, asked: dict[str, Any], options: dict[str, Any] | None
) -> None:
    body = {"model": MODEL, "stream": True, "stream_options": options, **asked}
    answer = http.post(f"/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.text.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize(("path", "asked"), [("completions", {"prompt": "a"}), ("responses", {"input": "a"})])
def test_stream_options_that_ask_for_more_are_refused(http: httpx.Client, path: str, asked: dict[str, Any]) -> None:
    body = {"model": MODEL, "stream": True, "stream_options": {"include_obfuscation": True}, **asked}
    refused = http.post(f"/v1/{path}", json=body)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", "stream_options")


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"",
        b"[]",
        b'"text"',
        b'{"model": "tiny-0", "prompt": "\\ud800"}',
        b'{"model": "tiny-0", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "\\ud800", "\\ud800": 1}',
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_body_that_is_no_request_is_refused_in_the_same_shape(http: httpx.Client, path: str, content: bytes) -> None:
    response = http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_model_without_a_chat_template_says_so(tmp_path: Path, settings: Settings) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path, 1)
    (checkpoint.body / "tokenizer_config.json").unlink()
    paths = {"body": checkpoint.body, "memory": checkpoint.memory, "store": "memory://", "port": free_port()}
    with (
        LiveServer(settings.model_copy(update=paths)) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny-1", messages=[{"role": "user", "content": "a"}])
        assert (caught.value.code, caught.value.param) == ("no_chat_template", "messages")
        assert client.completions.create(model="tiny-1", prompt="a", max_tokens=2).usage
