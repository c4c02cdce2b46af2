"""OpenAI's own client, sync and async, on responses and conversations: a conversation is a session."""

import time
from typing import Any

import httpx
import openai
import pytest
from httpx_sse import connect_sse
from openai import AsyncOpenAI, OpenAI
from openai.types.conversations import ConversationItemList
from openai.types.responses import EasyInputMessage, ResponseStreamEvent
from pydantic import TypeAdapter
from support.openai_client import EOS, MODEL, STORY, Driver
from support.servers import LiveServer

LOGPROBS = ["message.output_text.logprobs"]


def show(http: httpx.Client, session: str) -> dict[str, Any]:
    fields: dict[str, Any] = http.get(f"/v1/sessions/{session}").json()
    return fields


def version(http: httpx.Client, session: str) -> int:
    return int(show(http, session)["version"])


async def test_a_response_is_what_a_chat_answers(ai: Driver) -> None:
    response = await ai.respond(instructions="Be kind.", metadata={"a": "b"})
    chat = await ai.settle(
        ai.client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "what now"}],
            temperature=0,
            max_tokens=20,
        )
    )
    assert response.output_text == chat.choices[0].message.content
    assert (response.object, response.model, response.conversation) == ("response", MODEL, None)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.instructions, response.metadata) == ("Be kind.", {"a": "b"})
    assert response.id.startswith("resp_")
    (item,) = response.output
    assert (item.type, item.role, item.status, item.content[0].annotations) == (
        "message",
        "assistant",
        "incomplete",
        [],
    )
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.total_tokens == chat.usage.total_tokens


async def test_input_is_a_text_or_messages_and_an_answer_may_be_given_back(ai: Driver) -> None:
    plain = await ai.respond("what now")
    parts = [{"type": "input_text", "text": "what "}, {"type": "input_text", "text": "now"}]
    for same in ([{"role": "user", "content": "what now"}], [{"type": "message", "role": "user", "content": parts}]):
        assert (await ai.respond(same)).output_text == plain.output_text
    turns = [{"role": "user", "content": "what now"}, *plain.output, {"role": "user", "content": "and then?"}]
    again = await ai.respond(turns)
    assert again.usage.input_tokens > plain.usage.input_tokens + 20


async def test_a_stream_has_the_events_of_the_responses_api(ai: Driver) -> None:
    whole = await ai.respond(include=LOGPROBS, top_logprobs=2)
    events = await ai.respond(stream=True, include=LOGPROBS, top_logprobs=2)
    names = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [name for name in names if name != "response.output_text.delta"] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in deltas) == whole.output_text
    last = events[-1].response
    assert last.id == events[0].response.id
    assert last.usage == whole.usage
    told = whole.output[0].content[0].logprobs
    assert [x.token for event in deltas for x in event.logprobs] == [x.token for x in told]
    assert [len(x.top_logprobs) for x in told] == [2] * 20
    assert {event.item_id for event in deltas} == {last.output[0].id}


@pytest.mark.parametrize("extra", [{}, {"include": LOGPROBS, "top_logprobs": 2}], ids=["text", "logprobs"])
def test_every_event_has_all_that_the_client_says_it_has(http: httpx.Client, extra: dict[str, Any]) -> None:
    """The client itself looks at nothing: what is missing would show where somebody reads it."""
    asked = {"model": MODEL, "input": "what now", "max_output_tokens": 4, "stream": True} | extra
    with connect_sse(http, "POST", "/v1/responses", json=asked) as source:
        *events, done = source.iter_sse()
    assert done.data == "[DONE]"
    shape = TypeAdapter[Any](ResponseStreamEvent)
    for event in events:
        assert shape.validate_json(event.data).type == event.event


async def test_the_stream_helper_of_the_client_puts_it_together(server: LiveServer) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": "what now", "temperature": 0, "max_output_tokens": 20}
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        text = (await client.responses.create(**asked)).output_text
        stop: dict[str, Any] = {"extra_body": {"stop": text[5:7]}}
        async with client.responses.stream(**asked, **stop) as stream:
            async for _ in stream:
                pass
            assert (await stream.get_final_response()).output_text == text[: text.index(text[5:7])]


async def test_a_whole_answer_is_completed(ai: Driver) -> None:
    response = await ai.respond(extra_body={"logit_bias": {str(EOS): 100}})
    assert (response.status, response.output_text, response.incomplete_details) == ("completed", "", None)
    events = await ai.respond(stream=True, extra_body={"logit_bias": {str(EOS): 100}})
    assert events[-1].type == "response.completed"


async def test_a_conversation_is_a_session_and_remembers(ai: Driver, http: httpx.Client) -> None:
    conversation = await ai.converse(metadata={"book": "Ü"})
    assert (conversation.object, conversation.metadata) == ("conversation", {"book": "Ü"})
    shown = await ai.settle(ai.client.conversations.retrieve(conversation.id))
    assert shown == conversation
    assert show(http, conversation.id)["metadata"] == {"book": "Ü"}
    first = await ai.respond(STORY, conversation=conversation.id)
    assert first.conversation.id == conversation.id
    assert version(http, conversation.id) == 1, "what was said is learnt"
    alone = await ai.respond("what now")
    again = await ai.respond("what now", conversation={"id": conversation.id}, stream=True)
    assert again[-1].response.output_text != alone.output_text
    assert version(http, conversation.id) == 2
    for named in ({"extra_body": {"session": conversation.id}}, {"extra_headers": {"X-Session-ID": conversation.id}}):
        await ai.respond("what now", **named)
    assert version(http, conversation.id) == 4
    await ai.respond("what now", conversation=conversation.id, extra_body={"memory": "read"})
    assert version(http, conversation.id) == 4
    gone = await ai.settle(ai.client.conversations.delete(conversation.id))
    assert (gone.id, gone.deleted) == (conversation.id, True)
    with pytest.raises(openai.NotFoundError):
        await ai.settle(ai.client.conversations.retrieve(conversation.id))


async def test_items_are_learnt_as_a_document(ai: Driver, http: httpx.Client) -> None:
    items: Any = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "and second"}]
    conversation = await ai.converse(items=items)
    seen = show(http, conversation.id)
    assert (seen["version"], seen["tokens_seen"]) == (1, len("first\n\nand second"))
    listed = await ai.settle(ai.client.conversations.items.create(conversation.id, items=items))
    assert [(item.role, item.content[0].text) for item in listed.data] == [
        ("user", "first"),
        ("assistant", "and second"),
    ]
    assert listed.has_more is False
    TypeAdapter(ConversationItemList).validate_python(listed.to_dict())
    assert version(http, conversation.id) == 2
    with pytest.raises(openai.BadRequestError) as caught:
        await ai.settle(ai.client.conversations.items.list(conversation.id))
    assert caught.value.code == "items_not_kept"


async def test_what_is_null_is_left_out(ai: Driver) -> None:
    plain = await ai.respond([{"role": "user", "content": "what now"}])
    item = EasyInputMessage(role="user", content="what now").model_dump()
    assert None in item.values()
    part = {"type": "input_text", "text": "what now", "prompt_cache_breakpoint": None}
    for given in (item, {"role": "user", "content": [part], "name": None}):
        assert (await ai.respond([given])).output_text == plain.output_text
    with pytest.raises(openai.BadRequestError, match="name of an item is not supported"):
        await ai.respond([{"role": "user", "content": "what now", "name": "me"}])


def test_a_conversation_whose_items_cannot_be_learnt_is_not_there(http: httpx.Client) -> None:
    refused = http.post("/v1/conversations", json={"items": [{"role": "user", "content": ""}]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "empty_document")
    assert http.post("/v1/conversations").status_code == 200, "a body may be left out"


def test_a_conversation_whose_client_leaves_before_it_is_told_of_it_is_not_there(
    server: LiveServer, http: httpx.Client
) -> None:
    def ids() -> set[str]:
        return {each["id"] for each in http.get("/v1/sessions?limit=100").json()["data"]}

    before = ids()
    items = [{"role": "user", "content": "words " * 100_000}]  # which take longer than is waited for here
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/conversations", json={"items": items}, timeout=1)
    deadline = time.monotonic() + 10
    while ids() != before:
        assert time.monotonic() < deadline, "it is learnt for nobody"
        time.sleep(0.05)


@pytest.mark.parametrize("path", ["/v1/conversations", "/v1/conversations/{}/items"])
@pytest.mark.parametrize(
    "item", [{"type": "item_reference", "id": "x"}, {"role": "user", "content": [{"type": "input_image"}]}]
)
def test_items_that_are_no_text_are_refused_by_their_name(http: httpx.Client, path: str, item: dict[str, Any]) -> None:
    conversation = http.post("/v1/conversations").json()["id"]
    error = http.post(path.format(conversation), json={"items": [item]}).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "items")


@pytest.mark.parametrize("path", ["/v1/conversations", "/v1/conversations/{}/items"])
def test_items_with_half_a_surrogate_pair_are_refused(http: httpx.Client, path: str) -> None:
    conversation = http.post("/v1/conversations").json()["id"]
    before = len(http.get("/v1/sessions?limit=100").json()["data"])
    body = b'{"items": [{"role": "user", "content": "a"}, {"role": "user", "content": "\\ud83d"}]}'
    refused = http.post(path.format(conversation), content=body, headers={"Content-Type": "application/json"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_utf8")
    assert refused.json()["error"]["param"] == "items"
    assert version(http, conversation) == 0
    assert len(http.get("/v1/sessions?limit=100").json()["data"]) == before


@pytest.mark.parametrize("kind", [[], {}, ["input_text"], 1])
def test_a_part_whose_type_is_no_name_is_refused(http: httpx.Client, kind: Any) -> None:
    item = {"role": "user", "content": [{"type": kind, "text": "a"}]}
    for path, body in (("responses", {"model": MODEL, "input": [item]}), ("conversations", {"items": [item]})):
        refused = http.post(f"/v1/{path}", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_parameter")


@pytest.mark.parametrize("stream", [True, False])
async def test_an_unknown_conversation_is_not_found(ai: Driver, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await ai.respond(conversation="conv_nobody", stream=stream)
    assert caught.value.code == "session_not_found"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools", "unsupported_parameter"),
        ({"extra_body": {"text": {"format": {"type": "json_object"}}}}, "text", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"include": ["file_search_call.results"]}, "include", "unsupported_parameter"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_request"),
        ({"max_output_tokens": 4_097}, "max_output_tokens", "invalid_request"),
        ({"top_logprobs": 21}, "top_logprobs", "invalid_request"),
        ({"temperature": 3}, "temperature", "invalid_request"),
        ({"input": []}, "input", "invalid_request"),
        ({"input": [{"role": "clown", "content": "x"}]}, "input.0.role", "invalid_request"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "unsupported_parameter"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input", None),
        ({"input": "x" * 2_000}, "input", "prompt_too_long"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a", "invalid_request"),
        ({"extra_body": {"memory": "write"}}, "memory", "invalid_request"),
        ({"extra_body": {"n": 2}}, "n", "unsupported_parameter"),
        ({"conversation": "ses_a", "extra_body": {"session": "ses_b"}}, "conversation", "invalid_request"),
        ({"conversation": "ses_a", "extra_headers": {"X-Session-ID": "ses_b"}}, "session", "invalid_request"),
    ],
)
async def test_what_makes_no_sense_is_named(
    ai: Driver, fields: dict[str, Any], param: str, code: str | None, stream: bool
) -> None:
    asked = {name: x for name, x in fields.items() if name != "input"}
    with pytest.raises(openai.BadRequestError) as caught:
        await ai.respond(fields.get("input", "what now"), stream=stream, **asked)
    assert caught.value.param == param
    assert caught.value.code == (code or "unsupported_parameter")


def test_a_stream_that_fails_raises_with_the_same_name(server: LiveServer, http: httpx.Client) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.responses.create(
            model=MODEL, input="a", max_output_tokens=4_096, stream=True, extra_body={"logit_bias": {str(EOS): -100}}
        )
        first = next(iter(stream))
        assert first.type == "response.created"
        http.delete(f"/v1/streams/{stream.response.headers['x-stream-id']}")
        with pytest.raises(openai.APIError) as caught:
            list(stream)
    assert caught.value.code == "stream_stopped"
