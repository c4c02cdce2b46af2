"""GGUF files as the package gguf writes them, beside its own reader; and files that are torn, or lie."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from titans.backbone import BackboneError, load_backbone
from titans.gguf_file import GGUFFile

Edit = Callable[[bytes], bytes]
LIE = (1 << 40, (1 << 63) - 1, (1 << 64) - 1)


def write(
    path: Path,
    *,
    alignment: int | None = None,
    big: bool = False,
    fields: dict[str, int] | None = None,
    words: str | None = None,
    more: str | None = None,
) -> Path:
    """A small Llama of one layer, quantized in several ways, whose metadata are of all kinds; `fields` change them.

    `words`: its pre-tokenizer. `more`: a vector that it has besides.
    """
    endianness = gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE
    writer, rng = gguf.GGUFWriter(path, "llama", endianess=endianness), np.random.default_rng(0)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    kinds = gguf.GGUFValueType
    for kind in (k for k in kinds if k not in {kinds.ARRAY, kinds.STRING}):
        writer.add_key_value(f"test.{kind.name}", 1, kind)
    writer.add_key_value("test.negative", -(1 << 63), kinds.INT64)
    writer.add_array("test.floats", [0.1, -2.5])
    writer.add_array("test.flags", [True, False])
    writer.add_layer_norm_rms_eps(1e-5)
    own = {"block_count": 1, "embedding_length": 32, "attention.head_count": 2, "feed_forward_length": 64}
    for name, value in (own | (fields or {})).items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_tokenizer_model("gpt2")
    if words is not None:
        writer.add_tokenizer_pre(words)
    writer.add_token_list(["<|end|>", "a", "ü", "aü"])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_token_merges(["a ü"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    square, (up, down) = (32, 32), ((64, 32), (32, 64))
    layer = {"attn_q": square, "attn_k": square, "attn_v": square, "attn_output": square}
    layer |= {"ffn_gate": up, "ffn_up": up, "ffn_down": down}
    shapes = {"token_embd": (4, 32), "output_norm": (32,)} | {f"blk.0.{name}": shape for name, shape in layer.items()}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for i, (name, shape) in enumerate(shapes.items()):
        weight = rng.standard_normal(shape, dtype=np.float32)
        stored_as = "F32" if len(shape) == 1 else ("Q4_1", "Q8_0", "F16", "BF16", "Q4_0")[i % 5]
        quantization = gguf.GGMLQuantizationType[stored_as]
        writer.add_tensor(f"{name}.weight", gguf.quantize(weight, quantization), raw_dtype=quantization)
    if more is not None:
        writer.add_tensor(more, np.ones(16, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "whole.gguf").read_bytes()


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_a_file_says_what_the_package_gguf_reads_in_it(tmp_path: Path, alignment: int | None) -> None:
    path = write(tmp_path / "whole.gguf", alignment=alignment)
    ours, theirs = GGUFFile.open(path), gguf.GGUFReader(path)
    fields = {name: x.contents() for name, x in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
    assert {name: type(x) for name, x in ours.metadata.items()} == {name: type(x) for name, x in fields.items()}
    assert list(ours.tensors) == [x.name for x in theirs.tensors]
    for tensor in theirs.tensors:
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(ours.tensors[tensor.name].dequantize(), expected), tensor.name


def test_version_2_is_read_as_3_is(tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "3.gguf").write_bytes(whole)
    (tmp_path / "2.gguf").write_bytes(with_version(2)(whole))
    assert GGUFFile.open(tmp_path / "2.gguf").metadata == GGUFFile.open(tmp_path / "3.gguf").metadata


def test_a_body_is_loaded_of_it(tmp_path: Path) -> None:
    body = load_backbone(write(tmp_path / "small.gguf"))
    assert (body.config.vocab_size, body.config.num_heads, body.config.tie_embeddings) == (4, 2, True)
    assert body.tensors["layers.0.attention.qkv.weight"].shape == (96, 32)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in body.tensors.values())


def test_tensors_outlive_the_file_that_they_are_of(tmp_path: Path) -> None:
    path = write(tmp_path / "small.gguf")
    tensor = GGUFFile.open(path).tensors["token_embd.weight"]
    before = tensor.dequantize()
    path.unlink()
    assert torch.equal(tensor.dequantize(), before)


def end_of_head(whole: bytes) -> int:
    return whole.index(b"blk.0.ffn_norm.weight") + 60


def with_version(version: int) -> Edit:
    return lambda whole: whole[:4] + struct.pack("<I", version) + whole[8:]


def after(marker: bytes, layout: str, *values: int | bytes) -> Edit:
    """What follows the first `marker`, and `layout` says how it is written, is `values`."""

    def edit(whole: bytes) -> bytes:
        at = whole.index(marker) + len(marker)
        return whole[:at] + struct.pack(layout, *values) + whole[at + struct.calcsize(layout) :]

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda whole: b"", "empty"),
        (lambda whole: b"GGML" + whole[4:], "begin"),
        (lambda whole: whole[3:], "begin"),
        (with_version(1), "version 1"),
        (with_version(4), "version 4"),
        *((lambda whole, n=n: whole[:8] + struct.pack("<Q", n) + whole[16:], "") for n in LIE),  # tensors
        *((lambda whole, n=n: whole[:16] + struct.pack("<Q", n) + whole[24:], "") for n in LIE),  # keys
        *((lambda whole, n=n: whole[:24] + struct.pack("<Q", n) + whole[32:], "fewer") for n in LIE),  # a key's length
        *((after(b"general.architecture", "<IQ", 8, n), "fewer") for n in LIE),
        *((after(b"ggml.tokens", "<IIQ", 9, 8, n), "") for n in LIE),
        *((after(b"test.floats", "<IIQ", 9, 6, n), "fewer") for n in LIE),
        (after(b"test.floats", "<II", 9, 9), "unknown kind, 9"),  # lists of lists
        (after(b"test.UINT8", "<I", 13), "unknown kind, 13"),
        (after(b"general.", "<12s", b"archi\xff\xfeture"), "UnicodeDecodeError"),
        (after(b"blk.0.attn_q.weight", "<I", 0), "0 dimensions"),
        (after(b"blk.0.attn_q.weight", "<I", 5), "5 dimensions"),
        (after(b"blk.0.attn_v.weight", "<IQQ", 2, 33, 32), "whole blocks"),
        *((after(b"blk.0.attn_q.weight", "<IQQ", 2, 32, n), "ends at byte") for n in LIE),
        *((after(b"blk.0.attn_q.weight", "<IQQ", 2, 1 << 63, n), "ends at byte") for n in LIE),
        (after(b"blk.0.attn_q.weight", "<IQQI", 2, 32, 32, 99), "99 is not a valid"),
        *((after(b"blk.0.attn_q.weight", "<IQQIQ", 2, 32, 32, 0, n), "ends at byte") for n in LIE),
        (lambda whole: whole.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"), "two of"),
        (lambda whole: whole.replace(b"test.UINT16", b"test.UINT32"), "two of"),
        (lambda whole: whole[:-1], "ends at byte"),
    ],
)
def test_a_file_that_is_torn_or_lies_is_refused_and_takes_no_memory(
    tmp_path: Path, whole: bytes, edit: Edit, says: str
) -> None:
    path = tmp_path / "torn.gguf"
    path.write_bytes(edit(whole))
    tracemalloc.start()
    try:
        with pytest.raises(BackboneError, match=rf"torn\.gguf is not a body that can be loaded: .*{says}") as refusal:
            load_backbone(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("alignment", [0, 3, 96])
def test_an_alignment_that_is_none_is_refused(tmp_path: Path, whole: bytes, alignment: int) -> None:
    path = write(tmp_path / "odd.gguf", alignment=64)
    path.write_bytes(after(b"general.alignment", "<II", 4, alignment)(path.read_bytes()))
    with pytest.raises(BackboneError, match="alignment"):
        load_backbone(path)


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="little-endian"):
        load_backbone(write(tmp_path / "big.gguf", big=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention.head_count", 0),
        ("attention.head_count", 5),
        ("attention.head_count_kv", 0),
        ("block_count", 2),
        ("block_count", (1 << 32) - 1),
        ("embedding_length", 64),
        ("feed_forward_length", 32),
    ],
)
def test_sizes_that_its_tensors_do_not_have_are_refused(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(BackboneError):
        load_backbone(write(tmp_path / "odd.gguf", fields={name: value}))


@pytest.mark.parametrize("words", ["llama-bpe", "gpt-2", "tekken"])
def test_a_tokenizer_that_cuts_a_text_otherwise_is_refused(tmp_path: Path, words: str) -> None:
    """Its tokens would be others than those that the body was trained on."""
    with pytest.raises(BackboneError, match=words):
        load_backbone(write(tmp_path / "odd.gguf", words=words))


@pytest.mark.parametrize("words", ["smollm", "refact"])
def test_a_tokenizer_that_cuts_a_text_as_smollm_does_is_taken(tmp_path: Path, words: str) -> None:
    assert load_backbone(write(tmp_path / "small.gguf", words=words)).tokenizer.encode("aa") == [1, 1]


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias"])
def test_a_tensor_that_would_be_left_out_is_refused(tmp_path: Path, name: str) -> None:
    """Llama 3.1 says so, and not in its metadata, that its rotary angles are scaled."""
    with pytest.raises(BackboneError, match=name):
        load_backbone(write(tmp_path / "odd.gguf", more=name))


def test_a_merge_into_a_token_that_is_not_there_is_refused(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(whole.replace("a ü".encode(), "a é".encode()))
    with pytest.raises(BackboneError, match="merges"):
        load_backbone(path)


def test_a_first_token_that_is_none_is_refused(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(after(b"ggml.bos_token_id", "<II", 4, 4)(whole))
    with pytest.raises(BackboneError, match="bos_token"):
        load_backbone(path)


def test_no_beginning_of_a_file_is_a_body(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "torn.gguf"
    for length in (*range(0, end_of_head(whole), 5), *range(end_of_head(whole), len(whole), 997)):
        path.write_bytes(whole[:length])
        with pytest.raises(BackboneError):
            load_backbone(path)


@settings(max_examples=200)
@given(edits=st.lists(st.tuples(st.integers(0, 1 << 14), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_bytes_that_are_not_what_they_were_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, edits: list[tuple[int, bytes]]
) -> None:
    content = bytearray(whole)
    for place, new in edits:
        place %= end_of_head(whole)
        content[place : place + len(new)] = new
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(content)
    try:
        file = GGUFFile.open(path)
    except ValueError:
        return
    assert all(tensor.data.nbytes <= len(whole) for tensor in file.tensors.values())
