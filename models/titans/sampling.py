"""From scores to a token."""

from dataclasses import dataclass

import torch
from torch import Tensor

_COLDEST = 1e-6  # of temperatures that are not 0: below it float32 has no quotients


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. Ranges are not checked here."""

    temperature: float = 1.0  # 0: the likeliest token; never negative
    top_p: float = 1.0  # the smallest set of tokens whose probabilities reach this; above 0
    top_k: int = 0  # the k likeliest; 0: all
    seed: int | None = None  # 64 bits; None: one that nobody knows


class Sampler:
    """Draws one sequence's tokens; with a seed, the same tokens from the same scores."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def sample(self, logits: Tensor) -> int:
        """A token from [N] finite scores, float32, on the CPU."""
        params = self.params
        if params.temperature == 0:
            return int(logits.argmax())
        coldest = max(params.temperature, _COLDEST)
        scores, order = ((logits - logits.max()) / coldest).sort(descending=True)  # at most 0: no quotient overflows up
        if params.top_k:
            scores = scores[: params.top_k]
        probabilities = scores.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= params.top_p, 0.0)  # the first always stays
        return int(order[torch.multinomial(probabilities, 1, generator=self._generator)])
