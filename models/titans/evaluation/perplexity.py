"""Nats per token of a long text read as one stream: with the memory, without it, and with full attention instead.

And by the body as it was before a memory's training adapted some of its norms, by window and by full attention.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from titans.evaluation.haystack import Haystack
from titans.evaluation.local import LocalReader, widen, window_for
from titans.evaluation.names import met_again
from titans.evaluation.task import EvaluationError
from titans.model import TitansModel
from titans.state import Stream

Advance = Callable[[int], object]  # is told of tokens as they are read

LONGEST_IN_FULL = 8_192  # tokens that full attention is given: its cost grows with their square


class Perplexity(NamedTuple):
    """Nats per token, by condition: memory, off, and full up to 8K; body and body_full where one was given."""

    nats: dict[str, float]  # of all tokens
    names: dict[str, float]  # of those of names that were said before, but not within the window; none: empty
    num_names: int  # how many tokens these are


def perplexity(
    reader: LocalReader, book: Haystack, num_tokens: int, advance: Advance, body: TitansModel | None = None
) -> Perplexity:
    """Of the book's first `num_tokens` tokens. `body`: the same model, its body as it was (`load`, not `adapted`).

    The tokens of the first window do not count: all see the same of them. Raises EvaluationError.
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
    if body is not None:
        streams["body"] = (body, body.open(body.new_state(), recall=False))
    if num_tokens <= LONGEST_IN_FULL:
        for name, each in {"full": model, "body_full": body}.items():
            if each is not None:
                wide = widen(each, window_for(num_tokens))
                streams[name] = (wide, wide.open(wide.new_state(), recall=False))
    losses = {name: _losses(*way, tokens_1T, window, advance) for name, way in streams.items()}
    places = met_again(tokens_1T[0].tolist(), reader.tokenizer, window)  # so all of them are after the first window
    names = {name: float(each[[place - window - 1 for place in places]].mean()) for name, each in losses.items()}
    return Perplexity({name: float(each.mean()) for name, each in losses.items()}, names if places else {}, len(places))


@torch.no_grad()
def _losses(model: TitansModel, stream: Stream, tokens_1T: Tensor, window: int, advance: Advance) -> Tensor:
    """Of each token after the first `window` + 1, in nats; they are read a block of `window` tokens at a time."""
    losses = []
    for start in range(0, tokens_1T.shape[1] - 1, window):
        block_1T = tokens_1T[:, start : min(start + window, tokens_1T.shape[1] - 1)]
        h_1TD, stream = model(block_1T, stream)
        if start >= window:
            targets_T = tokens_1T[0, start + 1 : start + 1 + block_1T.shape[1]]
            losses.append(F.cross_entropy(model.logits(h_1TD[0]), targets_T, reduction="none").double())
        advance(block_1T.shape[1])
    return torch.cat(losses)
