"""The kernel that picks tokens against torch: the same one of the same scores by the same chance."""

from random import Random
from typing import Any

import pytest
import torch
from titans.native import build
from titans.native.matrix import Team
from titans.native.sampling import NativePick
from titans.sampling import Choice, Sampler, SamplingParams, biased, draw_each, pick

pytestmark = pytest.mark.skipif(build.library() is None, reason="no kernels for this machine, or no compiler")

_KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.3},
    {"temperature": 1e-9},
    {"temperature": 5.0},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 1e-50},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 1 << 70},
    {"top_k": 700, "top_p": 0.9},
    {"top_k": 40, "temperature": 0.01},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 1e-60, "top_p": 0.5},
    {"min_p": 0.01, "top_k": 5, "top_p": 0.7, "temperature": 1.5},
]


def choices_of(kind: dict[str, Any], size: int, count: int) -> list[Choice]:
    random = Random(size)
    changes = [(random.randrange(size), random.gauss(0, 5)) for _ in range(9)]  # some of them, in a small one, twice
    return [Choice(SamplingParams(**kind), changes[: i % 10], random.random()) for i in range(count)]


@pytest.mark.parametrize("kind", _KINDS, ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.1, 4.0, 1e30])
@pytest.mark.parametrize("size", [1, 5, 16, 1_023, 1_024, 20_001])
def test_a_token_is_the_one_that_torch_picks(kind: dict[str, Any], spread: float, size: int) -> None:
    torch.manual_seed(size)
    choices = choices_of(kind, size, 11)
    scores_BN = torch.randn(11, size) * spread
    before_BN = scores_BN.clone()
    picked = NativePick(Team(2))(scores_BN, choices)
    assert scores_BN.equal(before_BN)
    for scores_N, choice, token in zip(scores_BN, choices, picked, strict=True):
        expected, changed_N = pick(scores_N, choice), biased(scores_N, choice.changes)
        # tokens that float32 finds equally likely come in any order
        assert token == expected or changed_N[token].item() == pytest.approx(changed_N[expected].item(), abs=1e-6)


@pytest.mark.parametrize("kind", _KINDS, ids=str)
def test_of_scores_that_are_none_some_token_is_picked(kind: dict[str, Any]) -> None:
    picked = NativePick(Team(2))(torch.full((3, 1_023), torch.nan), choices_of(kind, 1_023, 3))
    assert all(0 <= token < 1_023 for token in picked)


@pytest.mark.parametrize("kind", [{}, {"top_p": 0.75}, {"top_k": 3}, {"min_p": 0.2}], ids=str)
def test_chance_from_one_end_to_the_other_picks_what_torch_picks(kind: dict[str, Any]) -> None:
    scores_N = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    chances = [0.0, *((i + 0.5) / 64 for i in range(64)), 1 - 2**-53]
    choices = [Choice(SamplingParams(**kind), [], chance) for chance in chances]
    picked = NativePick(Team(2))(scores_N.expand(len(choices), -1), choices)
    assert picked == [pick(scores_N, choice) for choice in choices]
    assert len(set(picked)) > 1


def test_of_the_likeliest_the_first_is_picked() -> None:
    scores_N = torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0])
    assert NativePick(Team(2))(scores_N[None], [Choice(SamplingParams(temperature=0), [], 0.0)]) == [1]


@pytest.mark.parametrize("token", [-1, 5, 1 << 40])
def test_a_change_of_what_is_not_in_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(AssertionError):
        NativePick(Team(2))(torch.zeros(1, 5), [Choice(SamplingParams(), [(token, 1.0)], 0.5)])


def test_answers_of_many_tokens_are_those_that_torch_draws() -> None:
    kinds: list[dict[str, Any]] = [{}, {"frequency_penalty": 1.5, "presence_penalty": 0.5}, {"num_logprobs": 2}]
    ours, theirs = ([Sampler(SamplingParams(seed=i, **kind)) for i, kind in enumerate(kinds)] for _ in range(2))
    chance, native = torch.Generator().manual_seed(0), NativePick(Team(2))
    for _ in range(60):
        scores_BN = 3 * torch.randn(3, 50, generator=chance)
        assert draw_each(ours, scores_BN, native) == draw_each(theirs, scores_BN)
