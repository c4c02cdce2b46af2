import math
from collections import Counter
from typing import Any

import pytest
import torch
from titans.sampling import (
    Drawn,
    Sampler,
    SamplingParams,
    biased,
    candidates,
    draw_each,
    draw_together,
    penalties_of,
    told,
)

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def drawn(count: int = 4_000, **params: float) -> Counter[int]:
    sampler = Sampler(SamplingParams(**{"seed": 1, **params}))  # type: ignore[arg-type]
    return Counter(sampler.draw(LOGITS).token for _ in range(count))


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
            assert {sampler.draw(scale * LOGITS).token for _ in range(20)} == {0}


def test_top_k_keeps_the_likeliest() -> None:
    assert set(drawn(top_k=2)) == {0, 1}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    assert set(drawn(top_p=0.5)) == {0}
    assert set(drawn(top_p=0.51)) == {0, 1}
    assert set(drawn(top_p=0.01)) == {0}
    for cut in ({}, {"top_k": 3}, {"min_p": 0.1}):
        assert set(drawn(top_p=1e-50, **cut)) == {0}, "which float32 does not tell from 0"


def test_a_seed_repeats() -> None:
    assert drawn(100, seed=3) == drawn(100, seed=3) != drawn(100, seed=4)


KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 0.7},
    {"temperature": 1e-9},
    {"top_p": 0.9},
    {"top_k": 40},
    {"frequency_penalty": 1.5},
    {"logit_bias": ((7, 5.0),)},
    {"num_logprobs": 3},
]


@pytest.mark.parametrize("kinds", [KINDS, KINDS[:1], KINDS[:4], KINDS[1:3], KINDS[4:]])
def test_sequences_are_drawn_together_as_alone(kinds: list[dict[str, Any]]) -> None:
    chance = torch.Generator().manual_seed(0)
    together, alone = ([Sampler(SamplingParams(seed=i, **kind)) for i, kind in enumerate(kinds)] for _ in range(2))
    for _ in range(20):
        scores = 3 * torch.randn(len(kinds), 1_000, generator=chance)
        assert draw_together(together, scores) == [
            sampler.draw(row) for sampler, row in zip(alone, scores, strict=True)
        ]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", [*KINDS, {"min_p": 0.1}, {"min_p": 0.1, "top_k": 5, "top_p": 0.9}], ids=str)
def test_scores_that_are_not_finite_fail_nothing_that_is_drawn_with_them(kind: dict[str, Any], bad: float) -> None:
    scores = torch.randn(2, 1_000, generator=torch.Generator().manual_seed(0))
    alone = Sampler(SamplingParams(seed=1, **kind)).draw(scores[1])
    scores[0] = bad
    for draw in (draw_each, draw_together):
        spoilt, whole = draw([Sampler(SamplingParams(seed=1, **kind)) for _ in scores], scores)
        assert whole == alone
        assert 0 <= spoilt.token < 1_000


def test_what_takes_scores_and_a_temperature_alone_is_plain() -> None:
    plain = [Sampler(SamplingParams(**kind)).is_plain for kind in KINDS]
    assert plain == [True] * 4 + [False] * 5
    assert not Sampler(SamplingParams(min_p=0.1)).is_plain
    assert not Sampler(SamplingParams(presence_penalty=-1)).is_plain


def kept(**params: float) -> dict[int, float]:
    """The tokens that may be drawn, and their probabilities once they add up to 1."""
    tokens, probabilities = candidates(LOGITS, SamplingParams(**params))  # type: ignore[arg-type]
    shares = (probabilities / probabilities.sum()).tolist()
    return {token: share for token, share in zip(tokens.tolist(), shares, strict=True) if share}


def test_min_p_keeps_what_is_a_share_as_likely_as_the_likeliest() -> None:
    assert kept(min_p=0.0).keys() == {0, 1, 2, 3}
    assert kept(min_p=0.09).keys() == {0, 1, 2, 3}  # 0.05 / 0.5 = 0.1
    assert kept(min_p=0.11).keys() == {0, 1, 2}
    assert kept(min_p=0.31).keys() == {0, 1}  # 0.15 / 0.5 = 0.3
    assert kept(min_p=1.0) == {0: 1.0}
    assert kept(min_p=0.31) == pytest.approx({0: 0.625, 1: 0.375})


def test_min_p_looks_at_what_the_temperature_has_made() -> None:
    assert kept(temperature=0.5, min_p=0.37).keys() == {0}  # (0.3 / 0.5) ** 2 = 0.36
    assert kept(temperature=0.5, min_p=0.35).keys() == {0, 1}


def test_what_cuts_tokens_off_adds_up() -> None:
    assert kept(top_k=3, min_p=0.31).keys() == {0, 1}
    assert kept(top_k=1, min_p=0.09).keys() == {0}
    assert kept(min_p=0.11, top_p=0.8).keys() == {0, 1}  # of 0.95: 0.526, 0.316, 0.158


@pytest.mark.parametrize("spread", [0.1, 4.0])
@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_p": 0.9, "top_k": 700}, {"top_k": 40}, {"min_p": 0.05}, {}])
def test_of_a_large_vocabulary_the_same_tokens_stay_as_after_sorting_all(cut: dict[str, Any], spread: float) -> None:
    torch.manual_seed(0)
    logits, params = torch.randn(20_000) * spread, SamplingParams(**cut)
    scores, order = logits.sort(descending=True)
    scores = scores[: params.top_k or None]
    scores = scores[(scores - scores[0]).exp() >= params.min_p]
    probabilities = scores.softmax(-1)
    stays = (probabilities.cumsum(-1) - probabilities < params.top_p) | (params.top_p == 1)
    expected = dict(zip(order[: len(scores)][stays].tolist(), probabilities[stays].tolist(), strict=True))
    tokens, shares = candidates(logits, params)
    assert dict(zip(tokens.tolist(), shares.tolist(), strict=True)) == pytest.approx(expected, rel=1e-4)


def test_a_bias_is_added() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0])
    assert biased(scores, [(0, 5.0), (2, -100.0)]).tolist() == [6.0, 2.0, -97.0]
    assert biased(scores, []).tolist() == scores.tolist() == [1.0, 2.0, 3.0]


def test_penalties_are_taken_off_what_has_been_drawn() -> None:
    assert penalties_of({0: 1, 2: 3}, 0.5, 0.25) == [(0, -0.75), (2, -1.25)]
    assert penalties_of({0: 1, 2: 3}, -1.0, 0.0) == [(0, 1.0), (2, 1.0)]
    assert penalties_of({}, 0.5, 0.25) == penalties_of({0: 1}, 0.0, 0.0) == []


def test_temperature_zero_is_the_likeliest_after_bias_and_penalties() -> None:
    logits = torch.tensor([1.0, 0.6, 0.0])
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.1))
    # 1, .6, 0 | .4, .6, 0 | .4, 0, 0 | .3, 0, 0 | .2, 0, 0 | .1, 0, 0 | 0, 0, 0
    assert [sampler.draw(logits).token for _ in range(6)] == [0, 1, 0, 0, 0, 0]
    sampler = Sampler(SamplingParams(temperature=0, logit_bias=((2, 1.5),)))
    assert [sampler.draw(logits).token for _ in range(3)] == [2, 2, 2]


def test_a_token_is_told_with_its_probability_and_the_likeliest_with_theirs() -> None:
    drawn = told(LOGITS + 7, 2, 2)
    assert drawn.token == 2
    assert drawn.logprob == pytest.approx(math.log(0.15), abs=1e-5)
    assert [token for token, _ in drawn.top] == [0, 1]
    assert [x for _, x in drawn.top] == pytest.approx([math.log(0.5), math.log(0.3)], abs=1e-5)
    assert len(told(LOGITS, 2, 20).top) == 4
    assert told(LOGITS, 2, 0).top == ()


def test_probabilities_are_told_as_the_model_has_them() -> None:
    params = SamplingParams(temperature=0, logit_bias=((3, 100.0),), num_logprobs=1)
    drawn = Sampler(params).draw(LOGITS)
    assert (drawn.token, drawn.top[0][0]) == (3, 0)
    assert drawn.logprob == pytest.approx(math.log(0.05), abs=1e-5)
    assert Sampler(SamplingParams(temperature=0)).draw(LOGITS) == Drawn(0)
