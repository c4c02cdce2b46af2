"""Whether a query asks for what was written: margins beside their definition, and what becomes of an answer."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from titans.config import MemoryConfig, TitansConfig, tiny
from titans.memory import reference
from titans.memory.margin import margins
from titans.memory.neural import NeuralMemory
from titans.memory.protection import protect
from torch.nn import functional as F

SIZE = 24
CONFIG = MemoryConfig(
    3,
    8,
    6,
    conv_width=6,
    gate_width=4,
    products=3,
    write_threshold=0.3,
    protected_keys=60,
    read_threshold=0.02,
    margin_threshold=0.2,
)


def make_memory(config: MemoryConfig) -> NeuralMemory:
    torch.manual_seed(3)
    memory = NeuralMemory(config, SIZE).requires_grad_(False)
    memory.gates.weight.normal_(std=0.3)
    memory.query_conv.add_(0.4 * torch.randn_like(memory.query_conv))
    return memory


@given(seed=st.integers(0, 99), room=st.sampled_from([3, 40]))
@settings(max_examples=15, deadline=None)
def test_margins_are_what_they_are_defined_to_be(seed: int, room: int) -> None:
    torch.manual_seed(seed)
    keys, queries = (F.normalize(torch.randn(2, 3, 20, 6), dim=-1) for _ in range(2))
    theta = torch.rand(2, 3, 20)
    kept = protect(keys, keys, theta, torch.zeros(2, 3, room, 6), expand=lambda x: x, degree=1)
    found = margins(queries, kept.expanded, room, kept.in_sight())
    expected = reference.margins(keys, theta, queries, room)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert expected.isinf().any() == (room == 3), "where there is no room left, a query may ask for what has gone"
    at_the_end = margins(queries[:, :, -1:], kept.kept(), room)
    torch.testing.assert_close(at_the_end[:, 0].double(), expected[:, -1], rtol=0, atol=1e-5)


def test_what_was_told_is_told_apart_and_what_is_like_several_is_not() -> None:
    """A key told twice is no rival of itself."""
    first, second, third = torch.eye(8)[:3]
    rows = torch.stack((first, second, first, torch.zeros(8)))[None, None]
    ask = torch.stack((first, F.normalize(first + second, dim=0), third, F.normalize(first + third, dim=0)))[None, None]
    assert margins(ask, rows, 4)[0].tolist() == pytest.approx([1, 0, 0, 0.5**0.25])
    assert margins(ask, rows, 3).isinf().all()
    assert margins(-ask, rows[:, :, :2], 4)[0].tolist() == [0, 0, 0, 0], "unlike all keys"


@pytest.mark.parametrize("cuts", [[50], [1, 20, 3, 26]])
def test_what_is_doubted_is_answered_faintly(cuts: list[int]) -> None:
    memory = make_memory(CONFIG)
    plain = NeuralMemory(replace(CONFIG, margin_threshold=0.0), SIZE).requires_grad_(False)
    plain.load_state_dict(memory.state_dict())
    h, state, pieces = torch.randn(2, 50, SIZE), memory.new_state(2), []
    whole, _ = plain(h, plain.new_state(2))
    joined = torch.cat((state.recent, memory._input(h)), dim=1)
    writes = memory._writes(joined)
    told = reference.margins(writes.keys, writes.theta[:, :, 0], memory._queries(joined), CONFIG.protected_keys)
    share = ((told - CONFIG.margin_threshold) / (0.25 * CONFIG.margin_threshold)).clamp(0, 1).float()[..., None]
    most = CONFIG.read_threshold / whole.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-9)
    expected = whole * (share + (1 - share) * most.clamp(max=1))
    assert 0.1 < (share == 0).float().mean() < 0.9 and (expected != whole).any()
    for part in h.split(cuts, dim=1):
        y, state = memory(part, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_a_reader_doubts_what_the_writer_would_and_without_keys_nothing() -> None:
    memory = make_memory(CONFIG)
    h = torch.randn(1, 50, SIZE)
    y, state = memory(h, memory.new_state(1))
    again = memory.write(h[:, :49], memory.new_state(1))
    read, _ = memory.read(h[:, 49:], state.weights, again.recent, None, state.kept)
    torch.testing.assert_close(read, y[:, 49:], rtol=1e-4, atol=1e-5)
    plain, _ = memory.read(h, state.weights, memory.new_state(1).recent)
    doubted, _ = memory.read(h, state.weights, memory.new_state(1).recent, None, state.kept)
    fainter = doubted.norm(dim=-1) < 0.99 * plain.norm(dim=-1)
    assert fainter.any() and not fainter.all()


@pytest.mark.parametrize(
    "wrong", [{"margin_threshold": -0.1}, {"margin_threshold": 0.5}, {"read_threshold": 0.0}, {"protected_keys": 0}]
)
def test_a_margin_needs_keys_and_a_size_of_what_is_faint(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="margin"):
        replace(CONFIG, **wrong)  # type: ignore[arg-type]


def test_a_mac_has_no_margins() -> None:
    config = tiny(protected_keys=3, read_threshold=0.1, margin_threshold=0.1)
    with pytest.raises(ValueError, match="MAC"):
        TitansConfig(config.backbone, config.memory, config.memory_layers, "mac", window=16)
