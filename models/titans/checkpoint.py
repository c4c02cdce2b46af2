"""Memory weights on disk, and a whole model from a body and a memory. The only file that knows a memory's key names."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from titans.backbone import Backbone, find_default_body, load_backbone, weight_files
from titans.config import TitansConfig
from titans.files import replacing
from titans.model import TitansModel
from titans.packed import pack
from titans.tokenizer import Tokenizer

DEFAULT_MEMORY = Path(__file__).parent / "checkpoints" / "smollm2-135m-linear.safetensors"
_BODY_DIGEST = "body_sha256"


class CheckpointError(Exception):
    """Memory weights that cannot be used: missing, torn, or trained on another body."""


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run."""

    model: TitansModel  # in evaluation mode, without gradients
    tokenizer: Tokenizer
    fingerprint: str  # changes with the body, the memory or the config: a state belongs to one fingerprint
    name: str  # of the body's folder, or of its file without the suffix


def preferred_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the chip multiplies it (AVX-512 BF16; any GPU is taken to), float32 elsewhere."""
    if device.type != "cpu" or torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def preferred_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(
    body: Path | None = None,
    memory: Path | None = None,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    adapted: bool = True,
) -> Loaded:
    """The model to serve: by default the shipped memory on SmolLM2-135M-Instruct.

    `body` is what `load_backbone` reads, `memory` what `save_memory` wrote; `device` and `dtype` (the body's and that
    of the memories' large matrices) are by default the preferred ones. Not `adapted`, which is for comparison: what of
    the body was trained beside the memory is as the body has it. It is for inference: `titans.packed`.
    Raises BackboneError or CheckpointError, each saying which file and why.
    """
    body, memory = body or find_default_body(), memory or DEFAULT_MEMORY
    device = device or preferred_device()
    backbone = load_backbone(body)
    config, body_digest = read_header(memory)
    if body_digest != digest(body):
        raise CheckpointError(f"{memory} was trained on another body than {body}")
    if config.num_persistent > 1:
        raise CheckpointError(f"{memory} has {config.num_persistent} persistent tokens: a body has its bos token alone")
    if config.backbone != backbone.config:
        raise CheckpointError(f"{memory} does not fit the shape of {body}")
    check_memory(memory)
    try:
        model = build(backbone, config)
    except (TypeError, LookupError) as error:
        raise CheckpointError(f"{memory} does not describe a model: {error!r}") from error
    ready(model, device, dtype or preferred_dtype(device))
    read_memory(model, memory)
    if not adapted:
        own = {name: backbone.tensors[name] for name in model.adapted if name in backbone.tensors}
        model.load_state_dict(own, strict=False)
        model.set_sinks()
    model.requires_grad_(False)
    for module in model.memories:
        module.cast_projections(model.dtype)
    if model.readout is not None:
        model.readout.to(model.dtype)
    pack(model, backbone.tensors)
    whole = Path(os.path.abspath(body))  # noqa: PTH100 — takes `..` away, and follows no link, whose name is its own
    name = whole.name if body.is_dir() else body.stem  # a folder's name may have dots: SmolLM2-1.7B
    return Loaded(model, backbone.tokenizer, _fingerprint(config, body_digest, memory), name)


def build(backbone: Backbone, config: TitansConfig) -> TitansModel:
    """A model with the body's weights and untrained memories, float32, sinks not yet set.

    The attention of a body's layer in whose place a memory stands (architecture "lmm") is left out.
    Raises CheckpointError where the body's tensors are not those of the config by name, RuntimeError by shape.
    """
    model = TitansModel(config)
    missing, unexpected = model.load_state_dict(backbone.tensors, strict=False)
    ours = {*memory_tensors(model), *(["head.weight"] if config.backbone.tie_embeddings else [])}
    missing = [name for name in missing if name not in ours and ".persistent_" not in name]
    if config.architecture == "lmm":
        unexpected = [name for name in unexpected if ".attention" not in name]
    if missing or unexpected:
        raise CheckpointError(f"the body lacks {missing} and has {unexpected} besides")
    return model


def memory_tensors(model: TitansModel) -> dict[str, Tensor]:
    """What a body does not have as they are, by name: the memories, what merges them with attention, the readout.

    And what of the body is adapted. Not copies.
    """
    ours = {"memory", "merge", "readout"}
    return {name: x for name, x in model.state_dict().items() if ours & set(name.split(".")) or name in model.adapted}


def ready(model: TitansModel, device: torch.device, dtype: torch.dtype) -> None:
    """Move a model to where it runs, in place: the body in `dtype`, what is trained in float32; set its sinks."""
    model.to(device, dtype).eval()
    for ours in (*model.memories, *([model.readout] if model.readout is not None else [])):
        ours.float()
    for parameter in model.adapted.values():
        parameter.data = parameter.data.float()
    model.set_sinks()


def read_memory(model: TitansModel, path: Path) -> None:
    """Put the weights that `save_memory` wrote into a model that is `ready`.

    What they do not adapt stays as it is, and so does the threshold of what is written, which goes with any weights.
    Raises CheckpointError where they are not such a model's.
    """
    config, _ = read_header(path)
    _check_shape(path, config, model.config)
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise CheckpointError(f"{path} is damaged: not all of {name} is finite")
    expected = memory_tensors(model).keys() - (() if config.adapted else model.adapted.keys())
    if tensors.keys() != expected:
        raise CheckpointError(f"{path} does not hold the memory that its header describes")
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not have the shapes that its header describes: {error}") from error


def check_fit(path: Path, config: TitansConfig, body: Path, body_digest: str) -> None:
    """Raises CheckpointError for a memory that was trained on another body, or is for a model of another shape.

    For before there is a model: no tensor is read. `config`: the model's; `body_digest`: what `digest` says of `body`.
    """
    of_memory, of_body = read_header(path)
    if of_body != body_digest:
        raise CheckpointError(f"{path} was trained on another body than {body}")
    _check_shape(path, of_memory, config)
    check_memory(path)


def _check_shape(path: Path, of_memory: TitansConfig, config: TitansConfig) -> None:
    memory = replace(of_memory.memory, **config.memory.settings)
    if replace(of_memory, adapted=config.adapted, memory=memory) != config:
        raise CheckpointError(f"{path} is for a model of another shape")


def check_memory(path: Path) -> None:
    """Raises CheckpointError where tensors have not the sizes that their header says, before any is made as large."""
    config, _ = read_header(path)
    memory, size = config.memory, config.backbone.hidden_size
    keys, values = memory.num_heads * memory.key_dim, memory.num_heads * memory.value_dim
    expected = {"key.weight": [keys, size], "value.weight": [values, size], "key_conv": [keys, memory.conv_width]}
    expected["gates.weight"] = [memory.num_gates * memory.num_heads * memory.depth, size]
    if memory.depth > 1:
        expected["rule.start_weights"] = [memory.num_heads, memory.num_weights]
    with safe_open(str(path), framework="pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name, shape in expected.items():
        shapes = [have for key, have in found.items() if key.endswith(f".memory.{name}")]
        if not shapes or any(have != shape for have in shapes):
            raise CheckpointError(f"{path} does not have the shapes that its header describes: {name} {shapes}")


def save_memory(model: TitansModel, body_digest: str, path: Path) -> None:
    """Write the memory's weights in float32, with the config and the body they belong to (its `digest`).

    Whole, or `path` is as it was: `titans.files.replacing`. Raises OSError.
    """
    tensors = {name: x.detach().to("cpu", torch.float32).contiguous() for name, x in memory_tensors(model).items()}
    header = {
        "format": "titans-memory/1",
        "config": json.dumps(model.config.to_dict()),
        _BODY_DIGEST: body_digest,
    }
    with replacing(path) as file:  # safetensors' own files are for their owner alone, and a server may be another
        file.write(save(tensors, header))


def digest(body: Path) -> str:
    """sha256 over the sha256 of each of the body's weight files, in hex. Raises OSError."""
    total = hashlib.sha256()
    for path in weight_files(body):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def read_header(path: Path) -> tuple[TitansConfig, str]:
    """The model that a memory is for: its config, and its body's `digest`. Raises CheckpointError."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
        return TitansConfig.from_dict(json.loads(header["config"])), header[_BODY_DIGEST]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        reason = error if isinstance(error, OSError) else repr(error)
        raise CheckpointError(f"{path} is not a memory checkpoint: {reason}") from error


def _fingerprint(config: TitansConfig, body_digest: str, memory: Path) -> str:
    """Of the same weights the same, also where they were made again: a header has its fields in any order."""
    total = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    if config.memory.momentum_shapes != config.memory.layer_shapes:  # states that have S whole are of another model
        total.update(str(config.memory.momentum_shapes).encode())
    total.update(body_digest.encode())
    file = memory.read_bytes()
    start = 8 + int.from_bytes(file[:8], "little")
    total.update(json.dumps(json.loads(file[8:start]), sort_keys=True).encode())
    total.update(file[start:])
    return total.hexdigest()[:32]
