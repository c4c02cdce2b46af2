"""One step's documents and questions, put together from the pool."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from titans.training.config import Stage, TrainingConfig
from titans.training.pool import Pool, Row


@dataclass(frozen=True)
class Rows:
    """Short runs of tokens for the layers above the memory, right-padded."""

    hidden: Tensor  # [R, S, D]
    targets: Tensor  # [R, S]: the next token, -100 where it does not count
    asks: Tensor  # [R, S, 1]: 1 where a token asks the memory
    is_answer: Tensor  # [R, S]: True where only the document can tell the target
    document_of: Tensor  # [R]: whose memory is asked

    def to(self, device: torch.device) -> "Rows":
        """The same on another device."""
        return Rows(*(x.to(device) for x in vars(self).values()))


@dataclass(frozen=True)
class Recalls:
    """All that the documents stated, as stated and as asked, each with three tokens of context."""

    stated: Tensor  # [F, S + 3, D]: the answers' tokens where a document states them
    asking: Tensor  # [F, S + 3, D]: the tokens after which each of them is the answer
    document_of: Tensor  # [F]

    def to(self, device: torch.device) -> "Recalls":
        """The same on another device."""
        return Recalls(*(x.to(device) for x in vars(self).values()))


@dataclass(frozen=True)
class Batch:
    """What one step learns from."""

    documents: Tensor  # [B, T, D]
    rows: Rows
    recalls: Recalls

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        return Batch(self.documents.to(device), self.rows.to(device), self.recalls.to(device))


def make_batch(pool: Pool, config: TrainingConfig, stage: Stage, step: int) -> Batch:
    """The batch of a step: a function of the seed and the step alone, so that a resumed run goes on as it was."""
    rng = random.Random(f"{config.seed}/{step}")
    documents, rows, owners = [], [], []
    planted: list[tuple[int, int]] = []
    questions_each = -(-config.num_questions // stage.num_documents)
    for i in range(stage.num_documents):
        facts = rng.sample(range(len(pool.statements)), rng.randint(1, stage.max_facts))
        documents.append(_document(pool, stage.num_tokens, facts, rng))
        planted += [(fact, i) for fact in facts]
        for fact in rng.sample(facts, min(questions_each, len(facts))):
            rows.append(pool.questions[fact])
            owners.append(i)
    for _ in range(config.text_rows):
        rows.append(pool.text_row(rng, config.context_tokens))
        owners.append(rng.randrange(stage.num_documents))
    return Batch(torch.stack(documents), _rows(rows, owners), make_recalls(pool, planted))


def _document(pool: Pool, num_tokens: int, facts: list[int], rng: random.Random) -> Tensor:
    """Haystack from a random place with the facts' statements at random places: exactly `num_tokens`."""
    plain = num_tokens - sum(len(pool.statements[fact]) for fact in facts)
    flat = pool.haystack.flatten(0, 1)
    start = rng.randrange(flat.shape[0] - plain + 1)
    hay = flat[start : start + plain]
    cuts = sorted(rng.randrange(plain + 1) for _ in facts)
    pieces = []
    for before, cut, fact in zip([0, *cuts], cuts, facts, strict=False):
        pieces += [hay[before:cut], pool.statements[fact]]
    return torch.cat([*pieces, hay[cuts[-1] :]])


def _rows(rows: list[Row], owners: list[int]) -> Rows:
    asks, answers = [], []
    for row in rows:
        asks.append(torch.ones(len(row.targets), 1))
        asks[-1][: row.context] = 0.0
        answers.append(torch.zeros(len(row.targets), dtype=torch.bool))
        if row.answer:
            answers[-1][-row.answer - 1 : -1] = True
    return Rows(
        hidden=pad_sequence([row.hidden for row in rows], batch_first=True),
        targets=pad_sequence([row.targets for row in rows], batch_first=True, padding_value=-100),
        asks=pad_sequence(asks, batch_first=True),
        is_answer=pad_sequence(answers, batch_first=True),
        document_of=torch.tensor(owners),
    )


def make_recalls(pool: Pool, planted: list[tuple[int, int]]) -> Recalls:
    """Facts, each with its document, as they are stated and as they are asked for.

    A statement ends with its answer's tokens but for the line's end; so does a question's row.
    """
    stated, asking = [], []
    for fact, _ in planted:
        row = pool.questions[fact]
        size = row.answer - 1 + 3
        stated.append(pool.statements[fact][-size:])
        asking.append(row.hidden[-size - 2 : -2])
    return Recalls(torch.stack(stated), torch.stack(asking), torch.tensor([owner for _, owner in planted]))
