"""Attention in blocks beside attention as it is written."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from titans.attention import Attention, Placement
from titans.mixing import Lasting, Masks, Ring, mix_fused, mix_in_turn
from torch import Tensor
from torch.nn import functional as F

WINDOW = 96
LENGTHS = 7, 64, 200, 3 * WINDOW, 3 * WINDOW + 1
place = partial(Placement.place, window=WINDOW, num_kv_heads=2, head_dim=8, theta=100.0)
small = partial(Placement.place, window=8, num_kv_heads=2, head_dim=4, theta=100.0)


def as_written(q_BHTE: Tensor, sights: list[Ring], bias_BTS: Tensor, lasting: Lasting) -> Tensor:
    """One softmax over everything, in float64."""
    shared = q_BHTE.shape[1] // lasting.keys.shape[0]
    keys_GPE = lasting.keys.transpose(1, 2)
    scores = [torch.einsum("bhte,hpe->bhtp", lasting.queries.double(), keys_GPE.repeat_interleave(shared, 0).double())]
    values = [lasting.values.repeat_interleave(shared, 0).expand(q_BHTE.shape[0], -1, -1, -1)]
    for sight in sights:
        keys, value = (x.repeat_interleave(shared, 1) for x in sight)
        scores.append(q_BHTE.double() @ keys.double().transpose(-1, -2) + bias_BTS[:, None] * q_BHTE.shape[-1] ** 0.5)
        values.append(value)
    shares = (torch.cat(scores, -1) * q_BHTE.shape[-1] ** -0.5).softmax(-1)
    mixed: Tensor = shares @ torch.cat(values, 2).double()
    return mixed


def fused(q_BHTE: Tensor, sights: list[Ring], bias_BTS: Tensor, lasting: Lasting) -> Tensor:
    """The second layer's: the first one has made the masks."""
    masks: Masks = {}
    mix_fused(q_BHTE, sights, bias_BTS, lasting, masks)
    return mix_fused(q_BHTE, sights, bias_BTS, lasting, masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_sights", [1, 2])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(("mix", "num_tokens"), [(mix_in_turn, 1), *itertools.product((mix_in_turn, fused), LENGTHS)])
def test_blocks_give_what_the_formula_gives(
    mix: Callable[..., Tensor], num_tokens: int, num_sights: int, dtype: torch.dtype, segmented: bool
) -> None:
    """Blocks one after the other, as on a CPU, and as rows of one batch, as on a CUDA device."""
    torch.manual_seed(0)
    position = torch.tensor([0, 30, WINDOW, 1_000])
    where = place(position, torch.full((4,), num_tokens), num_tokens, segmented=segmented)
    num_keys = WINDOW if num_tokens == 1 else WINDOW + num_tokens
    queries, asking = torch.randn(2, 4, 6, num_tokens, 8, dtype=dtype)
    sights = [Ring(*torch.randn(2, 4, 2, num_keys, 8, dtype=dtype)) for _ in range(num_sights)]
    lasting = Lasting(asking.float(), torch.randn(2, 8, 3), torch.randn(2, 3, 8))
    got = mix(queries, sights, where.bias_BTS, lasting)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    expected = as_written(queries, sights, where.bias_BTS, lasting)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("segmented", [False, True])
def test_a_query_sees_its_window_and_no_more(segmented: bool) -> None:
    for start in (0, 5, WINDOW, 3 * WINDOW + 11):
        where = place(torch.tensor([start]), torch.tensor([150]), 150, segmented=segmented)
        for i in (0, 60, 149):
            seen = (where.bias_BTS[0, i] == 0).nonzero().flatten() + start - WINDOW
            here = start + i
            first = here // WINDOW * WINDOW if segmented else here - WINDOW + 1
            assert seen.tolist() == list(range(max(first, 0), here + 1))


@pytest.mark.parametrize("num_persistent", [1, 3])
def test_persistent_tokens_are_more_keys(num_persistent: int) -> None:
    torch.manual_seed(0)
    attention = Attention(24, num_heads=6, num_kv_heads=2, head_dim=4, num_persistent=num_persistent)
    attention.persistent_values.data.normal_()
    x = torch.randn(1, 1, 24)
    ring = Ring(*torch.zeros(2, 1, 2, 8, 4))
    where = small(torch.tensor([0]), torch.tensor([1]), 1)
    got = attention(x, where, ring)
    query, key, value = (part[0, 0] for part in attention.split(x))  # [heads, 4] each
    (query, seen), (key, _) = (where.rotation(part[None, None, None])[0, 0] for part in (query, key))
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
    nowhere = small(torch.tensor([-5]), torch.tensor([5]), 5)
    expected = attention.out(attention.persistent_values[0].repeat_interleave(3, dim=0).flatten())
    got = attention(torch.randn(1, 5, 24), nowhere, ring)
    torch.testing.assert_close(got, expected.expand_as(got))


def test_no_gradient_flows_through_a_ring() -> None:
    attention = Attention(24, num_heads=6, num_kv_heads=2, head_dim=4, num_persistent=1)
    ring = Ring(*torch.zeros(2, 1, 2, 8, 4))
    attention(torch.randn(1, 3, 24), small(torch.tensor([0]), torch.tensor([3]), 3), ring).sum().backward()
    assert attention.qkv.weight.grad is not None
    assert ring.keys[:, :, :3].abs().sum() > 0
    assert not ring.keys.requires_grad
