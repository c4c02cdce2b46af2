"""Weights in the order that the processor likes: what they multiply to does not change."""

import pytest
import torch
from support.models import make_tiny
from titans.checkpoint import load
from titans.packed import PackedLinear, four_bits, pack
from torch.nn import functional as F

BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
pytestmark = pytest.mark.skipif(not BFLOAT16, reason="this machine has no use for packed weights")


def on_a_grid(num_outputs: int, num_inputs: int) -> torch.Tensor:
    """Weights of 16 levels a group of 32, both ends used, as a four-bit file has them."""
    generator = torch.Generator().manual_seed(0)
    shape = num_outputs, num_inputs // 32, 32
    codes = torch.randint(0, 16, shape, generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    step, middle = torch.rand(2, *shape[:2], 1, generator=generator)
    weight: torch.Tensor = (codes - 6 - 3 * middle) * (step + 0.1) * 0.01
    return weight.flatten(1).to(torch.bfloat16)


@pytest.mark.parametrize("shape", [(96,), (1, 1, 96), (4, 1, 96), (2, 7, 96), (300, 96)])
@pytest.mark.parametrize("is_four_bit", [False, True])
def test_the_product_is_the_same(shape: tuple[int, ...], is_four_bit: bool) -> None:
    torch.manual_seed(0)
    weight = on_a_grid(64, 96) if is_four_bit else torch.randn(64, 96).bfloat16() * 0.1
    packed, x = PackedLinear(weight), torch.randn(shape).bfloat16()
    assert packed.is_four_bit == is_four_bit
    expected = F.linear(x.double(), weight.double())
    assert packed(x).shape == expected.shape
    assert (packed(x) - expected).norm() < 0.004 * expected.norm()


def test_weights_off_the_grid_are_not_rounded_to_it() -> None:
    weight = on_a_grid(64, 96)
    assert four_bits(weight) is not None
    weight[5, 40] += 0.5 * (weight[5, 32:64].max() - weight[5, 32:64].min()) / 15
    assert four_bits(weight) is None
    assert four_bits(on_a_grid(60, 96)) is None, "the kernel takes sixteen outputs at a time"


def test_the_shipped_body_is_read_four_bits_a_weight() -> None:
    model = load(device=torch.device("cpu"), dtype=torch.bfloat16).model
    layers = [x for x in model.modules() if isinstance(x, PackedLinear)]
    assert len(layers) == 4 * 30 + 1
    assert sum(x.is_four_bit for x in layers) == 4 * 30, "the head is an eight-bit embedding"


def test_what_does_not_gain_is_left_as_it_is() -> None:
    model = make_tiny()
    pack(model)
    assert not any(isinstance(x, PackedLinear) for x in model.modules())


def test_a_packed_model_says_what_it_said() -> None:
    model, packed = (make_tiny().to(torch.bfloat16) for _ in range(2))
    for each in (*model.memories, *packed.memories):
        each.float()
    pack(packed)
    tokens = torch.arange(40)[None]
    ours, theirs = (m.logits(m(tokens, m.open(m.ingest(tokens, m.new_state())))[0]) for m in (packed, model))
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
