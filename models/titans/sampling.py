"""From scores to a token.

Scores pass bias and penalties, then the temperature, then what cuts unlikely tokens off; one of the rest is drawn.
On a GPU sequences that want none of that but the temperature are drawn together: their tokens leave it, and not the
vocabulary for each.

Shapes: B sequences · N vocabulary · K tokens that may be drawn. Scores are float32.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

_FEW = 512  # tokens that usually hold all the probability that top_p asks for
COLDEST = 1e-6  # of temperatures that are not 0: below it float32 has no quotients


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. Ranges are not checked here."""

    temperature: float = 1.0  # 0: the likeliest token; never negative
    top_p: float = 1.0  # the smallest set of tokens whose probabilities reach this; above 0
    top_k: int = 0  # the k likeliest; 0: all
    seed: int | None = None  # 64 bits; None: one that nobody knows
    min_p: float = 0.0  # tokens at least this share as likely as the likeliest, 0 to 1
    presence_penalty: float = 0.0  # off the score of a token that has been drawn
    frequency_penalty: float = 0.0  # off it for each time that it has been
    logit_bias: tuple[tuple[int, float], ...] = ()  # token and what is added to its score
    num_logprobs: int | None = None  # how many of the likeliest tokens to tell of; None: tell of no probability at all


@dataclass(frozen=True)
class Drawn:
    """A token, and how likely the model found it: before bias, penalties and temperature."""

    token: int
    logprob: float | None = None  # natural logarithm; None where SamplingParams asks for none
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens with theirs, the first one first


class Choice(NamedTuple):
    """What decides a sequence's next token, beside its scores."""

    params: SamplingParams
    changes: list[tuple[int, float]]  # tokens, in the vocabulary, and what is added to their scores
    chance: float  # where among the probabilities it falls: 0 to 1, not 1 itself


# tokens of [B, N] finite scores on the CPU, which are not changed; `pick` is the reference
Pick = Callable[[Tensor, Sequence[Choice]], list[int]]


class Sampler:
    """Draws one sequence's tokens; with a seed, the same tokens from the same scores."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._counts: Counter[int] = Counter()  # of what has been drawn
        self._random = Random(params.seed)

    @property
    def is_plain(self) -> bool:
        """Whether scores and a temperature are all that it takes."""
        params = self.params
        changed = params.logit_bias or params.presence_penalty or params.frequency_penalty
        cut = params.top_k or params.top_p < 1 or params.min_p
        return not changed and not cut and params.num_logprobs is None

    def draw(self, logits: Tensor) -> Drawn:
        """A token from [N] finite scores on the CPU; it counts for the penalties of the next."""
        return self.take(pick(logits, self.choice()), logits)

    def choice(self) -> Choice:
        """What decides the next token."""
        params = self.params
        penalties = penalties_of(self._counts, params.presence_penalty, params.frequency_penalty)
        return Choice(params, [*params.logit_bias, *penalties], self._random.random() if params.temperature else 0.0)

    def take(self, token: int, logits: Tensor) -> Drawn:
        """The next token, which is certain now; `logits` [N] are what it was picked from."""
        self._counts[token] += 1
        return Drawn(token) if self.params.num_logprobs is None else told(logits, token, self.params.num_logprobs)


def draw_each(samplers: Sequence[Sampler], scores_BN: Tensor, pick_each: Pick | None = None) -> list[Drawn]:
    """The next token of each sequence from its finite scores, wherever these are; to each as if it were alone.

    `pick_each`: in place of `pick`, where the scores are on the CPU.
    """
    if scores_BN.device.type != "cpu":
        return draw_together(samplers, scores_BN)
    choices = [sampler.choice() for sampler in samplers]
    # without kernels one after the other is faster here: each row stays in the cache
    tokens = pick_each(scores_BN, choices) if pick_each else map(pick, scores_BN, choices)
    return [sampler.take(*drawn) for sampler, *drawn in zip(samplers, tokens, scores_BN, strict=True)]


def draw_together(samplers: Sequence[Sampler], scores_BN: Tensor) -> list[Drawn]:
    """The same, at once for all that are plain."""
    alike = [row for row, sampler in enumerate(samplers) if sampler.is_plain]
    tokens = iter(_plain_tokens([samplers[row] for row in alike], _rows(scores_BN, alike)) if alike else [])
    return [
        Drawn(next(tokens)) if sampler.is_plain else sampler.draw(scores.cpu())
        for sampler, scores in zip(samplers, scores_BN, strict=True)
    ]


def _plain_tokens(samplers: Sequence[Sampler], scores_BN: Tensor) -> list[int]:
    tokens_B = scores_BN.argmax(-1)
    warm = [row for row, sampler in enumerate(samplers) if sampler.params.temperature]
    if warm:
        temperatures = torch.tensor([[samplers[row].params.temperature] for row in warm]).clamp(min=COLDEST)
        probabilities = _tempered(_rows(scores_BN, warm), temperatures.to(scores_BN.device)).softmax(-1)
        chances = torch.tensor([samplers[row].choice().chance for row in warm], dtype=torch.float64)
        tokens_B[torch.tensor(warm, device=tokens_B.device)] = _fall(probabilities, chances.to(scores_BN.device))
    return tokens_B.tolist()


def _rows(scores_BN: Tensor, rows: list[int]) -> Tensor:
    return scores_BN if len(rows) == len(scores_BN) else scores_BN[torch.tensor(rows, device=scores_BN.device)]


def _tempered(scores: Tensor, temperature: float | Tensor) -> Tensor:
    return (scores - scores.amax(-1, keepdim=True)) / temperature  # at most 0: no quotient overflows up


def _fall(probabilities_BK: Tensor, chance_B: Tensor) -> Tensor:
    """Where in what the K of a row add up to, which need not be 1, its chance falls: [B]."""
    reached_BK = probabilities_BK.double().cumsum(-1)
    drawn_B1 = chance_B[:, None] * reached_BK[:, -1:]
    return torch.searchsorted(reached_BK, drawn_B1, right=True)[:, 0].clamp(max=reached_BK.shape[1] - 1)


def pick(logits: Tensor, choice: Choice) -> int:
    """A token of [N] finite scores on the CPU, which are not changed."""
    scores, params = biased(logits, choice.changes), choice.params
    if params.temperature == 0:
        return int(scores.argmax())
    tokens, probabilities = candidates(scores, params)
    chance = torch.tensor([choice.chance], dtype=torch.float64)
    return int(tokens[_fall(probabilities[None], chance)[0]])


def biased(logits: Tensor, changes: Sequence[tuple[int, float]]) -> Tensor:
    """Scores [N] with what is added to the tokens'; each is in the vocabulary. `logits` is not changed."""
    if not changes:
        return logits
    tokens, values = zip(*changes, strict=True)
    return logits.index_add(0, torch.tensor(tokens), torch.tensor(values, dtype=logits.dtype))


def penalties_of(counts: Mapping[int, int], presence: float, frequency: float) -> list[tuple[int, float]]:
    """OpenAI's penalties: a token drawn c > 0 times loses presence + c * frequency."""
    if not presence and not frequency:
        return []
    return [(token, -presence - count * frequency) for token, count in counts.items()]


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Tokens [K] that may be drawn, and their probabilities [K], which need not add up to 1.

    The temperature comes first and is not 0; then top_k and min_p, then top_p of what they leave. The likeliest stays.
    Where something cuts, the likeliest comes first; else they are in the vocabulary's order: sorting one takes longer
    than a layer of the model.
    """
    scores = _tempered(logits, max(params.temperature, COLDEST))
    num_left = min(params.top_k or len(scores), len(scores))
    if params.min_p:
        num_near = int((scores >= math.log(params.min_p)).sum())
        num_left = min(num_left, max(1, num_near))  # of NaN none is near: who is drawn with them is not to fail for it
    if params.min_p or num_left < len(scores):
        scores, tokens = scores.topk(num_left)
        return _cut(tokens, scores.softmax(-1), params.top_p)
    if params.top_p < 1:
        return _reaching(scores.softmax(-1), params.top_p)
    return torch.arange(len(scores)), scores.softmax(-1)


def _reaching(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The smallest set of tokens whose probabilities reach `top_p`: looked for among a few, and then among all."""
    likeliest, tokens = probabilities.topk(min(_FEW, len(probabilities)))
    if likeliest.sum() < top_p:
        likeliest, tokens = probabilities.sort(descending=True)
    return _cut(tokens, likeliest, top_p)


def _cut(tokens: Tensor, probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The first of them, up to where they reach `top_p`; one at least, though float32 may take that for 0."""
    before = probabilities.double().cumsum(-1) - probabilities
    num_left = max(1, int((before < top_p).sum()))
    return tokens[:num_left], probabilities[:num_left]


def told(logits: Tensor, token: int, num_top: int) -> Drawn:
    """A token with its logarithm of the probability under scores [N], and the `num_top` likeliest with theirs."""
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(min(num_top, len(logprobs)))
    return Drawn(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
