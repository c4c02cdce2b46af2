"""One step's documents and questions, put together from the pool."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from titans.state import Parts
from titans.training.config import Stage, TrainingConfig
from titans.training.pool import Pool, Question

_ROWS = 12  # that are computed together
_LONGEST = 12  # tokens of a value that one step asks the memory for
LEADING = 6  # tokens before a value, of the line or sentence that states it
_NEAR = 3  # places in the pool between facts that are easily confused
_SHARE = 4  # of a document one part in so many is text that states nothing, at least
_PLAIN = 256  # tokens of a stretch of text


@dataclass(frozen=True)
class Rows:
    """Short runs of tokens for the layers above the memory, right-padded, each after the end of a text."""

    hidden: Tensor  # [R, S, D]
    targets: Tensor  # [R, S]: the next token, -100 where it does not count
    is_answer: Tensor  # [R, S]: True where only the document can tell the target
    is_name: Tensor  # [R, S]: True where the target is of a name that the text said before its window
    document_of: Tensor  # [R]: whose memory is asked
    keys: Tensor  # [R, U, G, W, E]: of the text before, in the layers above
    values: Tensor  # [R, U, G, W, E]
    before: Tensor  # [R, C, D]: the tokens before the row that the convolutions reach
    position: Tensor  # [R]: tokens before the row

    def parts(self) -> list[Parts]:
        """What the layers above the memory carry: copies, for rings are written in place."""
        layers = zip(*(x.transpose(0, 1).contiguous() for x in (self.keys, self.values)), strict=True)
        return [{"keys": keys, "values": values} for keys, values in layers]

    def to(self, device: torch.device) -> "Rows":
        """The same on another device."""
        return Rows(*(x.to(device) for x in vars(self).values()))


@dataclass(frozen=True)
class Recalls:
    """All that the documents stated, as stated and as asked, each after C tokens of context; right-padded.

    Of a long value some tokens that stand together.
    """

    leading: Tensor  # [F, C + L, D]: the last tokens before each value, where a document states it
    replaced: Tensor  # [N, C + S', D]: values that a list told before some of them, of the same
    replaced_counts: Tensor  # [N, S']: True up to their end
    replaced_by: Tensor  # [N]: which of F
    stated: Tensor  # [F, C + S, D]: the values' tokens there
    asking: Tensor  # [F, C + S, D]: the tokens after which each of them is the answer
    answers: Tensor  # [F, S]: the values, -100 past their end
    document_of: Tensor  # [F]

    def to(self, device: torch.device) -> "Recalls":
        """The same on another device."""
        return Recalls(*(x.to(device) for x in vars(self).values()))


@dataclass(frozen=True)
class Batch:
    """What one step learns from."""

    documents: Tensor  # [B, T, D]
    recalls: Recalls
    plain: Tensor  # [B, P, D]: stretches of text that state no fact
    plain_tokens: Tensor  # [B, P]: which tokens they are
    rows: tuple[Rows, ...]  # questions, then plain text; none: the layers above the memory take no part

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        rows = tuple(rows.to(device) for rows in self.rows)
        plain = self.plain.to(device), self.plain_tokens.to(device)
        return Batch(self.documents.to(device), self.recalls.to(device), *plain, rows)


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
        runs = _fitting(pool, choose(chosen, _how_many(stage, rng), rng), stage.num_tokens)
        facts = [fact for run in runs for fact in run]
        documents.append(_document(pool, config, stage.num_tokens, runs, rng))
        planted += [(fact, i) for fact in facts]
        for fact in rng.sample(facts, min(questions_each, len(facts))):
            rows.append(pool.questions[fact])
            owners.append(i)
    for _ in range(round(config.unanswered_share * stage.num_questions)):
        owners.append(rng.randrange(stage.num_documents))
        told = [fact for fact, owner in planted if owner == owners[-1]]
        rows.append(pool.unanswered[_untold(pool, told, chosen, rng)])
    asked = tuple(_by_length(pool, rows, owners, config.context))
    read = (make_text_rows(pool, config, stage.num_documents, rng),) if rows else ()
    recalls = make_recalls(pool, planted, config.context, rng)
    plain = pool.stretches_with_tokens(stage.num_documents, _PLAIN, rng)
    return Batch(torch.stack(documents), recalls, *plain, asked + read)


def _how_many(stage: Stage, rng: random.Random) -> int:
    """Facts of a document. Where it is asked about, few as often as many: what little is known is to be trusted."""
    return round(stage.max_facts ** rng.random()) if stage.num_questions else rng.randint(1, stage.max_facts)


def _untold(pool: Pool, told: list[int], facts: range, rng: random.Random) -> int:
    """A fact that is asked for and is not among those told; half of them are easily confused with one of these."""
    near = [fact + i for fact in told for i in range(-_NEAR, _NEAR + 1)]
    likely = [fact for fact in near if fact in pool.unanswered and fact in facts and fact not in told]
    if likely and rng.random() < 0.5:
        return rng.choice(likely)
    return rng.choice([fact for fact in pool.unanswered if fact in facts and fact not in told])


def choose(facts: range, count: int, rng: random.Random) -> list[list[int]]:
    """`count` different facts, in runs; half of the runs are of neighbours in the pool, which are easily confused."""
    assert count <= len(facts), "more facts are wanted than there are"
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


def _fitting(pool: Pool, runs: list[list[int]], num_tokens: int) -> list[list[int]]:
    """The runs, one at least, whose statements leave a document of so many tokens some text."""
    fitting: list[list[int]] = []
    room = num_tokens * (_SHARE - 1) // _SHARE
    for run in runs:
        room -= sum(len(pool.statements[fact].hidden) for fact in run)
        if room >= 0 or not fitting:
            fitting.append(run)
    return fitting


def _document(pool: Pool, config: TrainingConfig, num_tokens: int, runs: list[list[int]], rng: random.Random) -> Tensor:
    """Haystack from a random place with the facts' statements at random places: exactly `num_tokens`.

    Half of the runs of facts stand together.
    """
    groups = [part for run in runs for part in ([run] if rng.random() < 0.5 else [[fact] for fact in run])]
    stated = [torch.cat([pool.statements[fact].hidden for fact in group]) for group in groups]
    plain = num_tokens - sum(len(part) for part in stated)
    hay = _hay(pool, config.repeating_share, plain, rng)
    cuts = sorted(rng.randrange(plain + 1) for _ in stated)
    rng.shuffle(stated)
    pieces = []
    for before, cut, part in zip([0, *cuts], cuts, stated, strict=False):
        pieces += [hay[before:cut], part]
    return torch.cat([*pieces, hay[cuts[-1] :]])


def _hay(pool: Pool, repeating_share: float, count: int, rng: random.Random) -> Tensor:
    """[count, D] of the texts; with the chance that is given, of a passage over and over and nothing else."""
    size = round(repeating_share * pool.haystack.shape[1])
    if size and rng.random() < repeating_share:
        passages = rng.choice(pool.haystack)[-size:]
        return passages.repeat(-(-count // size), 1)[:count]
    flat = pool.haystack.flatten(0, 1)
    start = rng.randrange(flat.shape[0] - count + 1)
    return flat[start : start + count]


def _by_length(pool: Pool, rows: list[Question], owners: list[int], context: int) -> Iterator[Rows]:
    """The rows with others of about their length, since padding costs what tokens cost."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].targets))
    for start in range(0, len(order), _ROWS):
        some = order[start : start + _ROWS]
        yield _rows(pool, [rows[i] for i in some], [owners[i] for i in some], context)


def _rows(pool: Pool, rows: list[Question], owners: list[int], context: int) -> Rows:
    answers = []
    for row in rows:
        answers.append(torch.zeros(len(row.targets), dtype=torch.bool))
        answers[-1][row.start : row.start + row.answer] = True
    tails = torch.tensor([row.tail for row in rows])
    return Rows(
        hidden=pad_sequence([row.hidden for row in rows], batch_first=True),
        targets=pad_sequence([row.targets for row in rows], batch_first=True, padding_value=-100),
        is_answer=(is_answer := pad_sequence(answers, batch_first=True)),
        is_name=torch.zeros_like(is_answer),
        document_of=torch.tensor(owners),
        keys=pool.tails.keys[tails],
        values=pool.tails.values[tails],
        before=torch.stack([pool.before(row.tail, context) for row in rows]),
        position=pool.tails.position[tails],
    )


def make_text_rows(pool: Pool, config: TrainingConfig, num_documents: int, rng: random.Random) -> Rows:
    """Stretches of the texts, of which all counts but the first window, each read beside what some document stated.

    In each there is a name that the text said before, where it has any: they are few, and what they cost is soon lost
    in the mean.
    """
    num_rows, tails = config.text_rows, pool.tails
    window = tails.keys.shape[3]
    size = window + config.text_tokens
    places = [_text_place(pool, config, window, rng) for _ in range(num_rows)]

    def cut(x: Tensor, shift: int = 0, length: int = size) -> Tensor:
        return torch.stack([x[text, start + shift : start + shift + length] for text, start in places])

    targets, is_name = cut(pool.haystack_tokens, 1), cut(pool.names, 1)
    targets[:, :window], is_name[:, :window] = -100, False
    return Rows(
        hidden=cut(pool.haystack),
        targets=targets,
        is_answer=torch.zeros_like(is_name),
        is_name=is_name,
        document_of=torch.tensor([rng.randrange(num_documents) for _ in places]),
        keys=tails.keys.new_zeros(num_rows, *tails.keys.shape[1:]),
        values=tails.values.new_zeros(num_rows, *tails.values.shape[1:]),
        before=cut(pool.haystack, -config.context, config.context),
        position=torch.zeros(num_rows, dtype=torch.int64),  # nothing is seen of what is before
    )


def _text_place(pool: Pool, config: TrainingConfig, window: int, rng: random.Random) -> tuple[int, int]:
    """Which text, and where a stretch of it begins."""
    last = pool.haystack.shape[1] - window - config.text_tokens - 1
    first = config.context
    named = pool.names[:, first + window + 1 :].nonzero()
    if not len(named):
        return rng.randrange(len(pool.haystack)), rng.randint(first, last)
    text, place = named[rng.randrange(len(named))].tolist()
    return text, min(max(first, first + place - rng.randrange(config.text_tokens)), last)


def make_recalls(pool: Pool, planted: list[tuple[int, int]], context: int, rng: random.Random) -> Recalls:
    """Facts, each with its document, as they are stated, after any text, and as they are asked for."""
    leading, stated, asking, answers, replaced, replaced_by = [], [], [], [], [], []
    for i, (fact, _) in enumerate(planted):
        statement, question = pool.statements[fact], pool.questions[fact]
        size = min(statement.size, _LONGEST)
        skipped = rng.randint(0, statement.size - size)
        start, ask = statement.start + skipped, question.start + skipped
        text, tail = pool.stretches(1, context + LEADING, rng)[0], pool.before(question.tail, context)
        read = torch.cat((text, statement.hidden))
        leading.append(read[statement.start :][: context + LEADING])
        stated.append(read[start + LEADING :][: context + size])
        asking.append(torch.cat((tail, question.hidden))[ask : ask + context + size])
        answers.append(question.targets[ask : ask + size])
        if told_before := pool.replaced.get(fact):
            value = rng.choice(told_before)
            read = torch.cat((text[LEADING:], value.hidden))
            replaced.append(read[value.start :][: context + min(value.size, _LONGEST)])
            replaced_by.append(i)
    counts = [torch.ones(len(read) - context, dtype=torch.bool) for read in replaced]
    if not replaced:
        none = torch.zeros(1, dtype=torch.bool)  # one row, of which nothing counts
        replaced, counts, replaced_by = [leading[0][: context + 1]], [none], [0]
    return Recalls(
        torch.stack(leading),
        pad_sequence(replaced, batch_first=True),
        pad_sequence(counts, batch_first=True),
        torch.tensor(replaced_by),
        pad_sequence(stated, batch_first=True),
        pad_sequence(asking, batch_first=True),
        pad_sequence(answers, batch_first=True, padding_value=-100),
        torch.tensor([owner for _, owner in planted]),
    )
