import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.models import TinyCheckpoint, write_tiny_checkpoint
from titans.backbone import load_backbone
from titans.checkpoint import DEFAULT_MEMORY, CheckpointError, Loaded, load, memory_tensors, read_memory


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


def test_what_of_the_body_is_adapted_comes_with_the_memory_exact(tiny: TinyCheckpoint) -> None:
    half, body = load_tiny(tiny, torch.bfloat16).model, load_backbone(tiny.body).tensors
    tensors, _ = contents(tiny.memory)
    assert {name.split(".")[1] for name in half.adapted} == {"2", "3", "weight"}, (
        "all above the memory, and the last norm"
    )
    for name, parameter in half.adapted.items():
        assert torch.equal(parameter, tensors[name]), name
        if "norm" in name:
            assert not torch.equal(parameter, body[name]), name


def test_for_comparison_the_body_is_as_it_was(tiny: TinyCheckpoint) -> None:
    loaded, body = load_tiny(tiny).model, load_backbone(tiny.body).tensors
    model = load(tiny.body, tiny.memory, device=torch.device("cpu"), dtype=torch.float32, adapted=False).model
    for name, parameter in model.adapted.items():
        assert not torch.equal(parameter, loaded.adapted[name]), name
        if "norm" in name:
            assert torch.equal(parameter, body[name]), name
    sinks = {name: x.clone() for name, x in model.state_dict().items() if "persistent" in name}
    model.set_sinks()
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in sinks.items())


def test_a_memory_of_a_body_as_it_was_can_be_gone_on_from(tiny: TinyCheckpoint) -> None:
    model, (tensors, header) = load_tiny(tiny).model, contents(tiny.memory)
    before = {name: x.clone() for name, x in model.adapted.items()}
    config = json.loads(header["config"])
    choosy = config["memory"] | {"write_threshold": 0.1, "read_threshold": 0.1, "protected_keys": 3}
    plain = json.dumps(config | {"adapted": False, "memory": choosy})
    memory = {name: x + 1 for name, x in tensors.items() if name not in before}
    save_file(memory, tiny.memory, header | {"config": plain})
    read_memory(model, tiny.memory)
    for name, tensor in memory_tensors(model).items():
        assert torch.equal(tensor, before[name] if name in before else memory[name]), name
    assert not load_tiny(tiny).model.adapted
    save_file(memory, tiny.memory, header)
    with pytest.raises(CheckpointError, match="header describes"):
        read_memory(model, tiny.memory)
    save_file(memory, tiny.memory, header | {"config": json.dumps(json.loads(plain) | {"window": 32})})
    with pytest.raises(CheckpointError, match="another shape"):
        read_memory(model, tiny.memory)


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_a_model_has_the_whole_name_of_its_folder(
    tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.body.rename(tiny.body.parent / "tiny-1.7B-v0.2")
    assert load(folder, tiny.memory).name == "tiny-1.7B-v0.2"
    monkeypatch.chdir(folder)
    assert load(Path(), tiny.memory).name == "tiny-1.7B-v0.2"
    (folder / "inside").mkdir()
    monkeypatch.chdir(folder / "inside")
    assert load(Path(".."), tiny.memory).name == "tiny-1.7B-v0.2"
    (link := tmp_path / "link").symlink_to(folder)
    assert load(link, tiny.memory).name == "link"


def test_a_memory_may_lie_in_its_bodys_folder(tiny: TinyCheckpoint) -> None:
    before = load_tiny(tiny).fingerprint
    inside = replace(tiny, memory=tiny.memory.rename(tiny.body / tiny.memory.name))
    assert load_tiny(inside).fingerprint == before


def test_weights_that_are_made_again_have_the_same_fingerprint(tiny: TinyCheckpoint) -> None:
    before, file = load_tiny(tiny).fingerprint, tiny.memory.read_bytes()
    start = 8 + int.from_bytes(file[:8], "little")
    header = dict(reversed(json.loads(file[8:start]).items()))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items(), reverse=True))
    again = json.dumps(header, indent=1).encode()
    tiny.memory.write_bytes(len(again).to_bytes(8, "little") + again + file[start:])
    assert load_tiny(tiny).fingerprint == before


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
    tensors, header = contents(tiny.memory)
    for change in ({"architecture": "none"}, {"num_persistent": 2}, {"window": 0}):
        save_file(tensors, tiny.memory, {**header, "config": json.dumps(json.loads(header["config"]) | change)})
        with pytest.raises(CheckpointError, match=r"architecture|persistent"):
            load_tiny(tiny)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.zeros(3, 3, 3)}, tiny.memory, header)
    with pytest.raises(CheckpointError, match="shapes"):
        load_tiny(tiny)


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 2.0},
        {"num_heads": 2.5},
        {"momentum": None},
        {"forgetting": "no"},
        {"chunk_size": 1.0},
        {"num_heads": 10**9},
        {"key_dim": 10**12},
        {"products": 1.5},
        {"expansion": 10**12, "depth": 2, "rule": "chunk"},
    ],
)
def test_a_header_that_lies_is_refused_and_takes_no_memory(tiny: TinyCheckpoint, change: dict[str, object]) -> None:
    tensors, header = contents(tiny.memory)
    config = json.loads(header["config"])
    save_file(tensors, tiny.memory, header | {"config": json.dumps(config | {"memory": config["memory"] | change})})
    with pytest.raises(CheckpointError):
        load_tiny(tiny)


def test_weights_that_are_not_finite_are_refused(tiny: TinyCheckpoint) -> None:
    tensors, header = contents(tiny.memory)
    name = next(name for name in tensors if name.endswith("persistent_keys"))
    tensors[name].fill_(math.nan)
    save_file(tensors, tiny.memory, header)
    with pytest.raises(CheckpointError, match=f"{name} is finite"):
        load_tiny(tiny)


def test_a_header_without_an_end_is_refused(tiny: TinyCheckpoint) -> None:
    tensors, header = contents(tiny.memory)
    save_file(tensors, tiny.memory, header | {"config": "[" * 100_000})
    with pytest.raises(CheckpointError):
        load_tiny(tiny)


def test_the_shipped_memory_is_small_and_has_its_card() -> None:
    assert DEFAULT_MEMORY.stat().st_size < 10_000_000
    assert "licence" in DEFAULT_MEMORY.with_suffix(".md").read_text(encoding="utf-8")
