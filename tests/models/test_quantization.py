"""Keys in eight bits: near what they were, and whatever bytes a state has, floats that can be reckoned with."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from titans.memory.quantization import as_floats, dequantize, like, quantize


@given(seed=st.integers(0, 999), exponent=st.integers(-16, 15), dim=st.sampled_from([1, 7, 256]))
@settings(max_examples=60, deadline=None)
def test_a_row_is_what_it_was_within_a_two_hundredth_of_its_largest(seed: int, exponent: int, dim: int) -> None:
    rows = torch.randn(3, 2, dim, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    kept = quantize(rows)
    largest = rows.abs().amax(dim=-1, keepdim=True)
    assert kept.shape == (3, 2, dim + 1) and kept.dtype == torch.int8
    within = torch.maximum(largest / 232, torch.tensor(2.0**-16)) * 1.001
    assert ((dequantize(kept) - rows).abs() <= within).all()
    assert not kept[..., :-1].eq(-128).any(), "as far below 0 as above"


def test_a_row_of_nothing_is_zeros_and_the_others_are_as_alone() -> None:
    rows = torch.stack((torch.zeros(5), torch.randn(5), torch.full((5,), 1e-9)))
    kept = quantize(rows)
    assert not kept[0].any() and not kept[2].any()
    assert torch.equal(kept[1], quantize(rows[1]))


def test_any_bytes_are_floats() -> None:
    every = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)
    rows = torch.cartesian_prod(every, every)
    assert dequantize(rows).isfinite().all() and dequantize(rows).abs().max() < 2**23
    assert not quantize(torch.tensor([[1e30, -1e30, 0.0]])).eq(-128).any(), "what is too large is as large as can be"


def test_what_is_kept_as_it_is_stays_so() -> None:
    rows, kept = torch.randn(2, 4), torch.zeros(1, 4, dtype=torch.float64)
    assert as_floats(kept) is kept and torch.equal(like(rows, kept), rows.double())
    assert torch.equal(like(rows, quantize(kept)), quantize(rows))
