"""One step's documents and questions, put together from the pool."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from titans.state import Parts
from titans.training.config import Stage, TrainingConfig
from titans.training.pool import Pool, Question


@dataclass(frozen=True)
class Rows:
    """Short runs of tokens for the layers above the memory, right-padded, each after the end of a text."""

    hidden: Tensor  # [R, S, D]
    targets: Tensor  # [R, S]: the next token, -100 where it does not count
    is_answer: Tensor  # [R, S]: True where only the document can tell the target
    document_of: Tensor  # [R]: whose memory is asked
    keys: Tensor  # [R, U, G, W, E]: of the text before, in the layers above
    values: Tensor  # [R, U, G, W, E]
    recent: Tensor  # [R, conv_width - 1, D]: the memory's inputs before the row
    position: Tensor  # [R]: tokens before the row

    def parts(self) -> list[Parts]:
        """What the layers above the memory carry: views."""
        layers = zip(self.keys.unbind(1), self.values.unbind(1), strict=True)
        return [{"keys": keys, "values": values} for keys, values in layers]

    def to(self, device: torch.device) -> "Rows":
        """The same on another device."""
        return Rows(*(x.to(device) for x in vars(self).values()))


@dataclass(frozen=True)
class Recalls:
    """All that the documents stated, as stated and as asked, each with three tokens of context."""

    stated: Tensor  # [F, S + 3, D]: the answers' tokens where a document states them
    asking: Tensor  # [F, S + 3, D]: the tokens after which each of them is the answer
    answers: Tensor  # [F, S]: the answers
    document_of: Tensor  # [F]

    def to(self, device: torch.device) -> "Recalls":
        """The same on another device."""
        return Recalls(*(x.to(device) for x in vars(self).values()))


@dataclass(frozen=True)
class Batch:
    """What one step learns from."""

    documents: Tensor  # [B, T, D]
    recalls: Recalls
    rows: Rows | None  # None: the layers above the memory take no part

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        rows = self.rows.to(device) if self.rows else None
        return Batch(self.documents.to(device), self.recalls.to(device), rows)


def make_batch(pool: Pool, config: TrainingConfig, stage: Stage, step: int, *, held_out: bool = False) -> Batch:
    """The batch of a step: a function of the seed and the step alone, so that a resumed run goes on as it was.

    `held_out`: of the facts that training keeps aside.
    """
    rng = random.Random(f"{config.seed}/{step}")
    known = len(pool.statements) - config.held_out_facts
    chosen = range(known, len(pool.statements)) if held_out else range(known)
    documents, rows, owners = [], [], []
    planted: list[tuple[int, int]] = []
    questions_each = -(-stage.num_questions // stage.num_documents)
    for i in range(stage.num_documents):
        runs = choose(chosen, rng.randint(1, stage.max_facts), rng)
        facts = [fact for run in runs for fact in run]
        documents.append(_document(pool, stage.num_tokens, runs, rng))
        planted += [(fact, i) for fact in facts]
        for fact in rng.sample(facts, min(questions_each, len(facts))):
            rows.append(pool.questions[fact])
            owners.append(i)
    for _ in range(config.text_rows if rows else 0):
        rows.append(pool.text_row(rng))
        owners.append(rng.randrange(stage.num_documents))
    recalls = make_recalls(pool, planted)
    return Batch(torch.stack(documents), recalls, _rows(pool, rows, owners) if rows else None)


def choose(facts: range, count: int, rng: random.Random) -> list[list[int]]:
    """`count` different facts, in runs; half of the runs are of neighbours in the pool, which are easily confused."""
    left = dict.fromkeys(facts)
    runs: list[list[int]] = []
    while count:
        start = rng.choice(facts)
        size = min(count, rng.choice((1, 1, 2, 4)))
        run = [fact for fact in range(start, start + size) if fact in left]
        for fact in run:
            del left[fact]
        if run:
            runs.append(run)
            count -= len(run)
    return runs


def _document(pool: Pool, num_tokens: int, runs: list[list[int]], rng: random.Random) -> Tensor:
    """Haystack from a random place with the facts' statements at random places: exactly `num_tokens`.

    Half of the runs of facts stand together.
    """
    groups = [part for run in runs for part in ([run] if rng.random() < 0.5 else [[fact] for fact in run])]
    stated = [torch.cat([pool.statements[fact].hidden for fact in group]) for group in groups]
    plain = num_tokens - sum(len(part) for part in stated)
    flat = pool.haystack.flatten(0, 1)
    start = rng.randrange(flat.shape[0] - plain + 1)
    hay = flat[start : start + plain]
    cuts = sorted(rng.randrange(plain + 1) for _ in stated)
    rng.shuffle(stated)
    pieces = []
    for before, cut, part in zip([0, *cuts], cuts, stated, strict=False):
        pieces += [hay[before:cut], part]
    return torch.cat([*pieces, hay[cuts[-1] :]])


def _rows(pool: Pool, rows: list[Question], owners: list[int]) -> Rows:
    answers = []
    for row in rows:
        answers.append(torch.zeros(len(row.targets), dtype=torch.bool))
        if row.answer:
            answers[-1][-row.answer - 1 : -1] = True
    tails = torch.tensor([row.tail for row in rows])
    return Rows(
        hidden=pad_sequence([row.hidden for row in rows], batch_first=True),
        targets=pad_sequence([row.targets for row in rows], batch_first=True, padding_value=-100),
        is_answer=pad_sequence(answers, batch_first=True),
        document_of=torch.tensor(owners),
        keys=pool.tails.keys[tails],
        values=pool.tails.values[tails],
        recent=pool.tails.recent[tails],
        position=pool.tails.position[tails],
    )


def make_recalls(pool: Pool, planted: list[tuple[int, int]]) -> Recalls:
    """Facts, each with its document, as they are stated and as they are asked for.

    A statement ends with its answer's tokens but for the line's end; so does a question's row.
    """
    stated, asking, answers = [], [], []
    for fact, _ in planted:
        statement, question = pool.statements[fact], pool.questions[fact]
        size = question.answer - 1 + 3
        stated.append(statement.hidden[statement.length - size : statement.length])
        asking.append(question.hidden[-size - 2 : -2])
        answers.append(question.targets[-question.answer - 1 : -2])
    owners = torch.tensor([owner for _, owner in planted])
    return Recalls(torch.stack(stated), torch.stack(asking), torch.stack(answers), owners)
