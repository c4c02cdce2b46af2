"""Small models that tests share."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from titans.architecture import AttentionLayer
from titans.checkpoint import digest, save_memory
from titans.config import tiny
from titans.model import TitansModel
from titans.tokenizer import Tokenizer, bpe_tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.pre_tokenizers import ByteLevel

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT = """{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def make_tiny(seed: int = 0, *, window: int = 16, adapted: bool = False, **form: object) -> TitansModel:
    """An untrained float32 model whose memories write and answer strongly enough to be seen."""
    torch.manual_seed(seed)
    config = replace(tiny(**form), window=window, adapted=adapted)  # type: ignore[arg-type]
    model = TitansModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    for memory in model.memories:
        memory.reset()
        memory.gates.weight.normal_(std=0.3)
        memory.out_gate.bias.fill_(3.0)
        memory.out.weight.mul_(4.0)
    model.set_sinks()
    return model


@dataclass(frozen=True)
class TinyCheckpoint:
    """A body in a Hugging Face directory, and memory weights for it."""

    body: Path
    memory: Path

    @property
    def environment(self) -> dict[str, str]:
        """What makes a server serve it."""
        return {
            "TITANS_BODY": str(self.body),
            "TITANS_MEMORY": str(self.memory),
            "TITANS_DTYPE": "float32",
            "TITANS_THREADS": "1",
        }


def write_tiny_checkpoint(folder: Path, seed: int = 0, *, window: int = 16) -> TinyCheckpoint:
    """`make_tiny` with a readout, adapted, on disk, with a tokenizer whose tokens are bytes and a chat template."""
    body, memory = folder / f"tiny-{seed}", folder / f"memory-{seed}.safetensors"
    body.mkdir(parents=True)
    model, alphabet = make_tiny(seed, window=window, adapted=True, readout=True), sorted(ByteLevel.alphabet())
    mute = [i for i, letter in enumerate([*_SPECIAL, *alphabet]) if not (letter.isascii() and letter.isalnum())]
    model.embedding.weight[mute] = 0.0  # so that what it says is text that can be told apart
    config = model.config.backbone
    fields = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token,
        "eos_token_id": config.eos_token,
    }
    (body / "config.json").write_text(json.dumps(fields))
    save_file(_hugging_face_tensors(model), body / "model.safetensors")
    _bytes_as_tokens().save(str(body / "tokenizer.json"))
    (body / "tokenizer_config.json").write_text(json.dumps({"chat_template": _CHAT}))
    for parameter in model.adapted.values():
        parameter.add_(0.1 * torch.randn_like(parameter))
    save_memory(model, digest(body), memory)
    return TinyCheckpoint(body, memory)


def tiny_tokenizer() -> Tokenizer:
    """The tokenizer of `write_tiny_checkpoint`: bytes."""
    return Tokenizer(_bytes_as_tokens(), 2, 1, _CHAT)


def _bytes_as_tokens() -> RawTokenizer:
    return bpe_tokenizer([*_SPECIAL, *sorted(ByteLevel.alphabet())], [], _SPECIAL)


def _hugging_face_tensors(model: TitansModel) -> dict[str, torch.Tensor]:
    config = model.config.backbone
    sizes = [config.num_heads * config.head_dim, *[config.num_kv_heads * config.head_dim] * 2]
    tensors = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, AttentionLayer)
        q, k, v = layer.attention.qkv.weight.split(sizes)
        gate, up = layer.mlp.gate_up.weight.chunk(2)
        theirs = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.attention.out.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.mlp.down.weight,
            "input_layernorm": layer.attention_norm.weight,
            "post_attention_layernorm": layer.mlp_norm.weight,
        }
        tensors |= {f"model.layers.{i}.{name}.weight": x for name, x in theirs.items()}
    return {name: x.contiguous().clone() for name, x in tensors.items()}
