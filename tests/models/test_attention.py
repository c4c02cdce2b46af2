"""Attention in one pass beside attention as it is written."""

import pytest
import torch
from titans.attention import UNSEEN, Attention, Placement, Ring, mix_fused, mix_plain
from torch.nn import functional as F


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "num_keys"), [(1, 16), (7, 23), (40, 300), (130, 1_100)])
def test_one_pass_gives_what_the_formula_gives(num_tokens: int, num_keys: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    queries = torch.randn(3, 6, num_tokens, 16, dtype=dtype)
    keys, values = torch.randn(2, 3, 2, num_keys, 16, dtype=dtype)
    bias = torch.zeros(3, num_tokens, num_keys).masked_fill(torch.rand(3, num_tokens, num_keys) < 0.5, UNSEEN)
    bias[..., 0] = 0.0
    for ours, expected in zip(
        mix_fused(queries, keys, values, bias), mix_plain(queries, keys, values, bias), strict=True
    ):
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(ours.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_persistent", [1, 3])
@pytest.mark.parametrize("grad", [False, True])
def test_persistent_tokens_are_more_keys(grad: bool, num_persistent: int) -> None:
    torch.manual_seed(0)
    attention = Attention(24, num_heads=6, num_kv_heads=2, head_dim=4, num_persistent=num_persistent)
    attention.persistent_values.data.normal_()
    x = torch.randn(1, 1, 24)
    ring = Ring(*torch.zeros(2, 1, 2, 8, 4))
    place = Placement.place(torch.tensor([0]), torch.tensor([1]), 1, window=8, head_dim=4, theta=100.0)
    with torch.set_grad_enabled(grad):
        got = attention(x, place, ring)
    query, key, value = (part[0, 0] for part in attention.split(x))  # [heads, 4] each
    seen = place.persistent_rotation(query[None, None])[0, 0]
    query, key = place.rotation(query[None, None])[0, 0], place.rotation(key[None, None])[0, 0]
    heads = []
    for head in range(6):
        group = head // 3
        scores = torch.cat((query[head] @ key[group, :, None], attention.persistent_keys[:, group] @ seen[head]))
        values = torch.cat((value[group][None], attention.persistent_values[:, group]))
        heads.append(F.softmax(scores * 4**-0.5, dim=0) @ values)
    torch.testing.assert_close(got, attention.out(torch.cat(heads))[None, None])


def test_a_token_that_sees_nothing_takes_the_sink() -> None:
    torch.manual_seed(0)
    attention = Attention(24, num_heads=6, num_kv_heads=2, head_dim=4, num_persistent=1)
    attention.persistent_values.data.normal_()
    ring = Ring(*torch.zeros(2, 1, 2, 8, 4))
    nowhere = Placement.place(torch.tensor([-5]), torch.tensor([5]), 5, window=8, head_dim=4, theta=100.0)
    expected = attention.out(attention.persistent_values[0].repeat_interleave(3, dim=0).flatten())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = attention(torch.randn(1, 5, 24), nowhere, ring)
        torch.testing.assert_close(got, expected.expand_as(got))


def test_no_gradient_flows_through_a_ring() -> None:
    attention = Attention(24, num_heads=6, num_kv_heads=2, head_dim=4, num_persistent=1)
    ring = Ring(*torch.zeros(2, 1, 2, 8, 4))
    place = Placement.place(torch.tensor([0]), torch.tensor([3]), 3, window=8, head_dim=4, theta=100.0)
    attention(torch.randn(1, 3, 24), place, ring).sum().backward()
    assert attention.qkv.weight.grad is not None
    assert ring.keys[:, :, :3].abs().sum() > 0
    assert not ring.keys.requires_grad
