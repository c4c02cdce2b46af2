"""Generated exact match on text that training never saw: the only score that counts."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from titans.evaluation.facts import Fact, make_facts, plant
from titans.evaluation.generate import generate
from titans.files import read_text
from titans.model import TitansModel
from titans.state import State
from titans.tokenizer import Tokenizer

_SKIPPED = 10_000  # characters: what a book has before it begins


class Scorer:
    """Plants facts of the test split in a text, lets the whole model read it in one stream, and asks."""

    def __init__(self, tokenizer: Tokenizer, text: Path, longest: int, num_facts: int = 10) -> None:
        """Reads the text. `longest`: tokens of a document, at most.

        Raises OSError, ValueError for a text that is not in UTF-8, or too short for that.
        """
        self.tokenizer, self.num_facts = tokenizer, num_facts
        self.plain = tokenizer.encode(read_text(text)[_SKIPPED:])[:longest]
        if (found := len(self.plain)) < longest:
            begun = f"{text} has {found} tokens after its first {_SKIPPED:,} characters"
            raise ValueError(f"{begun}, {longest} are needed: give a longer text to score on")

    def score(self, model: TitansModel, num_tokens: int, *, seed: int = 0, recall: bool = True) -> float:
        """The share of facts answered right from a document of about `num_tokens` tokens."""
        facts = make_facts(self.num_facts, random.Random(seed))
        statements = sum(len(self.tokenizer.encode(fact.statement)) for fact in facts)
        plain = self.plain[: max(64, num_tokens - statements)]
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
