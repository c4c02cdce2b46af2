"""From scores to a token.

Scores pass bias and penalties, then the temperature, then what cuts unlikely tokens off; one of the rest is drawn.
On a GPU sequences that want none of that but the temperature are drawn together: their tokens leave it, and not the
vocabulary for each.

Shapes: B sequences · N vocabulary · K tokens that may be drawn. Scores are float32.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FEW = 512  # tokens that usually hold all the probability that top_p asks for
_COLDEST = 1e-6  # of temperatures that are not 0: below it float32 has no quotients


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


class Sampler:
    """Draws one sequence's tokens; with a seed, the same tokens from the same scores."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._counts: Counter[int] = Counter()  # of what has been drawn
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    @property
    def is_plain(self) -> bool:
        """Whether scores and a temperature are all that it takes."""
        params = self.params
        changed = params.logit_bias or params.presence_penalty or params.frequency_penalty
        cut = params.top_k or params.top_p < 1 or params.min_p
        return not changed and not cut and params.num_logprobs is None

    def sample(self, logits: Tensor) -> int:
        """A token from [N] finite scores on the CPU, and no more than it."""
        return self.draw(logits).token

    def draw(self, logits: Tensor) -> Drawn:
        """A token from [N] finite scores on the CPU; it counts for the penalties of the next."""
        params = self.params
        scores = biased(logits, params.logit_bias)
        scores = penalized(scores, self._counts, params.presence_penalty, params.frequency_penalty)
        token = self._choose(scores)
        self._counts[token] += 1
        return Drawn(token) if params.num_logprobs is None else told(logits, token, params.num_logprobs)

    def _choose(self, scores: Tensor) -> int:
        if self.params.temperature == 0:
            return int(scores.argmax())
        tokens, probabilities = candidates(scores, self.params)
        return int(tokens[_pick(probabilities[None], self.chance())[0]])

    def chance(self) -> Tensor:
        """What decides the next token: [1] between 0 and 1, float64."""
        return torch.rand(1, dtype=torch.float64, generator=self._generator)


def draw_each(samplers: Sequence[Sampler], scores_BN: Tensor) -> list[Drawn]:
    """The next token of each sequence from its finite scores, wherever these are; to each as if it were alone."""
    if scores_BN.device.type != "cpu":
        return draw_together(samplers, scores_BN)
    # one after the other is faster here: each row stays in the cache
    return [sampler.draw(scores) for sampler, scores in zip(samplers, scores_BN, strict=True)]


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
        temperatures = torch.tensor([[samplers[row].params.temperature] for row in warm]).clamp(min=_COLDEST)
        probabilities = _tempered(_rows(scores_BN, warm), temperatures.to(scores_BN.device)).softmax(-1)
        chances = torch.cat([samplers[row].chance() for row in warm])
        tokens_B[torch.tensor(warm, device=tokens_B.device)] = _pick(probabilities, chances.to(scores_BN.device))
    return tokens_B.tolist()


def _rows(scores_BN: Tensor, rows: list[int]) -> Tensor:
    return scores_BN if len(rows) == len(scores_BN) else scores_BN[torch.tensor(rows, device=scores_BN.device)]


def _tempered(scores: Tensor, temperature: float | Tensor) -> Tensor:
    return (scores - scores.amax(-1, keepdim=True)) / temperature  # at most 0: no quotient overflows up


def _pick(probabilities_BK: Tensor, chance_B: Tensor) -> Tensor:
    """Which of the K each row draws, [B], where its chance falls in what they add up to, which need not be 1."""
    reached_BK = probabilities_BK.double().cumsum(-1)
    drawn_B1 = chance_B[:, None] * reached_BK[:, -1:]
    return torch.searchsorted(reached_BK, drawn_B1, right=True)[:, 0].clamp(max=reached_BK.shape[1] - 1)


def biased(logits: Tensor, bias: Iterable[tuple[int, float]]) -> Tensor:
    """Scores [N] with the tokens' biases added; each is in the vocabulary. `logits` is not changed."""
    tokens_and_values = list(bias)
    if not tokens_and_values:
        return logits
    tokens, values = zip(*tokens_and_values, strict=True)
    return logits.index_add(0, torch.tensor(tokens), torch.tensor(values, dtype=logits.dtype))


def penalized(logits: Tensor, counts: Mapping[int, int], presence: float, frequency: float) -> Tensor:
    """OpenAI's penalties: a token drawn c > 0 times loses presence + c * frequency. `logits` is not changed."""
    if not presence and not frequency:
        return logits
    return biased(logits, [(token, -presence - count * frequency) for token, count in counts.items()])


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Tokens [K] that may be drawn, and their probabilities [K], which need not add up to 1.

    The temperature comes first and is not 0; then top_k and min_p, then top_p of what they leave. The likeliest stays.
    Where something cuts, the likeliest comes first; else they are in the vocabulary's order: sorting one takes longer
    than a layer of the model.
    """
    scores = _tempered(logits, max(params.temperature, _COLDEST))
    num_left = min(params.top_k or len(scores), len(scores))
    if params.min_p:
        num_left = min(num_left, int((scores >= math.log(params.min_p)).sum()))
    if num_left < len(scores):
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
    num_left = max(1, int((probabilities.cumsum(-1) - probabilities < top_p).sum()))
    return tokens[:num_left], probabilities[:num_left]


def told(logits: Tensor, token: int, num_top: int) -> Drawn:
    """A token with its logarithm of the probability under scores [N], and the `num_top` likeliest with theirs."""
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(min(num_top, len(logprobs)))
    return Drawn(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
