"""Directions in which keys are learnt, beside what they are by definition, and what is kept for them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from titans.config import MemoryConfig
from titans.memory.neural import NeuralMemory
from titans.memory.protection import SLACK, Protection, protect
from titans.memory.reference import absorb_tokens, directions
from torch import Tensor
from torch.nn import functional as F

SIZE = 24
PLAIN = MemoryConfig(3, 8, 6, chunk_size=8, protected_keys=5)
PRODUCTS = replace(PLAIN, conv_width=6, gate_width=4, products=3, momentum=True, write_threshold=0.3)


def squares(x: Tensor) -> Tensor:
    return torch.cat((x * x.roll(1, -1), x * x), dim=-1)


def some(num_tokens: int, seed: int, num_kept: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys [2, 3, T, 16], what they are made of, theta, of which a third is 0, and nothing kept."""
    torch.manual_seed(seed)
    factors = 0.7 * torch.randn(2, 3, num_tokens, 8, dtype=torch.float64) + 0.5  # alike, as keys of a text are
    theta = (1.5 * torch.rand(2, 3, num_tokens, dtype=torch.float64) - 0.5).clamp(min=0)
    kept = torch.zeros(2, 3, num_kept, 8, dtype=torch.float64)
    return F.normalize(squares(factors), dim=-1), factors, theta, kept


@pytest.mark.parametrize("num_kept", [1, 3, 8, 40])
@given(num_tokens=st.integers(1, 30), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=10, deadline=None)
def test_directions_are_what_they_are_by_definition(
    num_kept: int, num_tokens: int, seed: int, data: st.DataObject
) -> None:
    keys, factors, theta, kept = some(num_tokens, seed, num_kept)
    cut, found = data.draw(st.integers(0, num_tokens)), []
    for part in (slice(cut), slice(cut, None)):
        done = protect(keys[:, :, part], factors[:, :, part], theta[:, :, part], kept, expand=squares, degree=2)
        found.append(done.directions)
        kept = done.kept()
    expected = directions(keys, theta, num_kept)
    torch.testing.assert_close(torch.cat(found, dim=2), expected, rtol=1e-7, atol=1e-7)
    alone = (keys * torch.cat(found, dim=2)).sum(-1)
    torch.testing.assert_close(alone, torch.ones_like(alone), rtol=0, atol=1e-6)


def test_a_step_leaves_what_other_keys_answer() -> None:
    """Of two keys that are half alike the first keeps its value, where the plain step takes half of it."""
    keys = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]])[None, None]
    theta = torch.tensor([[[0.9, 0.9]]])
    done = protect(keys, keys, theta, torch.zeros(1, 1, 4, 3), expand=lambda x: x, degree=1)
    first, second = done.directions[0, 0]
    assert torch.equal(first, keys[0, 0, 0])
    assert float(second @ keys[0, 0, 1]) == pytest.approx(1)
    assert float(second @ keys[0, 0, 0]) < 0.1 and float(second.norm()) < 1.25


@pytest.mark.parametrize(("cosine", "longest"), [(0.5, 1.2), (0.6, 1.3), (0.75, 1.0), (0.99, 1.0)])
def test_what_is_told_anew_is_not_protected(cosine: float, longest: float) -> None:
    """A step along another key goes round it; one along the same key, or nearly, is the plain one."""
    keys = torch.tensor([[1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]])[None, None]
    done = protect(keys, keys, torch.full((1, 1, 2), 0.9), torch.zeros(1, 1, 4, 2), expand=lambda x: x, degree=1)
    second, left = done.directions[0, 0, 1], done.directions[0, 0, 1] @ keys[0, 0, 0]
    assert float(second.norm()) < longest + 1e-6
    assert float(left) == pytest.approx(cosine) if longest == 1 else float(left) < 0.25 * cosine


@given(seed=st.integers(0, 99), alike=st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_no_direction_is_long(seed: int, alike: float) -> None:
    """However alike keys are: it is what M grows by."""
    torch.manual_seed(seed)
    keys = F.normalize(torch.randn(1, 1, 1, 16) + (1 - alike) * torch.randn(1, 1, 60, 16), dim=-1)
    done = protect(keys, keys, torch.full((1, 1, 60), 0.9), torch.zeros(1, 1, 64, 16), expand=lambda x: x, degree=1)
    longest = (1 + (1 + 1 / SLACK) ** 0.5) / 2  # the most of (x + slack) / (x^2 + slack), x^2 = k P k without slack
    assert done.directions.isfinite().all() and done.directions.norm(dim=-1).max() < longest + 1e-4


def test_what_is_kept_are_the_last_keys_written_of_those_that_count() -> None:
    rows, written = torch.arange(7.0).view(1, 1, 7, 1).repeat(2, 1, 1, 1), torch.tensor([[[1, 0, 1, 1]]] * 2).bool()
    done = Protection(torch.empty(2, 1, 4, 1), rows, rows, written, torch.arange(4))
    assert done.kept().flatten().tolist() == [3, 5, 6] * 2
    assert done.kept(torch.tensor([3, 0])).flatten().tolist() == [2, 3, 5, 0, 1, 2]
    assert done.kept(torch.tensor([9, -8])).flatten().tolist() == [3, 5, 6, 0, 1, 2]
    seen = [[1, 2, 3], [1, 2, 3], [2, 3, 5], [3, 5, 6]]  # as of each token, its own among them
    assert [row.nonzero().flatten().tolist() for row in done.in_sight()[0, 0]] == seen


@pytest.mark.parametrize("config", [PLAIN, PRODUCTS])
def test_a_memory_that_protects_is_the_token_loop(config: MemoryConfig) -> None:
    torch.manual_seed(3)
    memory = NeuralMemory(config, SIZE).requires_grad_(False)
    memory.gates.weight.normal_(std=0.3)
    h, state = torch.randn(2, 50, SIZE), memory.new_state(2)
    _, after = memory(h, state)
    joined = torch.cat((state.recent, memory._input(h)), dim=1)
    writes = memory._writes(joined)
    along = directions(writes.keys, writes.theta[:, :, 0], config.protected_keys)
    queries = memory._queries(joined)
    start = state.weights, memory.rule.surprise(state.momentum)
    oracle = absorb_tokens(config, writes._replace(directions=along), *start, queries)
    torch.testing.assert_close(after.weights.double(), oracle.weights, rtol=1e-4, atol=1e-5)
    plain = absorb_tokens(config, writes, *start, queries)
    assert (oracle.weights - plain.weights).norm() > 0.1 * plain.weights.norm()


def test_gradients_pass_through_what_is_protected() -> None:
    torch.manual_seed(4)
    memory = NeuralMemory(PRODUCTS, SIZE)
    with torch.no_grad():
        memory.gates.weight.normal_(std=0.3)
    h = torch.randn(1, 30, SIZE)
    y, _ = memory(h, memory.new_state(1))
    y.square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in memory.parameters())


@pytest.mark.parametrize("wrong", [{"protected_keys": -1}, {"protected_keys": 1, "rule": "chunk"}])
def test_keys_are_protected_under_the_exact_rule_alone(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="protected_keys"):
        replace(MemoryConfig(), **wrong)  # type: ignore[arg-type]
