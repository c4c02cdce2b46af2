"""The kernels of a memory against torch: what it answers and what it learns."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from titans.config import tiny
from titans.memory.neural import MemoryState, NeuralMemory
from titans.memory.quantization import as_floats
from titans.memory.reference import absorb_tokens
from titans.native import build
from titans.native.matrix import Team
from titans.native.memory import NativeMemory

pytestmark = pytest.mark.skipif(build.library() is None, reason="no kernels for this machine, or no compiler")

_MEMORIES: list[dict[str, Any]] = [
    {},
    {"conv_width": 12, "gate_width": 12, "products": 4, "value_dim": 112, "momentum": True},
    {"conv_width": 1, "products": 1, "num_heads": 1, "value_dim": 32, "forgetting": False},
    {"num_heads": 3, "key_dim": 48, "value_dim": 224, "products": 2, "gate_width": 2, "momentum": True},
    {"gate_width": 2, "momentum": True, "write_threshold": 0.35},
    {"write_threshold": 0.25},
    {"read_threshold": 0.3},
    {"write_threshold": 0.35, "protected_keys": 5},
    {"conv_width": 12, "gate_width": 12, "products": 4, "value_dim": 112, "momentum": True, "protected_keys": 24},
    {"write_threshold": 0.3, "protected_keys": 40, "read_threshold": 0.05, "margin_threshold": 0.2, "products": 3},
]


class Memories(NamedTuple):
    """One memory three times, and three sessions that it has."""

    native: NativeMemory
    torchs: NeuralMemory
    exact: NeuralMemory  # float32
    state: MemoryState

    @classmethod
    def make(cls, form: dict[str, Any], seed: int) -> "Memories":
        torch.manual_seed(seed)
        config = replace(tiny().memory, **form)
        torchs, exact = (NeuralMemory(config, 64).requires_grad_(False) for _ in range(2))
        for parameter in torchs.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for linear in (torchs.query, torchs.key, torchs.value, torchs.out_gate, torchs.out):
            linear.weight.copy_(linear.weight.bfloat16())
        exact.load_state_dict(torchs.state_dict())
        assert NativeMemory.knows(torchs)
        torchs.cast_projections(torch.bfloat16)
        sizes = config.num_weights, config.num_momentum
        weights, momentum = (torch.randn(5, config.num_heads, size)[::2] for size in sizes)  # rows that stand apart
        recent = torch.randn(3, config.num_recent, 64).bfloat16()
        if config.momentum:
            _, steps = torchs.rule.split_momentum(momentum)
            steps *= 0.4 ** torch.arange(float(steps.shape[2])).flip(0)[:, None]  # of each what is left of it
        momentum, kept = momentum if config.momentum else momentum[:, :0], torch.zeros(3, config.num_heads, 0, 0)
        state = MemoryState(torch.arange(3), weights, momentum, recent, kept)
        if config.protected_keys:
            said = torch.randn(3, 2 * config.protected_keys - (20 if config.margin_threshold else 0), 64).bfloat16()
            kept = torchs.write(said, torchs.new_state(3, torch.bfloat16)).kept
            state = state._replace(kept=kept)
        return cls(NativeMemory(torchs, Team(2)), torchs, exact, state)

    def surprise(self, state: MemoryState) -> torch.Tensor:
        return self.exact.rule.surprise(state.momentum)

    def row(self, b: int) -> MemoryState:
        return MemoryState(*(x[b : b + 1] for x in self.state))


def distance(x: torch.Tensor, expected: torch.Tensor) -> float:
    return float((x.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", _MEMORIES)
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 9])
@torch.inference_mode()
def test_a_memory_answers_what_torch_does(form: dict[str, Any], num_tokens: int) -> None:
    memories = Memories.make(form, num_tokens)
    read, (_, weights, _, recent, kept) = memories.native.read, memories.state
    h_BTD, lengths_B = torch.randn(3, num_tokens, 64).bfloat16(), torch.tensor([num_tokens, 0, num_tokens - 1])
    expected, _ = memories.exact.read(h_BTD.float(), weights, recent.float(), None, kept)
    torchs, moved = memories.torchs.read(h_BTD, weights, recent, lengths_B, kept)
    y_BTD, moved_too = read(h_BTD, weights, recent, lengths_B, kept)
    assert torch.equal(moved_too, moved)
    assert distance(y_BTD, expected) < 1.1 * distance(torchs, expected) < 0.03
    for row in range(3):
        own = weights[row : row + 1], kept[row : row + 1]
        alone, moved_row = read(h_BTD[row : row + 1], own[0], recent[row : row + 1], None, own[1])
        assert torch.equal(alone[0], y_BTD[row]), "a row is as alone to the last bit"
        before, one_by_one = recent[row : row + 1], []
        for token in h_BTD[row : row + 1].split(1, dim=1):
            y, before = read(token, own[0], before, None, own[1])
            one_by_one.append(y)
        assert torch.equal(torch.cat(one_by_one, dim=1), alone) and torch.equal(before, moved_row)
    shared, _ = read(h_BTD, weights[:1].expand(3, -1, -1), recent, None, kept[:1].expand(3, -1, -1, -1))
    assert torch.equal(shared[0], y_BTD[0]) and not torch.equal(shared[1], y_BTD[1])


@pytest.mark.parametrize("form", _MEMORIES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 8, 43])
def test_a_memory_learns_what_torch_does(form: dict[str, Any], num_tokens: int) -> None:
    """From less than a chunk to several, each row as many tokens as it has."""
    memories = Memories.make(form, num_tokens)
    before = [x.clone() for x in memories.state]
    h_BTD = torch.randn(3, num_tokens, 64).bfloat16()
    counts = [num_tokens, num_tokens // 2, 0]
    ours = memories.native.write(h_BTD, memories.state, torch.tensor(counts))
    assert all(map(torch.equal, memories.state, before)), "a state is a value"
    assert ours.position.tolist() == [num_tokens, 1 + num_tokens // 2, 2]
    for row, count in enumerate(counts):
        state, tokens = memories.row(row), h_BTD[row : row + 1, :count]
        alone = memories.native.write(tokens, state)
        assert all(torch.equal(x[0], y[row]) for x, y in zip(alone, ours, strict=True)), "as alone to the last bit"
        torchs = memories.torchs.write(tokens, state)
        assert torch.equal(torchs.recent, alone.recent)
        torch.testing.assert_close(as_floats(alone.kept), as_floats(torchs.kept), rtol=0.02, atol=0.04)
        if not count:
            assert torch.equal(alone.weights, state.weights) and torch.equal(alone.momentum, state.momentum)
            continue
        joined = torch.cat((state.recent, memories.torchs._input(tokens)), dim=1)
        writes = memories.exact._writes(joined.float())
        if state.kept.shape[2]:
            factors = memories.exact._factors(joined.float())
            writes, *_ = memories.exact._protect(writes, factors, state.kept, None, None)
        queries = torch.zeros_like(writes.keys)
        oracle = absorb_tokens(memories.exact.config, writes, state.weights, memories.surprise(state), queries)
        every = [(x.weights, memories.surprise(x)) for x in (state, alone, torchs)]
        kinds = 1 + memories.exact.config.momentum
        for start, ours_, theirs, exact in list(zip(*every, oracle[:2], strict=True))[:kinds]:
            learnt = exact - start.double()
            error, torchs_error = ((x - exact).norm() / learnt.norm() for x in (ours_, theirs))
            assert error < 3e-6 and error < torchs_error < 0.1, "as a share of what is learnt"


@pytest.mark.parametrize("momentum", [True, False])
def test_where_no_token_writes_momentum_goes_on_and_the_memory_fades(momentum: bool) -> None:
    memories = Memories.make({"momentum": momentum, "write_threshold": 0.3}, 3)
    h_BTD = torch.randn(3, 43, 64).bfloat16()
    for memory in (memories.torchs, memories.exact):
        memory.gates.bias[: memory.config.num_heads] = -9.0
    native = NativeMemory(memories.torchs, Team(2))
    joined = torch.cat((memories.state.recent, memories.torchs._input(h_BTD)), dim=1)
    writes = memories.exact._writes(joined.float())
    assert not writes.theta.any()
    start = memories.state
    before = start.weights, memories.surprise(start)
    oracle = absorb_tokens(memories.exact.config, writes, *before, torch.zeros_like(writes.keys))
    for after in (native.write(h_BTD, start), memories.torchs.write(h_BTD, start)):
        torch.testing.assert_close(after.weights.double(), oracle.weights, rtol=1e-5, atol=1e-5)
        if momentum:
            torch.testing.assert_close(memories.surprise(after).double(), oracle.momentum, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [_MEMORIES[1], _MEMORIES[-2], _MEMORIES[-1]])
@torch.inference_mode()
def test_what_a_memory_learns_is_the_same_in_pieces(form: dict[str, Any]) -> None:
    memories = Memories.make(form, 5)
    h_BTD = torch.randn(3, 60, 64).bfloat16()
    at_once, state = memories.native.write(h_BTD, memories.state), memories.state
    for piece in h_BTD.split([1, 20, 8, 31], dim=1):
        state = memories.native.write(piece, state)
    assert torch.equal(state.recent, at_once.recent)
    torch.testing.assert_close(state.weights, at_once.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.momentum, at_once.momentum, rtol=1e-4, atol=1e-5)
    assert torch.equal(state.kept, at_once.kept)


@pytest.mark.parametrize("form", [{"value_dim": 8}, {"rule": "chunk"}, {"output_norm": True}, {"num_heads": 1}])
def test_memories_that_the_kernels_do_not_know_stay_with_torch(form: dict[str, Any]) -> None:
    assert not NativeMemory.knows(NeuralMemory(replace(tiny().memory, **form), 64))
