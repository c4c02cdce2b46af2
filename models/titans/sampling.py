"""From scores to a token."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn."""

    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0  # the smallest set of tokens whose probabilities reach this
    top_k: int = 0  # the k likeliest; 0: all
    seed: int | None = None


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
        """A token from [N] scores, float32, on the CPU."""
        params = self.params
        if params.temperature == 0:
            return int(logits.argmax())
        scores, order = (logits / params.temperature).sort(descending=True)
        if params.top_k:
            scores = scores[: params.top_k]
        probabilities = scores.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= params.top_p, 0.0)  # the first always stays
        return int(order[torch.multinomial(probabilities, 1, generator=self._generator)])
