"""Nats per token of a long text read as one stream: with the memory, without it, and with full attention instead."""

from collections.abc import Callable

import torch
from torch import Tensor

from titans.evaluation.haystack import Haystack
from titans.evaluation.local import LocalReader, widen, window_for
from titans.evaluation.task import EvaluationError
from titans.model import TitansModel, next_token_loss
from titans.state import Stream

Advance = Callable[[int], object]  # is told of tokens as they are read

LONGEST_IN_FULL = 8_192  # tokens that full attention is given: its cost grows with their square


def perplexity(reader: LocalReader, book: Haystack, num_tokens: int, advance: Advance) -> dict[str, float]:
    """Nats per token of the book's first `num_tokens` tokens, by condition: memory, off, and full up to 8K.

    The tokens of the first window do not count: all three see the same of them. Raises EvaluationError.
    """
    model, window = reader.titans, reader.titans.config.window
    text = book.text[: int(1.2 * num_tokens * book.characters_per_token)]  # tokens are estimated: a few more
    tokens_1T = torch.tensor([reader.tokenizer.encode(text)[:num_tokens]], device=model.device)
    if tokens_1T.shape[1] < num_tokens:
        raise EvaluationError(f"perplexity cannot repeat a text to fill {num_tokens:,} tokens: {tokens_1T.shape[1]:,}")
    if num_tokens <= window + 1:
        raise EvaluationError(f"perplexity needs more tokens than the window of {window:,}")
    streams = {
        "memory": (model, model.open(model.new_state(), write=True)),
        "off": (model, model.open(model.new_state(), recall=False)),
    }
    if num_tokens <= LONGEST_IN_FULL:
        wide = widen(model, window_for(num_tokens))
        streams["full"] = (wide, wide.open(wide.new_state(), recall=False))
    return {name: _nats(*way, tokens_1T, window, advance) for name, way in streams.items()}


@torch.no_grad()
def _nats(model: TitansModel, stream: Stream, tokens_1T: Tensor, window: int, advance: Advance) -> float:
    """Mean over the tokens after the first `window`; a block of `window` tokens at a time."""
    total = 0.0
    for start in range(0, tokens_1T.shape[1] - 1, window):
        block_1T = tokens_1T[:, start : min(start + window, tokens_1T.shape[1] - 1)]
        h_1TD, stream = model(block_1T, stream)
        if start >= window:
            targets_1T = tokens_1T[:, start + 1 : start + 1 + block_1T.shape[1]]
            total += float(next_token_loss(model.logits(h_1TD), targets_1T)) * block_1T.shape[1]
        advance(block_1T.shape[1])
    return total / (tokens_1T.shape[1] - 1 - window)
