"""Tokens of a stream are the tokens of the whole."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from titans.tokenizer import StreamDecoder, StreamEncoder, Tokenizer

WORDS = st.sampled_from(
    ["word", " ", "  ", "\n", "12", "3", "it's", "—", "é", "日本", "🙂", "<|im_end|>", ".", "\t", "A1"]
)


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


@given(text=st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn", "Co"], max_codepoint=0x1FFFF), max_size=40))
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
