"""Generated exact match on text that training never saw: the only score that counts."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from titans.evaluation.facts import Fact, make_facts, plant
from titans.evaluation.generate import generate
from titans.model import TitansModel
from titans.state import State
from titans.tokenizer import Tokenizer


class Scorer:
    """Plants facts of the test split in a text, lets the whole model read it in one stream, and asks."""

    def __init__(self, tokenizer: Tokenizer, text: Path, num_facts: int = 10) -> None:
        self.tokenizer, self.text, self.num_facts = tokenizer, text, num_facts

    def score(self, model: TitansModel, num_tokens: int, *, seed: int = 0, recall: bool = True) -> float:
        """The share of facts answered right from a document of about `num_tokens` tokens."""
        facts = make_facts(self.num_facts, random.Random(seed))
        text = self.text.read_text(encoding="utf-8")[10_000:]
        statements = sum(len(self.tokenizer.encode(fact.statement)) for fact in facts)
        plain = self.tokenizer.encode(text)[: max(64, num_tokens - statements)]
        document = plant(self.tokenizer.decode(plain), facts)
        tokens = torch.tensor([self.tokenizer.encode(document)], device=model.device)
        return score_facts(model, self.tokenizer, model.ingest(tokens, model.new_state()), facts, recall=recall)


@torch.no_grad()
def score_facts(
    model: TitansModel, tokenizer: Tokenizer, state: State, facts: Sequence[Fact], *, recall: bool = True
) -> float:
    """The share of the facts that greedy answers from `state` get right."""
    stream = model.open(state, recall=recall)
    answers = generate(model, tokenizer, stream.select([0] * len(facts)), [fact.prompt for fact in facts])
    return sum(f.is_answered_by(a) for f, a in zip(facts, answers, strict=True)) / len(facts)
