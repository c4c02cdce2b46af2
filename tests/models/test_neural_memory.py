"""The memory as a layer: one run of tokens, however it is cut, batched or read."""

from dataclasses import replace

import pytest
import torch
from titans.config import MemoryConfig
from titans.memory.neural import MemoryState, NeuralMemory

SIZE = 24
LINEAR = MemoryConfig(3, 8, 6)
PRODUCTS = replace(LINEAR, conv_width=6, gate_width=4, products=3)
TRAINED_START = replace(LINEAR, learned_start=True)
DEEP = replace(LINEAR, rule="chunk", depth=2, expansion=2, output_norm=True)
CAMERA_READY = replace(DEEP, value_dim=8, residual=True)
CHOOSY = replace(PRODUCTS, write_threshold=0.3, read_threshold=0.02)
PROTECTING = replace(PRODUCTS, write_threshold=0.3, protected_keys=5)
LASTING = replace(DEEP, forgetting=False, conv_width=1)
EVERY_FORM = [
    pytest.param(replace(form, momentum=momentum), id=f"{name}{'-momentum' * momentum}")
    for name, form in {
        "linear": LINEAR,
        "products": PRODUCTS,
        "choosy": CHOOSY,
        "protecting": PROTECTING,
        "deep": DEEP,
        "residual": CAMERA_READY,
        "lasting": LASTING,
    }.items()
    for momentum in (False, True)
]


def make_memory(config: MemoryConfig, chunk_size: int = 8) -> NeuralMemory:
    torch.manual_seed(5)
    memory = NeuralMemory(replace(config, chunk_size=chunk_size), SIZE).requires_grad_(False)
    memory.gates.weight.normal_(std=0.3)
    for conv in (memory.query_conv, memory.key_conv, memory.value_conv, *_gate_conv(memory)):
        conv.add_(0.2 * torch.randn_like(conv))
    return memory


def _gate_conv(memory: NeuralMemory) -> list[torch.nn.Parameter]:
    return [memory.gate_conv] if memory.config.gate_width > 1 else []


def assert_same(ours: MemoryState, theirs: MemoryState) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", EVERY_FORM)
def test_odd_sized_calls_equal_one_call(config: MemoryConfig) -> None:
    memory, h = make_memory(config), torch.randn(2, 50, SIZE)
    whole, end = memory(h, memory.new_state(2))
    state, pieces = memory.new_state(2), []
    for part in h.split([1, 2, 17, 3, 27], dim=1):
        y, state = memory(part, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    assert_same(state, end)


@pytest.mark.parametrize("config", EVERY_FORM)
def test_write_leaves_what_write_and_read_leaves(config: MemoryConfig) -> None:
    memory, h = make_memory(config), torch.randn(2, 21, SIZE)
    _, fused = memory(h, memory.new_state(2))
    for ours, theirs in zip(memory.write(h, memory.new_state(2)), fused, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("form", [LINEAR, DEEP])
@pytest.mark.parametrize(("theta", "written"), [(0.1, 0.0), (0.2, 0.0), (0.3, 0.15), (0.4, 0.4), (0.7, 0.7)])
def test_small_steps_are_none_and_large_ones_are_as_they_are(form: MemoryConfig, theta: float, written: float) -> None:
    memory = make_memory(replace(form, forgetting=False, write_threshold=0.2))
    memory.gates.weight.zero_()
    memory.gates.bias[: form.num_heads * form.depth] = torch.tensor(theta).logit()
    h, chunk = torch.randn(1, 8 + form.num_recent, SIZE), memory.config.chunk_size if form.rule == "chunk" else 1
    asked, taken = memory.writes(h).theta, memory._writes(memory._input(h)).theta
    torch.testing.assert_close(asked, torch.full_like(asked, theta / chunk), rtol=0, atol=1e-6)
    torch.testing.assert_close(taken, torch.full_like(taken, written / chunk), rtol=0, atol=1e-6)
    state = memory.write(h, memory.new_state(1))
    assert torch.equal(state.weights, memory.new_state(1).weights) == (written == 0)


@pytest.mark.parametrize("form", [PRODUCTS, DEEP])
def test_small_answers_are_none_and_large_ones_are_as_they_are(form: MemoryConfig) -> None:
    whole, h = make_memory(form), torch.randn(2, 50, SIZE)
    expected, _ = whole(h, whole.new_state(2))
    sizes = expected.square().mean(-1, keepdim=True).sqrt()
    choosy = make_memory(replace(form, read_threshold=sizes.median().item() / 1.5))
    choosy.load_state_dict(whole.state_dict())
    y, _ = choosy(h, choosy.new_state(2))
    torch.testing.assert_close(y, expected * (1.5 * sizes / sizes.median() - 1).clamp(0, 1), rtol=1e-4, atol=1e-6)
    mute = NeuralMemory(replace(choosy.config, read_threshold=2 * sizes.max().item()), SIZE)
    mute.load_state_dict(whole.state_dict())
    assert not mute(h, mute.new_state(2))[0].any()
    heard = NeuralMemory(replace(choosy.config, read_threshold=0.49 * sizes.min().item()), SIZE)
    heard.load_state_dict(whole.state_dict())
    assert torch.equal(heard(h, heard.new_state(2))[0], expected)


def test_an_answer_of_nothing_has_gradients() -> None:
    memory, h = make_memory(CHOOSY).requires_grad_(True), torch.randn(1, 5, SIZE).requires_grad_(True)
    y, _ = memory.read(h, memory.new_state(1).weights, memory.new_state(1).recent)
    y.sum().backward()
    assert not y.any() and h.grad is not None and h.grad.isfinite().all()


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf")])
def test_a_threshold_of_answers_is_a_finite_size(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold of answers"):
        replace(LINEAR, read_threshold=threshold)


@pytest.mark.parametrize("config", EVERY_FORM)
def test_reading_asks_the_memory_as_it_stands_and_leaves_it(config: MemoryConfig) -> None:
    memory, h = make_memory(config), torch.randn(1, 21, SIZE)
    state = memory.write(h, memory.new_state(1))
    weights = memory.settle(state)
    before = weights.clone()
    y, recent = memory.read(h[:, :4], weights, state.recent)
    assert y.abs().max() > 0
    again, _ = memory.read(h[:, :4], weights, state.recent)
    assert torch.equal(y, again)
    assert torch.equal(weights, before)
    assert torch.equal(recent, memory.write(h[:, :4], state).recent)


@pytest.mark.parametrize("config", EVERY_FORM)
def test_no_output_looks_ahead(config: MemoryConfig) -> None:
    memory, h = make_memory(config), torch.randn(1, 30, SIZE)
    before, _ = memory(h, memory.new_state(1))
    for t in (1, 7, 8, 9, 20):
        changed = h.clone()
        changed[:, t] += 1
        after, _ = memory(changed, memory.new_state(1))
        assert torch.equal(after[:, :t], before[:, :t]), f"an output before token {t} changed with it"
        assert not torch.equal(after[:, t:], before[:, t:])


@pytest.mark.parametrize("config", EVERY_FORM)
@pytest.mark.parametrize("kind", ["one token for ever", "a line again and again", "zeros"])
def test_repetition_keeps_the_memory_bounded(config: MemoryConfig, kind: str) -> None:
    memory = make_memory(config, 64)
    line = {"zeros": torch.zeros(1, 1, SIZE), "one token for ever": torch.randn(1, 1, SIZE)}.get(
        kind, torch.randn(1, 11, SIZE)
    )
    state, seen = memory.new_state(1), []
    for _ in range(10):
        state = memory.write(line.repeat(1, 1_000, 1), state)
        assert memory.surprise(line, state).max() < 100
        seen.append(torch.cat(memory.norms(state), dim=1))
    bound = 2 * seen[0].clamp(min=1)  # what ten thousand lines leave is no more than what a thousand left
    assert all((norms < bound).all() for norms in seen)


@pytest.mark.parametrize("config", [LINEAR, DEEP, CAMERA_READY, LASTING])
def test_what_was_read_surprises_less(config: MemoryConfig) -> None:
    memory, h = make_memory(config), torch.randn(1, 21, SIZE)
    state = memory.new_state(1)
    before = memory.surprise(h, state)
    for _ in range(20):
        state = memory.write(h, state)
    after = memory.surprise(h, state._replace(recent=torch.zeros_like(state.recent)))
    assert before.shape == (1, config.num_heads, 21)
    assert after.mean() < 0.9 * before.mean()


@pytest.mark.parametrize("config", EVERY_FORM)
def test_rows_in_mid_chunk_are_each_as_alone(config: MemoryConfig) -> None:
    memory, lengths = make_memory(config), [3, 0, 8, 21]
    before = [memory.write(torch.randn(1, n, SIZE), memory.new_state(1)) for n in (5, 8, 0, 11)]
    h = torch.randn(4, 21, SIZE)
    together = MemoryState(*(torch.cat(parts) for parts in zip(*before, strict=True)))
    after = memory.write(h, together, torch.tensor(lengths))
    settled = memory.settle(after)
    for i, (state, length) in enumerate(zip(before, lengths, strict=True)):
        alone = memory.write(h[i : i + 1, :length], state)
        assert_same(MemoryState(*(part[i : i + 1] for part in after)), alone)
        torch.testing.assert_close(settled[i : i + 1], memory.settle(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", EVERY_FORM)
def test_a_reader_sees_every_token_written(config: MemoryConfig) -> None:
    """Also those of a chunk that has only begun: it is answered as the next token would be."""
    memory, h = make_memory(config), torch.randn(1, 21, SIZE)
    answers, _ = memory(h, memory.new_state(1))
    for end in (1, 8, 12, 21):
        state = memory.write(h[:, :end], memory.new_state(1))
        y, _ = memory.read(
            h[:, end - 1 : end], memory.settle(state), memory.write(h[:, : end - 1], memory.new_state(1)).recent
        )
        torch.testing.assert_close(y[:, 0], answers[:, end - 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [TRAINED_START, DEEP, CAMERA_READY])
def test_a_new_memory_starts_from_what_training_learnt(config: MemoryConfig) -> None:
    memory, h = make_memory(config).requires_grad_(True), torch.randn(2, 11, SIZE)
    with torch.no_grad():
        memory.rule.start_weights.normal_()
    assert torch.equal(memory.new_state(2).weights, memory.rule.start_weights.expand(2, -1, -1))
    y, _ = memory(h, memory.new_state(2))
    y.sum().backward()
    assert memory.rule.start_weights.grad is not None
    assert memory.rule.start_weights.grad.abs().max() > 0


@pytest.mark.parametrize("config", EVERY_FORM)
def test_gradients_are_the_same_where_activations_are_computed_again(config: MemoryConfig) -> None:
    gradients = []
    for checkpointing in (False, True):
        memory, h = make_memory(config, 4).requires_grad_(True), torch.randn(2, 75, SIZE).requires_grad_(True)
        memory.checkpointing = checkpointing
        y, state = memory(h, memory.new_state(2), torch.tensor([75, 41]))
        (y[:, :41].square().sum() + state.weights.square().sum()).backward()
        gradients.append([h.grad, *(p.grad for p in memory.parameters())])
    assert all(g is not None and g.abs().max() > 0 for g in gradients[0])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("config", EVERY_FORM)
def test_bfloat16_stays_near_float32(config: MemoryConfig) -> None:
    """Inputs and projections of 8 bits; gates, keys, the memory and its steps stay in float32."""
    single, half = make_memory(config), make_memory(config)
    half.cast_projections(torch.bfloat16)
    h = torch.randn(2, 200, SIZE).bfloat16()
    expected, _ = single(h.float(), single.new_state(2))
    got, state = half(h, half.new_state(2, torch.bfloat16))
    assert got.dtype == torch.bfloat16
    assert state.weights.dtype == torch.float32
    assert (got.float() - expected).norm() < 0.03 * expected.norm()


def test_products_make_keys_as_alike_as_their_squares() -> None:
    memory = make_memory(MemoryConfig(1, 256, 6, products=128))  # every pair of floats but a float with itself
    x = torch.nn.functional.normalize(torch.randn(1, 1, 40, 256), dim=-1)
    kernel, alike = (rows @ rows.mT for rows in (torch.nn.functional.normalize(memory._expand(x), dim=-1), x))
    torch.testing.assert_close(kernel, alike.square(), rtol=0, atol=0.05)


def test_a_key_has_products_with_no_more_neighbours_than_it_has() -> None:
    with pytest.raises(ValueError, match="products"):
        MemoryConfig(1, 8, 6, products=5)
