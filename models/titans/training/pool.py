"""Cached hidden states: what the layers below the memory make of the texts, computed once.

Nothing below the memory depends on it. So a training document is put together from states that are there
already, and a step runs the memory and the layers above it, over the questions alone.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from titans.evaluation.facts import Fact, make_facts
from titans.model import TitansModel
from titans.tokenizer import Tokenizer
from titans.training.config import TrainingConfig


@dataclass(frozen=True)
class Row:
    """A short run of tokens that the layers above the memory train on."""

    hidden: Tensor  # [T, D] where the memory stands
    targets: Tensor  # [T] the next token where it counts, -100 elsewhere
    context: int  # tokens at the start that do not ask the memory
    answer: int = 0  # how many of the last targets only the document can tell


@dataclass(frozen=True)
class Pool:
    """All that training reads."""

    haystack: Tensor  # [texts, tokens, D]
    haystack_tokens: Tensor  # [texts, tokens]
    statements: list[Tensor]  # [T, D] each
    questions: list[Row]  # of the statement with the same index

    def text_row(self, rng: random.Random, context: int, length: int = 48) -> Row:
        """A stretch of plain text, every token of which counts."""
        text = rng.randrange(self.haystack.shape[0])
        start = rng.randrange(self.haystack.shape[1] - context - length - 1)
        stop = start + context + length
        targets = self.haystack_tokens[text, start + 1 : stop + 1].clone()
        targets[:context] = -100
        return Row(self.haystack[text, start:stop], targets, context)


def load_pool(model: TitansModel, tokenizer: Tokenizer, texts: list[Path], config: TrainingConfig, path: Path) -> Pool:
    """The pool at `path`, computed and kept there first if need be."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(_compute(model, tokenizer, texts, config), part)
        part.replace(path)
    fields = torch.load(path, weights_only=True)
    rows = [Row(*row) for row in fields["questions"]]
    return Pool(fields["haystack"], fields["haystack_tokens"], fields["statements"], rows)


def _compute(model: TitansModel, tokenizer: Tokenizer, texts: list[Path], config: TrainingConfig) -> dict[str, object]:
    each = config.haystack_tokens // len(texts) // model.config.window * model.config.window
    tokens = torch.tensor([_take(tokenizer, path, each) for path in texts])
    rng = random.Random(config.seed)
    facts = make_facts(config.num_facts, "train", rng)
    contexts = [_snippet(tokens, config.context_tokens, rng) for _ in facts]
    spacing = [_snippet(tokens, 2 * config.context_tokens, rng) for _ in facts]
    stated = [c + tokenizer.encode(f" {f.statement}") for f, c in zip(facts, spacing, strict=True)]
    asked = [_question(tokenizer, f, c) for f, c in zip(facts, contexts, strict=True)]
    questions = []
    for (_, targets, answer), hidden in zip(asked, _short(model, [q[0] for q in asked], "questions"), strict=True):
        questions.append((hidden, torch.tensor(targets), config.context_tokens, answer))
    return {
        "haystack": _long(model, tokens, "haystack"),
        "haystack_tokens": tokens,
        "statements": [h[2 * config.context_tokens :].clone() for h in _short(model, stated, "statements")],
        "questions": questions,
    }


def _take(tokenizer: Tokenizer, path: Path, count: int) -> list[int]:
    """`count` tokens from the middle of a text."""
    text = path.read_text(encoding="utf-8")
    spare = max(0, len(text) - 6 * count) // 2
    tokens = tokenizer.encode(text[spare:])[:count]
    if len(tokens) < count:
        raise ValueError(f"{path} has {len(tokens)} tokens, {count} are needed: give more or longer texts")
    return tokens


def _snippet(tokens: Tensor, length: int, rng: random.Random) -> list[int]:
    text, start = rng.randrange(tokens.shape[0]), rng.randrange(tokens.shape[1] - length)
    return [int(x) for x in tokens[text, start : start + length]]


def _question(tokenizer: Tokenizer, fact: Fact, context: list[int]) -> tuple[list[int], list[int], int]:
    """Tokens of a question and its answer, the targets, and how many of these the number and the end make up."""
    asked = context + tokenizer.encode(fact.prompt)
    lead, answer = tokenizer.encode(f" {fact.lead}"), tokenizer.encode(f" {fact.value}.\n")
    targets = [-100] * (len(asked) - 1) + lead + answer + [-100]
    return asked + lead + answer, targets, len(answer)


def _long(model: TitansModel, tokens: Tensor, name: str) -> Tensor:
    """[texts, T, D]: the texts read as a server reads them; T is a multiple of the window."""
    state, window, states = model.new_state(tokens.shape[0]), model.config.window, []
    for start in tqdm(range(0, tokens.shape[1], window), desc=name, unit="window"):
        state = model.ingest(tokens[:, start : start + window].to(model.device), state)
        states.append(state.tail.cpu())
    return torch.cat(states, dim=1)


def _short(model: TitansModel, runs: list[list[int]], name: str, streams: int = 10) -> list[Tensor]:
    """[T, D] for each run of tokens, read one after another, so that each stands in a full window of text."""
    each = -(-len(runs) // streams)
    groups = [runs[i : i + each] for i in range(0, len(runs), each)]
    lines = [[token for run in group for token in run] for group in groups]
    length = -(-max(map(len, lines)) // model.config.window) * model.config.window
    hidden = _long(model, torch.tensor([line + [0] * (length - len(line)) for line in lines]), name)
    pieces = []
    for row, group in zip(hidden, groups, strict=True):
        start = 0
        for run in group:
            pieces.append(row[start : start + len(run)].clone())
            start += len(run)
    return pieces
