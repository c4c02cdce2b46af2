"""The fast memory beside the oracle: token by token, float64, gradients by autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from titans.config import MemoryConfig
from titans.memory.linear import LinearMemory, MemoryState, Writes, absorb_chunk
from titans.memory.reference import absorb_tokens
from torch import Tensor
from torch.nn import functional as F

BATCH, HEADS, KEY, VALUE, SIZE = 2, 3, 8, 6, 24


def random_writes(num_tokens: int, *, momentum: bool, seed: int, dtype: torch.dtype = torch.float64) -> Writes:
    torch.manual_seed(seed)
    shape = (BATCH, HEADS, num_tokens)
    return Writes(
        keys=F.normalize(torch.randn(*shape, KEY, dtype=dtype), dim=-1),
        values=torch.randn(*shape, VALUE, dtype=dtype),
        theta=torch.rand(shape, dtype=dtype),
        log_keep=F.logsigmoid(torch.randn(shape, dtype=dtype) + 3),
        log_eta=F.logsigmoid(torch.randn(shape, dtype=dtype)) if momentum else None,
    )


def random_start(*, momentum: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    weights = torch.randn(BATCH, HEADS, KEY, VALUE, dtype=dtype)
    return weights, torch.randn_like(weights) if momentum else weights[:, :0]


def slice_writes(writes: Writes, start: int, stop: int) -> Writes:
    return Writes(*(None if x is None else x[:, :, start:stop] for x in writes))  # type: ignore[arg-type]


def walk(writes: Writes, weights: Tensor, momentum: Tensor, queries: Tensor, cuts: list[int]) -> list[Tensor]:
    """Chunk by chunk, cut anywhere."""
    reads = []
    for start, stop in zip([0, *cuts], [*cuts, queries.shape[2]], strict=True):
        part = slice_writes(writes, start, stop)
        weights, momentum, read = absorb_chunk(part, weights, momentum, queries[:, :, start:stop])
        assert read is not None
        reads.append(read)
    return [weights, momentum, torch.cat(reads, dim=2)]


@pytest.mark.parametrize("momentum", [False, True])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_chunks_of_any_size_equal_the_token_loop(momentum: bool, data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(1, 40))
    cuts = sorted(data.draw(st.sets(st.integers(1, num_tokens - 1), max_size=5))) if num_tokens > 1 else []
    writes = random_writes(num_tokens, momentum=momentum, seed=data.draw(st.integers(0, 99)))
    weights, start_momentum = random_start(momentum=momentum)
    queries = F.normalize(torch.randn_like(writes.keys), dim=-1)
    expected = absorb_tokens(writes, weights, start_momentum, queries)
    got = walk(writes, weights, start_momentum, queries, cuts)
    for name, ours, oracle in zip(("weights", "momentum", "reads"), got, expected, strict=True):
        if name == "momentum" and not momentum:
            continue
        torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-10)


@pytest.mark.parametrize("momentum", [False, True])
def test_float32_stays_near_the_oracle(momentum: bool) -> None:
    writes = random_writes(500, momentum=momentum, seed=1)
    start = random_start(momentum=momentum)
    queries = F.normalize(torch.randn_like(writes.keys), dim=-1)
    expected = absorb_tokens(writes, *start, queries)
    single = Writes(*(None if x is None else x.float() for x in writes))  # type: ignore[arg-type]
    got = walk(single, start[0].float(), start[1].float(), queries.float(), list(range(64, 500, 64)))
    torch.testing.assert_close(got[2].double(), expected[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("end", [0, 1, 5, 12])
def test_a_row_that_ends_early_is_the_row_alone(momentum: bool, end: int) -> None:
    writes = random_writes(12, momentum=momentum, seed=2)
    start = random_start(momentum=momentum)
    weights, s, _ = absorb_chunk(writes, *start, ends_B=torch.tensor([end, 12]))
    whole, _, _ = absorb_chunk(writes, *start)
    alone = absorb_chunk(slice_writes(writes, 0, end), *start) if end else (*start, None)
    torch.testing.assert_close(weights[0], alone[0][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(weights[1], whole[1], rtol=0, atol=0)
    torch.testing.assert_close(s[0] if momentum else s, alone[1][0] if momentum else s, rtol=0, atol=1e-12)


@pytest.mark.parametrize("momentum", [False, True])
def test_outer_gradients_are_right(momentum: bool) -> None:
    writes = random_writes(5, momentum=momentum, seed=3)
    start = random_start(momentum=momentum)
    queries = F.normalize(torch.randn_like(writes.keys), dim=-1)
    inputs = [x.requires_grad_() for x in (*writes, *start, queries) if x is not None and x.numel()]

    def outputs(*parts: Tensor) -> tuple[Tensor, ...]:
        count = 5 if momentum else 4
        these = Writes(*parts[:5]) if momentum else Writes(parts[0], parts[1], parts[2], parts[3], log_eta=None)
        weights, s = (parts[count], parts[count + 1]) if momentum else (parts[count], start[1])
        ended, end_s, reads = absorb_chunk(these, weights, s, parts[-1])
        assert reads is not None
        return (ended, end_s, reads) if momentum else (ended, reads)

    assert torch.autograd.gradcheck(outputs, inputs)


def make_memory(*, momentum: bool = False, chunk_size: int = 8) -> LinearMemory:
    torch.manual_seed(5)
    config = MemoryConfig(1, HEADS, KEY, VALUE, chunk_size=chunk_size, momentum=momentum)
    memory = LinearMemory(config, SIZE).requires_grad_(False)
    memory.gates.weight.normal_(std=0.3)
    for conv in (memory.query_conv, memory.key_conv, memory.value_conv):
        conv.add_(0.2 * torch.randn_like(conv))
    return memory


def empty(memory: LinearMemory, batch: int = 1) -> MemoryState:
    return MemoryState.zeros(memory.config, SIZE, batch, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("momentum", [False, True])
def test_odd_sized_calls_equal_one_call(momentum: bool) -> None:
    memory, h = make_memory(momentum=momentum), torch.randn(2, 50, SIZE)
    whole, end = memory(h, empty(memory, 2))
    state, pieces = empty(memory, 2), []
    for part in h.split([1, 2, 17, 3, 27], dim=1):
        y, state = memory(part, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(state, end, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_write_leaves_what_write_and_read_leaves() -> None:
    memory, h = make_memory(), torch.randn(2, 21, SIZE)
    _, fused = memory(h, empty(memory, 2))
    for ours, theirs in zip(memory.write(h, empty(memory, 2)), fused, strict=True):
        assert torch.equal(ours, theirs)


def test_reading_asks_the_memory_as_it_stands_and_leaves_it() -> None:
    memory, h = make_memory(), torch.randn(1, 21, SIZE)
    state = memory.write(h, empty(memory))
    y, after = memory.read(h[:, :4], state)
    assert torch.equal(after.weights, state.weights)
    assert y.abs().max() > 0
    again, _ = memory.read(h[:, :4], state)
    assert torch.equal(y, again)


def test_no_output_looks_ahead() -> None:
    memory, h = make_memory(), torch.randn(1, 30, SIZE)
    before, _ = memory(h, empty(memory))
    for t in (1, 7, 8, 9, 20):
        changed = h.clone()
        changed[:, t] += 1
        after, _ = memory(changed, empty(memory))
        assert torch.equal(after[:, :t], before[:, :t]), f"an output before token {t} changed with it"
        assert not torch.equal(after[:, t:], before[:, t:])


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("kind", ["one token for ever", "a line again and again", "zeros"])
def test_repetition_keeps_the_memory_bounded(momentum: bool, kind: str) -> None:
    memory = make_memory(momentum=momentum, chunk_size=64)
    line = {"zeros": torch.zeros(1, 1, SIZE), "one token for ever": torch.randn(1, 1, SIZE)}.get(
        kind, torch.randn(1, 11, SIZE)
    )
    state = empty(memory)
    for _ in range(20):
        state = memory.write(line.repeat(1, 6_000 // line.shape[1] // 10, 1), state)
    assert state.weights.isfinite().all()
    assert state.weights.norm() < 1e3


def test_a_memory_gives_back_what_followed() -> None:
    """A pair written once is read back: the inner gradient step does learn."""
    keys = F.normalize(torch.randn(1, 1, 20, 64, dtype=torch.float64), dim=-1)
    values = torch.randn(1, 1, 20, 6, dtype=torch.float64)
    full = torch.ones(1, 1, 20, dtype=torch.float64)
    writes = Writes(keys, values, theta=full, log_keep=torch.zeros_like(full), log_eta=None)
    start = torch.zeros(1, 1, 64, 6, dtype=torch.float64)
    weights, _, _ = absorb_chunk(writes, start, start[:, :0])
    error = (keys @ weights - values).norm(dim=-1) / values.norm(dim=-1)
    assert error[..., -1].max() < 1e-12, "the last pair is exact when theta is 1"
    assert error.mean() < 0.5
