"""What a model is asked in process: many answers at once, a wide window, nats a token."""

from collections.abc import Iterator

import pytest
import torch
from support.models import TinyCheckpoint, write_tiny_checkpoint
from titans.checkpoint import Loaded, load
from titans.evaluation.generate import generate
from titans.evaluation.haystack import Haystack
from titans.evaluation.local import LocalReader, widen, window_for, windows_at_once
from titans.evaluation.perplexity import perplexity
from titans.evaluation.task import EvaluationError
from titans.model import next_token_loss

SENTENCES = "It was a bright cold day. The clocks were striking. Nobody had seen the lamp before. "
TEXT = SENTENCES * 20
PROMPTS = ["\n\nWho?", "\n\nWhat was striking, and where had it been before then?", "x"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(checkpoint: TinyCheckpoint) -> Iterator[Loaded]:
    yield load(checkpoint.body, checkpoint.memory, device=torch.device("cpu"), dtype=torch.float32)
    widen.cache_clear()


@pytest.fixture
def reader(loaded: Loaded) -> LocalReader:
    return LocalReader(loaded)


def tokens(loaded: Loaded, text: str) -> torch.Tensor:
    return torch.tensor([loaded.tokenizer.encode(text)])


def test_answers_made_together_are_those_made_alone(loaded: Loaded) -> None:
    model = loaded.model
    stream = model.open(model.ingest(tokens(loaded, TEXT[:300]), model.new_state()))
    together = generate(model, loaded.tokenizer, stream.select([0] * 3), PROMPTS, max_tokens=12, stop="\n")
    assert len(set(together)) == 3, "the prompts are told apart"
    for prompt, answer in zip(PROMPTS, together, strict=True):
        assert generate(model, loaded.tokenizer, stream.select([0]), [prompt], max_tokens=12, stop="\n") == [answer]


def test_an_answer_is_the_likeliest_token_each_time_up_to_a_stop(loaded: Loaded) -> None:
    model = loaded.model
    stream = model.open(model.ingest(tokens(loaded, TEXT[:300]), model.new_state()))
    said: list[int] = []
    for _ in range(8):
        h, _ = model(torch.tensor([loaded.tokenizer.encode(PROMPTS[1]) + said]), stream.select([0]))
        said.append(int(model.logits(h[:, -1]).argmax()))
    whole = loaded.tokenizer.decode(said)
    assert generate(model, loaded.tokenizer, stream.select([0]), [PROMPTS[1]], max_tokens=8, stop="\n\n\n") == [whole]
    assert generate(model, loaded.tokenizer, stream.select([0]), [PROMPTS[1]], max_tokens=8, stop=whole[3]) == [
        whole.partition(whole[3])[0]
    ]


def test_a_document_that_was_read_is_answered_with_the_memory_on_and_off(reader: LocalReader) -> None:
    seen: list[int] = []
    with reader.read([TEXT], seen.append) as reading:
        answers = [reading.answer([PROMPTS], memory=on, max_tokens=12, stop="\n") for on in (True, False, True)]
    assert seen == sorted(seen)
    assert seen[-1] == reading.num_tokens[0] == reader.count(TEXT)
    assert answers[0] == answers[2] != answers[1]


def test_documents_read_together_are_answered_as_alone(reader: LocalReader) -> None:
    texts, prompts = [TEXT, TEXT[90:400], TEXT[5:]], [PROMPTS, PROMPTS[:1], PROMPTS[1:]]
    seen: list[int] = []
    with reader.read(texts, seen.append) as reading:
        together = reading.answer(prompts, memory=True, max_tokens=12, stop="\n")
    assert seen == sorted(seen)
    assert seen[-1] == sum(map(len, texts))
    for text, some, answers in zip(texts, prompts, together, strict=True):
        with reader.read([text], seen.append) as reading:
            assert reading.answer([some], memory=True, max_tokens=12, stop="\n") == [answers]


def test_many_documents_are_read_a_window_at_a_time_on_a_gpu() -> None:
    assert [windows_at_once(count, 256) for count in (1, 16, 17, 20, 64, 1_000)] == [4, 4, 3, 3, 1, 1]
    assert windows_at_once(1, 32_768) == 1


def test_full_attention_sees_what_the_window_does_not(reader: LocalReader, loaded: Loaded) -> None:
    model, other = loaded.model, "Z" + TEXT[1:200]
    ways = {"window": model, "full": widen(model, window_for(200))}
    assert ways["full"].config.window >= 200 + 256
    ends = {}
    for name, way in ways.items():
        for text in (TEXT[:200], other):
            h, _ = way(tokens(loaded, text), way.open(way.new_state(), recall=False))
            ends[name, text] = h[0]
    first, last = slice(0, model.config.window), -1
    assert torch.allclose(ends["window", TEXT[:200]][first], ends["full", TEXT[:200]][first], atol=1e-5)
    assert torch.equal(ends["window", TEXT[:200]][last], ends["window", other][last])
    assert not torch.equal(ends["full", TEXT[:200]][last], ends["full", other][last])
    with reader.read_in_full(TEXT) as reading:
        assert reading.num_tokens == [len(TEXT)]
        assert len(reading.answer([PROMPTS], memory=False, max_tokens=4, stop="\n")[0]) == 3


def test_nats_are_those_of_one_pass_over_the_whole_text(reader: LocalReader, loaded: Loaded) -> None:
    book, model, moved = Haystack(TEXT, reader.count), loaded.model, list[int]()
    found = perplexity(reader, book, 150, moved.append)
    text = tokens(loaded, TEXT[:150])
    window = model.config.window
    for name, stream in {
        "memory": model.open(model.new_state(), write=True),
        "off": model.open(model.new_state(), recall=False),
    }.items():
        h, _ = model(text[:, :-1], stream)
        expected = next_token_loss(model.logits(h[:, window:]), text[:, window + 1 :])
        assert found.nats[name] == pytest.approx(float(expected), rel=1e-5)
    assert len(set(found.nats.values())) == 3
    assert sum(moved) == 3 * 149
    beside = perplexity(reader, book, 150, moved.append, body=model).nats
    assert beside == found.nats | {"body": found.nats["off"], "body_full": found.nats["full"]}


def test_names_that_are_met_again_have_nats_of_their_own(reader: LocalReader, loaded: Loaded) -> None:
    said = ("And Irene saw it. " + "and so it was. " * 12) * 2
    book, model, text = Haystack(said, reader.count), loaded.model, tokens(loaded, said)
    found = perplexity(reader, book, text.shape[1], lambda _: None)
    place = said.rindex("Irene")  # a character is a token of this model
    h, _ = model(text[:, :-1], model.open(model.new_state(), recall=False))
    expected = next_token_loss(model.logits(h[:, place - 1 : place + 4]), text[:, place : place + 5])
    assert found.num_names == len("Irene")
    assert found.names["off"] == pytest.approx(float(expected), rel=1e-5)
    assert len(set(found.names.values())) == 3


def test_a_stream_is_never_a_text_twice(reader: LocalReader) -> None:
    book = Haystack(TEXT, reader.count)
    with pytest.raises(EvaluationError, match="cannot repeat a text"):
        perplexity(reader, book, len(TEXT) + 1, lambda _: None)
    with pytest.raises(EvaluationError, match="more tokens than the window"):
        perplexity(reader, book, 17, lambda _: None)


def test_full_attention_has_the_weights_of_a_bfloat16_server(checkpoint: TinyCheckpoint) -> None:
    loaded = load(checkpoint.body, checkpoint.memory, device=torch.device("cpu"), dtype=torch.bfloat16)
    wide, text = widen(loaded.model, 1_024), tokens(loaded, TEXT[:16])  # of which each window holds all
    h, full = (way(text, way.open(way.new_state(), recall=False))[0] for way in (loaded.model, wide))
    torch.testing.assert_close(full, h, rtol=0.02, atol=0.02)
