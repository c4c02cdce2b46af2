"""Greedy answers to many prompts at once."""

from collections.abc import Sequence

import torch

from titans.model import TitansModel
from titans.state import Stream
from titans.tokenizer import Tokenizer


@torch.no_grad()
def generate(
    model: TitansModel,
    tokenizer: Tokenizer,
    stream: Stream,
    prompts: Sequence[str],
    *,
    max_tokens: int = 32,
    stop: str = "\n",
) -> list[str]:
    """What the model says after each prompt, up to and without `stop`. `stream` has a row for each; it is used up."""
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    lengths = [len(row) for row in rows]
    tokens_BT = torch.tensor([row + [0] * (max(lengths) - len(row)) for row in rows], device=model.device)
    h_BTD, stream = model(tokens_BT, stream, lengths)
    last_BD = h_BTD[torch.arange(len(rows)), torch.tensor(lengths) - 1]
    answers: list[list[int]] = [[] for _ in rows]
    texts: dict[int, str] = {}  # of the rows that have ended
    while True:
        next_B = model.logits(last_BD).argmax(-1)
        for i, token in enumerate(next_B.tolist()):
            if i not in texts:
                answers[i].append(token)
                text, found, _ = tokenizer.decode(answers[i]).partition(stop)
                if found or token in tokenizer.ends or len(answers[i]) == max_tokens:
                    texts[i] = text
        if len(texts) == len(rows):
            return [texts[i] for i in range(len(rows))]
        h_BTD, stream = model(next_B[:, None], stream)
        last_BD = h_BTD[:, 0]
