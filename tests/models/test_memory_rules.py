"""Every memory rule in closed form beside the oracle: token by token, float64, gradients by autograd."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference_model import some_of
from titans.config import MemoryConfig
from titans.memory.chunk import Writes
from titans.memory.neural import make_rule
from titans.memory.reference import absorb_tokens
from titans.memory.rule import Absorbed, Rule
from torch import Tensor
from torch.nn import functional as F

BATCH, HEADS, KEY = 2, 3, 6
LINEAR = MemoryConfig(HEADS, KEY, 5, chunk_size=8)
PAPER_LINEAR = replace(LINEAR, rule="chunk")
DEEP = replace(PAPER_LINEAR, depth=2, expansion=2)
DEEPER = replace(DEEP, depth=3)
CAMERA_READY = replace(DEEP, value_dim=KEY, residual=True)
FORMS = {"linear": LINEAR, "chunked": PAPER_LINEAR, "deep": DEEP, "deeper": DEEPER, "residual": CAMERA_READY}


def forms(*, chunked_only: bool = False) -> list[object]:
    """Each, without and with momentum."""
    return [
        pytest.param(replace(form, momentum=momentum), id=f"{name}{'-momentum' * momentum}")
        for name, form in FORMS.items()
        for momentum in (False, True)
        if form.rule == "chunk" or not chunked_only
    ]


EVERY_FORM, CHUNKED = forms(), forms(chunked_only=True)


def random_writes(config: MemoryConfig, num_tokens: int, seed: int, dtype: torch.dtype = torch.float64) -> Writes:
    torch.manual_seed(seed)
    gates = (BATCH, HEADS, config.depth, num_tokens)
    most_eta = 0.5 if config.rule == "exact" else 1.0
    return Writes(
        keys=F.normalize(torch.randn(BATCH, HEADS, num_tokens, config.key_dim, dtype=dtype), dim=-1),
        values=torch.randn(BATCH, HEADS, num_tokens, config.value_dim, dtype=dtype),
        theta=torch.rand(gates, dtype=dtype) / (8 if config.rule == "chunk" else 1),
        log_keep=F.logsigmoid(torch.randn(gates, dtype=dtype) + 3),
        log_eta=F.logsigmoid(torch.randn(gates, dtype=dtype)) + math.log(most_eta) if config.momentum else None,
    )


def random_start(config: MemoryConfig, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Not large where it is deep: thrown far from its targets it amplifies rounding, and 1e-10 is to mean something."""
    size = 1.0 if config.rule == "exact" else 0.3
    weights = size * torch.randn(BATCH, HEADS, config.num_weights, dtype=dtype)
    momentum = size * torch.randn(*weights.shape[:2], config.num_momentum, dtype=dtype)
    if config.rule == "exact" and config.momentum:  # of each step what is left of it
        rows = make_rule(config).split_momentum(momentum)[1]
        rows *= 0.25 ** torch.arange(rows.shape[2], dtype=dtype).flip(0)[:, None]
    return weights, momentum if config.momentum else momentum[:, :0]


def random_queries(writes: Writes) -> Tensor:
    return F.normalize(torch.randn_like(writes.keys), dim=-1)


def walk(rule: Rule, writes: Writes, start: tuple[Tensor, Tensor], queries: Tensor, cuts: list[int]) -> Absorbed:
    """Chunk by chunk; the last one may be part of one."""
    weights, momentum, reads = *start, []
    for first, last in zip([0, *cuts], [*cuts, queries.shape[2]], strict=True):
        after = rule.absorb(some_of(writes, first, last), weights, momentum, queries[:, :, first:last])
        weights, momentum = after.weights, after.momentum
        assert after.reads is not None
        reads.append(after.reads)
    return Absorbed(weights, momentum, torch.cat(reads, dim=2))


def tell(config: MemoryConfig, writes: Writes, start: tuple[Tensor, Tensor], queries: Tensor) -> Absorbed:
    """The oracle, which keeps S as it is."""
    weights, momentum = start
    return absorb_tokens(config, writes, weights, make_rule(config).surprise(momentum), queries)


def assert_close(ours: Absorbed, oracle: Absorbed, config: MemoryConfig, tolerance: float) -> None:
    if config.momentum:
        ours = ours._replace(momentum=make_rule(config).surprise(ours.momentum))
    for name in ("weights", "reads", "momentum")[: 3 if config.momentum else 2]:
        mine, theirs = getattr(ours, name).double(), getattr(oracle, name)
        message = partial("{}: {}".format, name)
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=message)


@pytest.mark.parametrize("config", EVERY_FORM)
@pytest.mark.parametrize("chunk_size", [1, 3, 8])
@given(num_tokens=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_the_closed_form_is_the_token_loop(config: MemoryConfig, chunk_size: int, num_tokens: int, seed: int) -> None:
    config = replace(config, chunk_size=chunk_size)
    writes = random_writes(config, num_tokens, seed)
    start, queries = random_start(config), random_queries(writes)
    oracle = tell(config, writes, start, queries)
    got = walk(make_rule(config), writes, start, queries, list(range(chunk_size, num_tokens, chunk_size)))
    assert_close(got, oracle, config, 1e-10)


def test_steps_of_a_memory_whose_answers_are_far_apart_are_the_oracles() -> None:
    """Only where they are close together does their norm amplify what is learnt, and is a step made smaller."""
    config = replace(CAMERA_READY, chunk_size=3)
    writes = random_writes(config, 3, seed=0)
    (weights, momentum), queries = random_start(config), random_queries(writes)
    start = 20 * weights, momentum
    oracle = tell(config, writes, start, queries)
    assert_close(walk(make_rule(config), writes, start, queries, []), oracle, config, 1e-8)


@pytest.mark.parametrize("momentum", [False, True])
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_the_exact_rule_gives_one_result_for_chunks_of_any_size(momentum: bool, data: st.DataObject) -> None:
    config, num_tokens = replace(LINEAR, momentum=momentum), data.draw(st.integers(2, 40))
    cuts = sorted(data.draw(st.sets(st.integers(1, num_tokens - 1), max_size=5)))
    writes = random_writes(config, num_tokens, data.draw(st.integers(0, 99)))
    start, queries = random_start(config), random_queries(writes)
    oracle = tell(config, writes, start, queries)
    got = walk(make_rule(config), writes, start, queries, cuts)
    assert_close(got, oracle, config, 1e-10)


@pytest.mark.parametrize("config", EVERY_FORM)
def test_float32_stays_near_the_oracle(config: MemoryConfig) -> None:
    config = replace(config, chunk_size=64)
    writes = random_writes(config, 500, seed=1)
    start, queries = random_start(config), random_queries(writes)
    oracle = tell(config, writes, start, queries)
    single = Writes(*(None if x is None else x.float() for x in writes))  # type: ignore[arg-type]
    begin = (start[0].float(), start[1].float())
    got = walk(make_rule(config), single, begin, queries.float(), list(range(64, 500, 64)))
    assert_close(got, oracle, config, 1e-4 if config.rule == "exact" else 1e-3)


@pytest.mark.parametrize("config", EVERY_FORM)
@pytest.mark.parametrize("end", [0, 1, 5, 8])
def test_a_row_that_ends_early_is_the_row_alone(config: MemoryConfig, end: int) -> None:
    rule, writes = make_rule(config), random_writes(config, 8, seed=2)
    start = random_start(config)
    got = rule.absorb(writes, *start, ends_B=torch.tensor([end, 8]))
    whole = rule.absorb(writes, *start)
    alone = rule.absorb(some_of(writes, 0, end), *start) if end else Absorbed(*start, None)
    torch.testing.assert_close(got.weights[0], alone.weights[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(got.weights[1], whole.weights[1], rtol=0, atol=0)
    if config.momentum:
        torch.testing.assert_close(got.momentum[0], alone.momentum[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", CHUNKED)
def test_reading_is_what_a_causal_read_at_the_end_gives(config: MemoryConfig) -> None:
    rule, writes = make_rule(config), random_writes(config, 8, seed=4)
    queries = random_queries(writes)
    after = rule.absorb(writes, *random_start(config), queries)
    assert after.reads is not None
    torch.testing.assert_close(rule.read(after.weights, queries)[:, :, -1], after.reads[:, :, -1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", EVERY_FORM)
def test_outer_gradients_are_right(config: MemoryConfig) -> None:
    rule, writes = make_rule(config), random_writes(config, 4, seed=3)
    start, queries = random_start(config), random_queries(writes)
    inputs = [x.requires_grad_() for x in (*writes[:4], *start[:1], queries)]
    if config.momentum:
        assert writes.log_eta is not None
        inputs += [writes.log_eta.requires_grad_(), start[1].requires_grad_()]

    def outputs(*parts: Tensor) -> tuple[Tensor, ...]:
        eta, momentum = parts[6:] if config.momentum else (None, start[1])
        after = rule.absorb(Writes(parts[0], parts[1], parts[2], parts[3], eta), parts[4], momentum, parts[5])
        assert after.reads is not None
        return (after.weights, after.reads, after.momentum) if config.momentum else (after.weights, after.reads)

    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)


def test_a_memory_gives_back_what_followed() -> None:
    """A pair written once is read back: the inner gradient step does learn."""
    config = MemoryConfig(1, 64, 6)
    keys = F.normalize(torch.randn(1, 1, 20, 64, dtype=torch.float64), dim=-1)
    values = torch.randn(1, 1, 20, 6, dtype=torch.float64)
    full = torch.ones(1, 1, 1, 20, dtype=torch.float64)
    writes = Writes(keys, values, theta=full, log_keep=torch.zeros_like(full), log_eta=None)
    start = torch.zeros(1, 1, config.num_weights, dtype=torch.float64)
    rule = make_rule(config)
    error = rule.read(rule.absorb(writes, start, start[:, :0]).weights, keys) - values
    relative = error.norm(dim=-1) / values.norm(dim=-1)
    assert relative[..., -1].max() < 1e-12, "the last pair is exact when theta is 1"
    assert relative.mean() < 0.5


def test_shapes_that_no_rule_has_are_refused() -> None:
    chunked: dict[str, Any] = {"rule": "chunk", "residual": True, "value_dim": 9}
    for wrong in ({"depth": 2}, {"residual": True}, chunked, {"depth": 0}, {"rule": "exakt"}):
        with pytest.raises(ValueError, match=r"memory|residual|rule"):
            replace(LINEAR, **wrong)


def growth(keys: Tensor, theta: Tensor, eta: Tensor) -> float:
    """By how much a line of tokens, said again and again, makes M and S grow at each turn: a spectral radius."""
    size = keys.shape[1]
    turn, same = torch.eye(2 * size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
    for key, step, share in zip(keys, theta, eta, strict=True):
        down, kept = -step * (1 - share) * torch.outer(key, key), share * same
        turn = torch.cat((torch.cat((same + down, kept), 1), torch.cat((down, kept), 1))) @ turn
    return float(torch.linalg.eigvals(turn).abs().max())


def test_momentum_below_a_half_lets_no_line_grow_and_more_of_it_does() -> None:
    chance = torch.Generator().manual_seed(0)
    below, above = 0.0, 0.0
    for _ in range(300):
        size, count = (int(torch.randint(low, high, (), generator=chance)) for low, high in ((2, 5), (2, 12)))
        keys = F.normalize(torch.randn(count, size, dtype=torch.float64, generator=chance), dim=-1)
        theta, eta = torch.rand(2, count, dtype=torch.float64, generator=chance)
        below, above = max(below, growth(keys, theta, eta / 2)), max(above, growth(keys, theta, eta))
    assert below <= 1 + 1e-9
    assert above > 1.01
