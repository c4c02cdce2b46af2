"""Weights in the order that the processor likes: what they multiply to does not change."""

import pytest
import torch
from support.models import make_tiny
from support.weights import weight_of
from titans.native.build import library
from titans.native.matrix import Team
from titans.packed import FourBits, PackedLinear, pack
from torch.nn import functional as F

BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
pytestmark = pytest.mark.skipif(not BFLOAT16, reason="this machine has no use for packed weights")


@pytest.mark.parametrize("shape", [(96,), (1, 1, 96), (4, 1, 96), (2, 7, 96), (300, 96)])
@pytest.mark.parametrize("is_four_bit", [False, True])
def test_the_product_is_the_same_by_torch_alone(shape: tuple[int, ...], is_four_bit: bool) -> None:
    weight = weight_of(4 if is_four_bit else 16, 64, 96)
    packed, x = PackedLinear(weight), torch.randn(shape).bfloat16()
    assert (FourBits.pack(weight) is not None) == is_four_bit
    expected = F.linear(x.double(), weight.double())
    assert packed(x).shape == expected.shape
    assert (packed(x) - expected).norm() < 0.004 * expected.norm()


@pytest.mark.skipif(library() is None, reason="no kernels")
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_a_heads_scores_are_not_rounded_however_many_rows_there_are(rows: int) -> None:
    head = PackedLinear(weight_of(16, 64, 96), Team(1), torch.float32)
    x = torch.randn(rows, 96).bfloat16()
    assert head(x).dtype == torch.float32
    assert torch.equal(head(x), torch.cat([head(row[None]) for row in x]))


def test_torchs_kernel_takes_sixteen_outputs_at_a_time() -> None:
    assert FourBits.pack(weight_of(4, 60, 96)) is None


def test_what_does_not_gain_is_left_as_it_is() -> None:
    model = make_tiny()
    pack(model, {})
    assert not any(isinstance(x, PackedLinear) for x in model.modules())


def test_a_packed_model_says_what_it_said() -> None:
    model, packed = (make_tiny().to(torch.bfloat16) for _ in range(2))
    for each in (*model.memories, *packed.memories):
        each.float()
    pack(packed, {})
    tokens = torch.arange(40)[None]
    ours, theirs = (m.logits(m(tokens, m.open(m.ingest(tokens, m.new_state())))[0]) for m in (packed, model))
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
