"""The real body beside transformers, which reads the same files by code of its own."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import write_tiny_checkpoint
from titans.backbone import Backbone, BackboneError, find_default_body, load_backbone
from titans.chat import ChatError
from titans.checkpoint import build
from titans.config import MemoryConfig, TitansConfig
from titans.model import TitansModel, next_token_loss
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, pre_tokenizers

TEXT = Path(__file__).parents[2] / "examples" / "sherlock-holmes.txt"


@pytest.fixture(scope="module", autouse=True)
def all_cores() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def theirs() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        transformers = pytest.importorskip("transformers")
        path = find_default_body()
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()


@pytest.fixture(scope="module")
def tokens(body: Backbone) -> torch.Tensor:
    text = TEXT.read_text(encoding="utf-8")
    return torch.tensor([body.tokenizer.encode(text[20_000:32_000])[:2_048]])


def make_model(body: Backbone, *, window: int, sink: bool) -> TitansModel:
    config = TitansConfig(body.config, MemoryConfig(), (15,), window=window, num_persistent=int(sink))
    model = build(body, config).eval().requires_grad_(False)
    model.set_sinks()
    return model


def read_all(model: TitansModel, tokens: torch.Tensor) -> torch.Tensor:
    stream, hidden = model.open(model.new_state(), recall=False), []
    for part in tokens.split(model.config.window, dim=1):
        h, stream = model(part, stream)
        hidden.append(h)
    return model.logits(torch.cat(hidden, dim=1))


@torch.no_grad()
def test_with_the_window_open_and_the_memory_off_logits_are_those_of_transformers(
    body: Backbone, theirs: Any, tokens: torch.Tensor
) -> None:
    ours = read_all(make_model(body, window=512, sink=False), tokens[:, :300])
    torch.testing.assert_close(ours, theirs(tokens[:, :300]).logits, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_the_sink_is_the_bos_token_in_front(body: Backbone, theirs: Any, tokens: torch.Tensor) -> None:
    bos = torch.tensor([[body.config.bos_token]])
    expected = theirs(torch.cat((bos, tokens[:, :200]), dim=1)).logits[:, 1:]
    ours = read_all(make_model(body, window=256, sink=True), tokens[:, :200])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_the_window_with_its_sink_stays_near_full_attention(body: Backbone, theirs: Any, tokens: torch.Tensor) -> None:
    def far_loss(logits: torch.Tensor) -> float:
        return next_token_loss(logits[:, 1_023:-1], tokens[:, 1_024:]).item()

    full = far_loss(theirs(tokens).logits)
    windowed = far_loss(read_all(make_model(body, window=256, sink=True), tokens))
    assert full < windowed + 0.02
    assert windowed < full + 0.25


def test_a_hugging_face_directory_is_the_same_body(body: Backbone, theirs: Any, tmp_path: Path) -> None:
    fields = {k: v for k, v in theirs.config.to_dict().items() if k != "quantization_config"}
    plain = type(theirs)(type(theirs.config).from_dict(fields))
    plain.load_state_dict(theirs.state_dict())
    plain.save_pretrained(tmp_path)
    body.tokenizer._raw.save(str(tmp_path / "tokenizer.json"))
    loaded = load_backbone(tmp_path)
    assert replace(loaded.config, norm_eps=1.0) == replace(body.config, norm_eps=1.0)
    assert loaded.config.norm_eps == pytest.approx(body.config.norm_eps)
    assert set(loaded.tensors) == set(body.tensors)
    for name, tensor in body.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor), name


def test_the_tokenizer_is_the_one_transformers_makes(body: Backbone) -> None:
    transformers = pytest.importorskip("transformers")
    path = find_default_body()
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in ("It's 1,234,567 — naïve!", "  two  spaces\n\n\ttab", "日本語 🙂 🏳️‍🌈", TEXT.read_text()[:5_000]):
        assert body.tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
        assert body.tokenizer.decode(body.tokenizer.encode(text)) == text


def test_what_is_not_a_body_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="nowhere"):
        load_backbone(tmp_path / "nowhere.gguf")
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(find_default_body().read_bytes()[:1_000_000])
    with pytest.raises(BackboneError, match=r"torn\.gguf"):
        load_backbone(torn)
    with pytest.raises(BackboneError):
        load_backbone(tmp_path)
    for content, told in (({"model_type": "mamba"}, "mamba"), ([], "object"), ({"model_type": "llama"}, "token_id")):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(BackboneError, match=told):
            load_backbone(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff not it"])
def test_a_directory_with_a_file_torn_or_missing_is_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = write_tiny_checkpoint(tmp_path).body / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BackboneError):
        load_backbone(path.parent)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, None),
        ({"tokenizer_config.json": "{}"}, None),
        ({"tokenizer_config.json": '{"chat_template": "ä"}'}, "ä"),
        ({"tokenizer_config.json": '{"chat_template": "a"}', "chat_template.jinja": "b"}, "b"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "default", "template": "c"}]}'}, "c"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "tools", "template": "c"}]}'}, None),
    ],
)
def test_a_chat_template_is_found_where_hugging_face_keeps_it(
    tmp_path: Path, files: dict[str, str], says: str | None
) -> None:
    body = write_tiny_checkpoint(tmp_path).body
    (body / "tokenizer_config.json").unlink()
    for name, text in files.items():
        (body / name).write_text(text, encoding="utf-8")
    tokenizer, messages = load_backbone(body).tokenizer, [{"role": "user", "content": "x"}]
    if says is None:
        with pytest.raises(ChatError):
            tokenizer.encode_chat(messages)
    else:
        assert tokenizer.decode(tokenizer.encode_chat(messages)) == says


@pytest.mark.parametrize(
    "change",
    [
        {"bos_token_id": None},
        {"bos_token_id": 259},
        {"bos_token_id": True},
        {"rms_norm_eps": 0},
        {"rms_norm_eps": "x"},
        {"rms_norm_eps": math.nan},
        {"rope_theta": -1},
        {"rope_theta": math.inf},
        {"tie_word_embeddings": 1},
        {"eos_token_id": None},
        {"eos_token_id": [-1]},
        {"vocab_size": 400},
        {"hidden_size": 1 << 40},
        {"intermediate_size": 64},
        {"num_key_value_heads": 3},
        {"head_dim": 7},
        {"rope_scaling": "linear"},
        {"rope_parameters": [1]},
        {"hidden_act": "gelu"},
    ],
)
def test_a_config_that_is_not_its_tensors_and_tokens_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = write_tiny_checkpoint(tmp_path).body
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(BackboneError):
        load_backbone(path)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, number: float) -> None:
    """They would be served: what is learnt lies below them, and an answer of nothing looks like one."""
    path = write_tiny_checkpoint(tmp_path).body
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][1, 2] = number
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(BackboneError, match=r"layers\.3\.mlp\.down\.weight is finite"):
        load_backbone(path)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused_without_what_they_stand_for(tmp_path: Path, kind: torch.dtype) -> None:
    path = write_tiny_checkpoint(tmp_path).body
    tensors, name = load_file(path / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    scale = tensors[name].abs().max() / 127
    codes = {name: (tensors[name] / scale).round().to(kind), f"{name}_scale": scale}
    save_file(tensors | codes, path / "model.safetensors")
    with pytest.raises(BackboneError, match="quantized"):
        load_backbone(path)


def test_a_tokenizer_that_is_not_of_bytes_is_refused(tmp_path: Path) -> None:
    """Spaces would be lost: its token for " a" is "a" where it stands by itself."""
    path = write_tiny_checkpoint(tmp_path).body
    raw = RawTokenizer.from_file(str(path / "tokenizer.json"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    raw.save(str(path / "tokenizer.json"))
    with pytest.raises(BackboneError, match="byte-level"):
        load_backbone(path)


def test_a_tokenizer_that_cuts_and_fills_up_texts_does_so_no_more(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path).body
    raw = RawTokenizer.from_file(str(path / "tokenizer.json"))
    raw.enable_truncation(8)  # as it was in training, and so it is saved
    raw.enable_padding(length=16)
    raw.save(str(path / "tokenizer.json"))
    tokenizer, text = load_backbone(path).tokenizer, "The code is 4819203."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("ab")) == 2


def test_a_token_that_the_body_has_no_row_for_is_none_of_its_tokens(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path).body
    raw = RawTokenizer.from_file(str(path / "tokenizer.json"))
    raw.add_special_tokens(["[PAD]"])  # as those who train a body go about it: without a row in its embedding
    raw.save(str(path / "tokenizer.json"))
    body = load_backbone(path)
    assert body.tokenizer.vocab_size == body.config.vocab_size == raw.get_vocab_size() - 1


def test_a_token_of_texts_that_the_body_has_no_row_for_is_refused(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path).body
    raw = RawTokenizer.from_file(str(path / "tokenizer.json"))
    raw.add_tokens(["Sherlock"])
    raw.save(str(path / "tokenizer.json"))
    with pytest.raises(BackboneError, match="has the token 'Sherlock', 259, and the body knows 259"):
        load_backbone(path)


@pytest.mark.parametrize("config", ["{", '{"chat_template": 5}', '{"chat_template": [{}]}'])
def test_a_torn_chat_template_is_a_torn_body(tmp_path: Path, config: str) -> None:
    body = write_tiny_checkpoint(tmp_path).body
    (body / "tokenizer_config.json").write_text(config)
    with pytest.raises(BackboneError):
        load_backbone(body)
