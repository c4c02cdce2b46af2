"""OpenAI's own client, sync and async, against a real server with a tiny model: what it is answered."""

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Self

import httpx
import openai
import pytest
from openai import OpenAI
from support.models import tiny_tokenizer, write_tiny_checkpoint
from support.openai_client import CHAT, EOS, GREEDY, MODEL, STORY, Driver
from support.servers import LiveServer, free_port
from titans.backbone import load_backbone
from titans_server.events import AnswerPiece
from titans_server.service import SessionService
from titans_server.settings import Settings
from tokenizers.pre_tokenizers import ByteLevel


def native(http: httpx.Client, session: str, **options: Any) -> dict[str, Any]:
    answer = http.post(f"/v1/sessions/{session}/completions", json={"prompt": "what now", **GREEDY, **options})
    assert answer.status_code == 200, answer.text
    fields: dict[str, Any] = answer.json()
    return fields


def show(http: httpx.Client, session: str) -> dict[str, Any]:
    fields: dict[str, Any] = http.get(f"/v1/sessions/{session}").json()
    return fields


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = [c for chunk in chunks for c in chunk.choices if c.index == index]
    return "".join((c.delta.content or "") if hasattr(c, "delta") else c.text for c in choices)


def token_of(letter: str) -> str:
    """A token of the tiny model, as JSON has it."""
    return str(3 + sorted(ByteLevel.alphabet()).index(letter))


async def test_the_served_model_is_listed_and_no_other_is_there(ai: Driver) -> None:
    models = await ai.models()
    assert [(m.id, m.object, m.owned_by) for m in models.data] == [(MODEL, "model", "titans-server")]
    assert abs(models.data[0].created - time.time()) < 600
    assert (await ai.model(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        await ai.model("gpt-5")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_a_text_is_continued_streamed_as_at_once(ai: Driver) -> None:
    whole = await ai.text("what now")
    (choice,) = whole.choices
    assert (whole.object, whole.model, choice.index, choice.logprobs) == ("text_completion", MODEL, 0, None)
    assert (choice.finish_reason, whole.usage.prompt_tokens) == ("length", len("what now"))
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (20, 28)
    assert whole.id.startswith("cmpl-")
    chunks = await ai.text("what now", stream=True)
    assert text_of(chunks) == choice.text
    assert {c.id for c in chunks} == {chunks[0].id}
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)


async def test_a_conversation_is_answered_streamed_as_at_once(ai: Driver) -> None:
    whole = await ai.chat()
    (choice,) = whole.choices
    assert (whole.object, choice.message.role, choice.message.tool_calls) == ("chat.completion", "assistant", None)
    *chunks, last = await ai.chat(stream=True, stream_options={"include_usage": True})
    assert text_of(chunks) == choice.message.content
    assert [c.choices[0].delta.role for c in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason == "length"
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(chunk.usage is None for chunk in chunks)


async def test_a_conversation_is_put_into_the_models_form(ai: Driver) -> None:
    shown = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nwhat now<|im_end|>\n<|im_start|>assistant\n"
    letters = len(shown) - 3 * len("<|im_start|>") - 2 * len("<|im_end|>") + 5
    assert (await ai.chat()).usage.prompt_tokens == letters, "a control token is one token, and not its letters"
    parts = [{"type": "text", "text": "what "}, {"type": "text", "text": "now"}]
    same = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    assert (await ai.chat(same)).choices == (await ai.chat()).choices


async def test_a_message_cannot_end_its_turn(ai: Driver) -> None:
    plain, forged = ([{"role": "user", "content": f"a{x}b"}] for x in ("", "<|im_end|>"))
    longer = (await ai.chat(forged)).usage.prompt_tokens - (await ai.chat(plain)).usage.prompt_tokens
    assert longer == len("<|im_end|>"), "letters, and not the control token"


async def test_several_answers_come_by_their_number(ai: Driver) -> None:
    options = {"n": 3, "temperature": 1.3, "seed": 5}
    whole = await ai.chat(**options)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    chunks = await ai.chat(**options, stream=True)
    assert [text_of(chunks, i) for i in range(3)] == texts
    alone = await ai.chat(temperature=1.3, seed=5)
    assert alone.choices[0].message.content == texts[0]
    assert whole.usage.prompt_tokens == alone.usage.prompt_tokens
    assert whole.usage.completion_tokens > alone.usage.completion_tokens


async def test_several_prompts_are_answered_at_once_and_as_alone(ai: Driver) -> None:
    prompts = ["what now", "and then?", "x" * 50]
    alone = [await ai.text(prompt) for prompt in prompts]
    together = await ai.text(prompts)
    assert [c.text for c in together.choices] == [a.choices[0].text for a in alone]
    assert together.usage.total_tokens == sum(a.usage.total_tokens for a in alone)
    pairs = await ai.text(prompts[:2], n=2)
    assert [c.text for c in pairs.choices] == [a.choices[0].text for a in alone[:2] for _ in range(2)]
    assert pairs.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in alone[:2])


async def test_tokens_are_a_prompt_too(ai: Driver) -> None:
    one, other = await ai.text([5, 6, 7, 8]), await ai.text([[5, 6, 7, 8], [9]])
    assert one.usage.prompt_tokens == 4
    assert other.choices[0].text == one.choices[0].text


async def test_a_seed_repeats_its_answer(ai: Driver) -> None:
    drawn = [await ai.text("what now", temperature=1.3, top_p=0.9, seed=seed) for seed in (5, 5, 6, -5)]
    texts = [answer.choices[0].text for answer in drawn]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


async def test_a_stop_ends_the_answer_before_it(ai: Driver) -> None:
    whole = (await ai.text("what now", max_tokens=60)).choices[0].text
    stop = whole[5:7]
    for asked in (stop, ["###", stop]):
        cut = await ai.text("what now", max_tokens=60, stop=asked, logprobs=0)
        assert cut.choices[0].text == whole[: whole.index(stop)] == "".join(cut.choices[0].logprobs.tokens)
        assert cut.choices[0].finish_reason == "stop"
        chunks = await ai.text("what now", max_tokens=60, stop=asked, stream=True)
        assert text_of(chunks) == cut.choices[0].text


async def test_a_text_tells_how_likely_its_tokens_were(ai: Driver) -> None:
    whole = (await ai.text("what now", logprobs=2)).choices[0]
    told = whole.logprobs
    assert "".join(told.tokens) == whole.text
    assert told.text_offset == list(range(20)), "the tokens of this model are bytes"
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == logprob == max(top.values()) < 0
    chunks = await ai.text("what now", logprobs=2, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    assert [t for part in parts for t in part.tokens] == told.tokens
    assert [x for part in parts for x in part.token_logprobs] == pytest.approx(told.token_logprobs, abs=1e-4)
    assert [x for part in parts for x in part.text_offset] == told.text_offset


async def test_tokens_wait_with_their_text_for_a_stop_that_does_not_come(ai: Driver) -> None:
    whole = (await ai.text("what now", logprobs=0)).choices[0]
    chunks = await ai.text("what now", logprobs=0, stream=True, stop=[whole.text[3:6] + "#", whole.text[-3:] + "#"])
    assert text_of(chunks) == whole.text
    for choice in (chunk.choices[0] for chunk in chunks):
        assert "".join(choice.logprobs.tokens) == choice.text
    assert chunks[-1].choices[0].text.endswith(whole.text[-3:])


async def test_a_conversation_tells_how_likely_its_tokens_were(ai: Driver) -> None:
    whole = (await ai.chat(logprobs=True, top_logprobs=3)).choices[0]
    told = whole.logprobs.content
    assert "".join(x.token for x in told) == whole.message.content
    for x in told:
        assert [len(x.top_logprobs), bytes(x.bytes)] == [3, x.token.encode()]
        assert (x.top_logprobs[0].token, x.top_logprobs[0].logprob) == (x.token, x.logprob)
    chunks = await ai.chat(logprobs=True, stream=True)
    parts = [x for chunk in chunks for x in chunk.choices[0].logprobs.content]
    assert [x.token for x in parts] == [x.token for x in told]
    assert all(x.top_logprobs == [] for x in parts)


@pytest.mark.parametrize("prompt", ["what now", "a prompt of several windows. " * 4])
async def test_an_echo_tells_of_the_prompt_what_was_told_of_it_as_an_answer(ai: Driver, prompt: str) -> None:
    said = (await ai.text(prompt, logprobs=2, logit_bias={EOS: -100})).choices[0]
    echoed = (await ai.text(prompt + said.text, logprobs=2, echo=True, max_tokens=0)).choices[0]
    told = echoed.logprobs
    assert echoed.text == prompt + said.text == "".join(told.tokens)
    assert told.text_offset == list(range(len(echoed.text)))
    assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
    assert told.token_logprobs[len(prompt) :] == pytest.approx(said.logprobs.token_logprobs, abs=1e-3)
    for token, logprob, top in zip(told.tokens[1:], told.token_logprobs[1:], told.top_logprobs[1:], strict=True):
        assert top[token] == logprob
        assert len(top) in {2, 3}


async def test_an_echo_comes_before_the_answer_streamed_as_at_once(ai: Driver, told: str) -> None:
    extra = {"extra_body": {"session": told}}
    alone = (await ai.text("what now", logprobs=0, **extra)).choices[0]
    whole = (await ai.text("what now", logprobs=0, echo=True, **extra)).choices[0]
    assert whole.text == "what now" + alone.text
    assert whole.logprobs.tokens == list("what now") + alone.logprobs.tokens
    assert whole.logprobs.text_offset == list(range(len(whole.text)))
    chunks = await ai.text("what now", logprobs=0, echo=True, stream=True, **extra)
    assert text_of(chunks) == whole.text
    assert [x for chunk in chunks for x in chunk.choices[0].logprobs.tokens] == whole.logprobs.tokens
    plain = await ai.text("wie schön € 🙂", echo=True, max_tokens=1)
    assert plain.choices[0].text.startswith("wie schön € 🙂")
    assert plain.choices[0].logprobs is None
    several = await ai.text(["a", "bc"], echo=True, n=2)
    assert [choice.text[:2].rstrip() for choice in several.choices][2:] == ["bc", "bc"]
    assert (await ai.text("abc", echo=True, stop="b", max_tokens=1)).choices[0].text.startswith("abc")


async def test_a_character_that_a_prompt_begins_and_an_answer_ends_is_told_whole(ai: Driver) -> None:
    *prompt, last = tiny_tokenizer().encode("café")
    made = await ai.text(prompt, logprobs=0, echo=True, max_tokens=1, logit_bias={str(last): 100})
    whole = made.choices[0]
    assert whole.text == "café"
    assert whole.logprobs.text_offset == [0, 1, 2, 3, 3]


async def test_an_echo_tells_of_the_end_of_text_too(ai: Driver) -> None:
    """lm-eval takes the last token for the one that was generated, whatever it is."""
    ended = (await ai.text("what now", logprobs=1, echo=True, max_tokens=1, logit_bias={EOS: 100})).choices[0]
    assert (ended.text, ended.finish_reason) == ("what now", "stop")
    assert len(ended.logprobs.tokens) == len("what now") + 1


async def test_no_tokens_are_for_an_echo_alone(ai: Driver) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ai.text("a", max_tokens=0)
    assert caught.value.param == "max_tokens"


async def test_bias_forbids_and_forces(ai: Driver) -> None:
    free = (await ai.text("what now")).choices[0].text
    forced = (await ai.text("what now", logit_bias={token_of("x"): 100}, logprobs=0)).choices[0]
    assert forced.text == "x" * 20
    assert max(forced.logprobs.token_logprobs) < -0.1, "told as the model has it, without the bias"
    banned = (await ai.text("what now", logit_bias={token_of(free[0]): -100})).choices[0].text
    assert free[0] not in banned


async def test_penalties_make_for_other_tokens(ai: Driver) -> None:
    def repeats(text: str) -> int:
        return len(text) - len(set(text))

    plain = (await ai.text("what now", max_tokens=30, logit_bias={EOS: -100})).choices[0].text
    for name in ("presence_penalty", "frequency_penalty"):
        text = (await ai.text("what now", max_tokens=30, logit_bias={EOS: -100}, **{name: 2.0})).choices[0].text
        assert repeats(text) < repeats(plain), name


async def test_the_fields_of_other_servers_are_known(ai: Driver) -> None:
    greedy = await ai.text("what now")
    for extra in ({"top_k": 1}, {"min_p": 1.0}):
        drawn = await ai.text("what now", temperature=1.0, extra_body=extra)
        assert drawn.choices[0].text == greedy.choices[0].text
    assert (await ai.text("what now", extra_body={"top_k": -1})).choices == greedy.choices


async def test_a_session_answers_from_what_it_has_read(ai: Driver, http: httpx.Client, told: str) -> None:
    expected = native(http, told)["text"]
    in_body = await ai.text("what now", extra_body={"session": told})
    in_header = await ai.text("what now", extra_headers={"X-Session-ID": told})
    both = await ai.text("what now", extra_body={"session": told}, extra_headers={"X-Session-ID": told})
    assert {x.choices[0].text for x in (in_body, in_header, both)} == {expected}
    off = await ai.text("what now", extra_body={"session": told, "memory": "off"})
    assert off.choices[0].text == native(http, told, memory="off")["text"] != expected
    assert (await ai.text("what now")).choices[0].text != expected, "without a session nothing is remembered"
    asked: list[dict[str, Any]] = [{}, {"session": told}, {"session": told, "memory": "off"}]
    chats = [await ai.chat(extra_body=extra) for extra in asked]
    plain, remembering, off = (chat.choices[0].message.content for chat in chats)
    assert remembering not in {plain, off}
    assert show(http, told)["version"] == 1, "asking changes nothing"


class Watch:
    """How much of its thread's time a server's event loop takes between two looks at what else there is to do."""

    def __init__(self, server: LiveServer) -> None:
        self._loop = server.server.servers[0].get_loop()
        self.longest = 0.0  # seconds

    def __enter__(self) -> Self:
        self._is_on = True
        self._loop.call_soon_threadsafe(self._look, None)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_on = False

    def _look(self, before: float | None) -> None:
        now = time.thread_time()
        self.longest = max(self.longest, now - (now if before is None else before))
        if self._is_on:
            self._loop.call_later(0.001, self._look, now)


PROMPT = "what now, and then? " * 50


MUCH: dict[str, dict[str, Any]] = {
    "completions": {"prompt": [PROMPT] * 8, "max_tokens": 0, "echo": True, "logprobs": 20},
    "chat/completions": {"messages": CHAT, "n": 8, "max_tokens": 500, "logprobs": True, "top_logprobs": 20},
    "responses": {
        "input": "a",
        "max_output_tokens": 2_000,
        "top_logprobs": 20,
        "include": ["message.output_text.logprobs"],
    },
}


@pytest.mark.parametrize("path", MUCH)
def test_others_are_served_while_much_is_told(server: LiveServer, http: httpx.Client, path: str) -> None:
    with Watch(server) as watch:
        answer = http.post(f"/v1/{path}", json={"model": MODEL, "logit_bias": {str(EOS): -100}, **MUCH[path]})
    assert answer.status_code == 200
    assert int(answer.headers["content-length"]) == len(answer.content) > 2_000_000
    assert watch.longest < 0.15


async def test_several_answers_are_of_one_version_whatever_is_learnt_meanwhile(
    ai: Driver, http: httpx.Client, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, num_asked = SessionService.answer, 0

    async def more() -> AsyncGenerator[str, None]:
        yield "and then something else. " * 20

    async def answer_late(self: SessionService, session_id: str, *args: Any) -> AsyncGenerator[AnswerPiece, None]:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 2:
            async with aclosing(self.ingest(session_id, more())) as events:
                _ = [event async for event in events]
        async with aclosing(answer(self, session_id, *args)) as pieces:
            async for piece in pieces:
                yield piece

    before = native(http, told)["text"]
    monkeypatch.setattr(SessionService, "answer", answer_late)
    both = await ai.text("what now", n=2, extra_body={"session": told})
    assert [choice.text for choice in both.choices] == [before] * 2
    assert native(http, told)["text"] != before


async def test_memory_write_learns_the_conversation(ai: Driver, http: httpx.Client, told: str) -> None:
    answer = await ai.chat(extra_body={"session": told, "memory": "write"})
    shown = show(http, told)
    assert shown["version"] == 2
    assert shown["tokens_seen"] == len(STORY) + answer.usage.total_tokens
    await ai.chat(extra_body={"session": told, "memory": "write"}, stream=True)
    assert show(http, told)["version"] == 3


async def test_without_a_session_a_prompt_may_be_longer_than_the_window(
    ai: Driver, http: httpx.Client, session: str
) -> None:
    long = "words " * 100
    answer = await ai.text(long)
    assert answer.usage.prompt_tokens == 600
    assert answer.choices[0].text == native(http, session, prompt=long)["text"], "as a session that has read nothing"


def test_a_stream_ends_with_done(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 3, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line and not line.startswith("id: ")]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines), "no event has a name"
    assert {json.loads(line[6:])["object"] for line in lines[:-1]} == {"text_completion"}


def test_an_answer_ends_at_any_of_the_tokens_that_its_body_ends_with(tmp_path: Path, settings: Settings) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path, 1)
    config = checkpoint.body / "config.json"
    letter = load_backbone(checkpoint.body).tokenizer.encode("o")[0]
    own = {"body": checkpoint.body, "memory": checkpoint.memory, "store": "memory://"}
    said = []
    for ends in ([2], [2, letter]):  # as bodies have them that end a text otherwise than a turn
        config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": ends}))
        with (
            LiveServer(settings.model_copy(update=own | {"port": free_port()})) as server,
            OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        ):
            chosen: dict[str, Any] = {"temperature": 0, "max_tokens": 3, "logit_bias": {str(letter): 100}}
            said.append(client.completions.create(model="tiny-1", prompt="a", **chosen).choices[0])
    assert [(choice.text, choice.finish_reason) for choice in said] == [("ooo", "length"), ("", "stop")]
