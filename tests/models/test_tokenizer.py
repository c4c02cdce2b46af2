"""Tokens of a stream are the tokens of the whole."""

import threading
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from titans.chat import ChatError
from titans.tokenizer import StreamDecoder, StreamEncoder, Tokenizer

WORDS = st.sampled_from(
    ["word", " ", "  ", "\n", "12", "3", "it's", "—", "é", "日本", "🙂", "<|im_end|>", ".", "\t", "A1"]
)

TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn", "Co"], max_codepoint=0x1FFFF), max_size=40)


def stream(tokenizer: Tokenizer, pieces: list[str], limit: int = 65_536) -> list[int]:
    encoder = StreamEncoder(tokenizer, limit)
    return [token for piece in pieces for token in encoder.feed(piece)] + encoder.finish()


@given(words=st.lists(WORDS, max_size=40), cuts=st.lists(st.integers(0, 200), max_size=5))
@settings(deadline=None, max_examples=150)
def test_a_text_cut_anywhere_has_the_tokens_of_the_whole(
    tokenizer: Tokenizer, words: list[str], cuts: list[int]
) -> None:
    text = "".join(words)
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert stream(tokenizer, pieces) == tokenizer.encode(text)


@given(texts=st.lists(TEXT, max_size=5))
@settings(deadline=None, max_examples=50)
def test_many_texts_have_the_tokens_of_each(tokenizer: Tokenizer, texts: list[str]) -> None:
    texts = [*texts, "<|im_end|>"]
    assert tokenizer.encode_all(texts) == [tokenizer.encode(text) for text in texts]


def test_other_threads_go_on_while_a_long_text_is_encoded(tokenizer: Tokenizer) -> None:
    encoding = threading.Thread(target=tokenizer.encode, args=("a word and 12 more " * 50_000,))
    encoding.start()
    turns = 0
    while encoding.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20  # hundreds; one where they are halted


def test_text_without_a_place_to_cut_passes_in_bounded_memory(tokenizer: Tokenizer) -> None:
    encoder, tokens = StreamEncoder(tokenizer, limit=100), []
    for _ in range(500):
        tokens += encoder.feed("日本語のテキスト")
        assert len(encoder._rest) <= 108
    assert tokenizer.decode(tokens + encoder.finish()) == "日本語のテキスト" * 500


def test_the_name_of_a_control_token_is_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("<|im_end|>")
    assert tokenizer.eos_token not in tokens
    assert tokenizer.decode(tokens) == "<|im_end|>"


@given(text=TEXT)
@settings(deadline=None)
def test_text_comes_out_one_token_at_a_time(tokenizer: Tokenizer, text: str) -> None:
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + decoder.finish() == text


def test_half_a_character_waits_for_its_other_half(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("🙂")
    assert len(tokens) > 1
    decoder = StreamDecoder(tokenizer)
    assert [decoder.feed(token) for token in tokens] == [""] * (len(tokens) - 1) + ["🙂"]
    decoder.feed(tokens[0])
    assert decoder.finish() == "\N{REPLACEMENT CHARACTER}"


@given(tokens=st.lists(st.integers(0, 49_151), max_size=30))
@settings(deadline=None)
def test_any_tokens_come_out_as_they_do_together(tokenizer: Tokenizer, tokens: list[int]) -> None:
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.feed, tokens)) + decoder.finish() == tokenizer.decode(tokens)


def test_bytes_that_are_no_text_are_not_held(tokenizer: Tokenizer) -> None:
    (first, *_), decoder = tokenizer.encode("🙂"), StreamDecoder(tokenizer)
    text = "".join(decoder.feed(first) for _ in range(20_000))
    assert {*text} == {"\N{REPLACEMENT CHARACTER}"}
    assert len(text) >= 19_999


@given(text=TEXT)
@settings(deadline=None)
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_a_control_token_has_its_name_and_an_unknown_one_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.eos_token) == b"<|im_end|>"
    assert tokenizer.token_bytes(10**6) == b""


def test_a_conversation_has_the_form_that_the_model_was_taught(tokenizer: Tokenizer) -> None:
    start, end = 1, 2
    system = "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    line = tokenizer.encode("\n")
    assert tokenizer.encode_chat([{"role": "user", "content": "Who?"}]) == [
        *[start, *tokenizer.encode(system), end, *line],
        *[start, *tokenizer.encode("user\nWho?"), end, *line],
        *[start, *tokenizer.encode("assistant\n")],
    ]


@given(words=st.lists(WORDS | st.sampled_from(["<|im_", "<|im_start|>", "end|>", "\0"]), max_size=10))
@settings(deadline=None)
def test_a_message_is_text_whatever_it_says(tokenizer: Tokenizer, words: list[str]) -> None:
    text = "".join(words)
    tokens = tokenizer.encode_chat([{"role": "system", "content": text}])
    assert [tokens.count(control) for control in (0, 1, 2)] == [0, 2, 1]
    assert tokenizer.encode("system\n" + text) == tokens[1 : tokens.index(tokenizer.eos_token)]


def chatting(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    return Tokenizer(tokenizer._raw, tokenizer.eos_token, 1, template)


def test_a_template_may_use_what_hugging_face_gives_it(tokenizer: Tokenizer) -> None:
    template = "{{ bos_token }}{% for m in messages %}\n    {{ m.content | trim }}{% endfor %}{{ eos_token }}"
    tokens = chatting(tokenizer, template).encode_chat([{"role": "user", "content": " a "}])
    assert (tokens[0], tokens[-1], tokenizer.decode(tokens).strip()) == (1, 2, "a")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", "<b>"),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "<b>é"),
        ("{% if tools is not none or documents is not none %}tools{% endif %}!", "!"),
        ("{{ messages[0].content | tojson }}{{ messages[1].content | tojson }}", '"<b>""é"'),
        ("{{ strftime_now('%d')[:0] }}!", "!"),
    ],
)
def test_a_template_that_hugging_face_takes_says_the_same(tokenizer: Tokenizer, template: str, says: str) -> None:
    messages = [{"role": "user", "content": content} for content in ("<b>", "é")]
    assert tokenizer.decode(chatting(tokenizer, template).encode_chat(messages)) == says


def test_a_control_tokens_name_in_json_is_what_the_message_says(tokenizer: Tokenizer) -> None:
    asked = chatting(tokenizer, "{{ messages[0].content | tojson }}<|im_end|>")
    tokens = asked.encode_chat([{"role": "user", "content": "<|im_end|>"}])
    assert tokens == [*tokenizer.encode('"<|im_end|>"'), tokenizer.eos_token]


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for",
        "{{ raise_exception('no system, please') }}",
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{{ messages[0].content | dictsort }}",
        "{{ cycler() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_cannot_be_used_is_an_error_that_says_why(tokenizer: Tokenizer, template: str | None) -> None:
    with pytest.raises(ChatError, match="chat template"):
        chatting(tokenizer, template).encode_chat([{"role": "user", "content": "a"}])
