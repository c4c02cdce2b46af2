import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.models import TinyCheckpoint, write_tiny_checkpoint
from titans.checkpoint import DEFAULT_MEMORY, CheckpointError, Loaded, load


@pytest.fixture
def tiny(tmp_path: Path) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path)


def load_tiny(tiny: TinyCheckpoint, dtype: torch.dtype = torch.float32) -> Loaded:
    return load(tiny.body, tiny.memory, device=torch.device("cpu"), dtype=dtype)


def answer(loaded: Loaded) -> torch.Tensor:
    model = loaded.model
    state = model.ingest(torch.tensor([[9, 8, 7, 6, 5]]), model.new_state())
    hidden, _ = model(torch.tensor([[4, 5]]), model.open(state))
    return model.logits(hidden)


def test_what_was_saved_is_what_is_loaded(tiny: TinyCheckpoint) -> None:
    first, again = load_tiny(tiny), load_tiny(tiny)
    assert first.fingerprint == again.fingerprint
    assert torch.equal(answer(first), answer(again))


def test_bfloat16_keeps_the_memorys_own_weights_exact(tiny: TinyCheckpoint) -> None:
    single, half = load_tiny(tiny), load_tiny(tiny, torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    (ours,), (theirs,) = half.model.memories, single.model.memories
    assert torch.equal(ours.gates.weight, theirs.gates.weight)
    assert torch.equal(ours.key_conv.float(), theirs.key_conv)
    assert half.model.new_state().layers[-1]["weights"].dtype == torch.float32
    torch.testing.assert_close(answer(half), answer(single), rtol=0.1, atol=0.3)


def test_another_memory_is_another_fingerprint(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path, seed=1)
    assert load_tiny(other).fingerprint != load_tiny(tiny).fingerprint


def test_a_memory_of_another_body_is_refused(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="another body"):
        load_tiny(TinyCheckpoint(tiny.body, other.memory))


def test_a_torn_or_missing_memory_is_refused(tiny: TinyCheckpoint) -> None:
    whole = tiny.memory.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not safetensors"):
        tiny.memory.write_bytes(content)
        with pytest.raises(CheckpointError):
            load_tiny(tiny)
    tiny.memory.unlink()
    with pytest.raises(CheckpointError):
        load_tiny(tiny)


def test_tensors_that_do_not_fit_their_header_are_refused(tiny: TinyCheckpoint) -> None:
    with safe_open(tiny.memory, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for change in ({"architecture": "none"}, {"num_persistent": 2}, {"window": 0}):
        save_file(tensors, tiny.memory, {**header, "config": json.dumps(json.loads(header["config"]) | change)})
        with pytest.raises(CheckpointError, match=r"architecture|persistent"):
            load_tiny(tiny)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.zeros(3, 3, 3)}, tiny.memory, header)
    with pytest.raises(CheckpointError, match="shapes"):
        load_tiny(tiny)


def test_the_shipped_memory_is_small_and_has_its_card() -> None:
    assert DEFAULT_MEMORY.stat().st_size < 10_000_000
    assert "licence" in DEFAULT_MEMORY.with_suffix(".md").read_text(encoding="utf-8")
