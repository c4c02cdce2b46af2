import math
from collections import Counter

import torch
from titans.sampling import Sampler, SamplingParams

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def drawn(count: int = 4_000, **params: float) -> Counter[int]:
    sampler = Sampler(SamplingParams(**{"seed": 1, **params}))  # type: ignore[arg-type]
    return Counter(sampler.sample(LOGITS) for _ in range(count))


def test_tokens_come_as_often_as_they_are_likely() -> None:
    counts = drawn()
    for token, probability in enumerate(LOGITS.exp().tolist()):
        assert math.isclose(counts[token] / 4_000, probability, abs_tol=0.03)


def test_temperature_zero_is_the_likeliest() -> None:
    assert set(drawn(50, temperature=0)) == {0}


def test_temperature_sharpens() -> None:
    assert drawn(temperature=0.3)[0] > drawn()[0]


def test_a_temperature_next_to_zero_is_the_likeliest_whatever_the_scores() -> None:
    for temperature in (1e-3, 1e-9, 1e-40, 5e-324):
        sampler = Sampler(SamplingParams(temperature=temperature, seed=1))
        for scale in (1.0, 1e30):
            assert {sampler.sample(scale * LOGITS) for _ in range(20)} == {0}


def test_top_k_keeps_the_likeliest() -> None:
    assert set(drawn(top_k=2)) == {0, 1}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    assert set(drawn(top_p=0.5)) == {0}
    assert set(drawn(top_p=0.51)) == {0, 1}
    assert set(drawn(top_p=0.01)) == {0}


def test_a_seed_repeats() -> None:
    assert drawn(100, seed=3) == drawn(100, seed=3) != drawn(100, seed=4)
