"""All that training reads: hidden states of texts, and of facts and questions that might stand in them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from titans.model import TitansModel
from titans.state import Stream
from titans.training.saving import save_whole


@dataclass(frozen=True)
class Statement:
    """A fact as a text states it, by itself or among others like it.

    In a list there stands before it what no longer holds, back to the last line that does.
    """

    hidden: Tensor  # [T, D] where the memory stands: the statement and, of the last, a few tokens of the text after it
    start: int  # where the value begins
    size: int  # of the value in tokens, with the full stop where one follows it, and what stands before it for a space


@dataclass(frozen=True)
class Question:
    """A reader's turn: the question and its answer, maybe after what the text says last."""

    hidden: Tensor  # [T, D] where the memory stands
    targets: Tensor  # [T] the next token where it counts, -100 elsewhere
    start: int  # the first target that only the document can tell
    answer: int  # how many there are: the value, a full stop and what ends an answer
    tail: int  # the text it comes after, among the pool's tails


@dataclass(frozen=True)
class Tails:
    """N ends of text: what the layers above the memory see before a question."""

    keys: Tensor  # [N, U, G, W, E]
    values: Tensor  # [N, U, G, W, E]
    text: Tensor  # [N] which text
    position: Tensor  # [N] tokens before


@dataclass(frozen=True)
class Pool:
    """All that training reads."""

    haystack: Tensor  # [texts, tokens, D]
    haystack_tokens: Tensor  # [texts, tokens]
    names: Tensor  # [texts, tokens]: True for those of names that were said before, but not within the window
    statements: list[Statement]  # those that stand together are easily confused
    replaced: dict[int, list[Statement]]  # what the list told of the same thing before, by that index: just the values
    questions: list[Question]  # of the statement with the same index
    unanswered: dict[int, Question]  # as some would be answered by a reader whom nobody has told, by that index
    tails: Tails

    def stretches(self, count: int, length: int, rng: random.Random) -> Tensor:
        """[count, length, D] of the texts."""
        return self.stretches_with_tokens(count, length, rng)[0]

    def stretches_with_tokens(self, count: int, length: int, rng: random.Random) -> tuple[Tensor, Tensor]:
        """The same, and which tokens they are [count, length]."""
        hidden, tokens = self.haystack.flatten(0, 1), self.haystack_tokens.flatten()
        starts = [rng.randrange(len(hidden) - length) for _ in range(count)]
        cut = [torch.stack([x[start : start + length] for start in starts]) for x in (hidden, tokens)]
        return cut[0], cut[1]

    def before(self, tail: int, count: int) -> Tensor:
        """[count, D]: the last tokens of a tail."""
        end = int(self.tails.position[tail])
        return self.haystack[self.tails.text[tail], end - count : end]

    def renewed(self, model: TitansModel) -> "Pool":
        """The same with the tails that the layers above the memory would make now, for these may have been trained."""
        num_texts, tails = len(self.haystack), []
        for end in self.tails.position.unique().tolist():
            hidden = self.haystack[:, end - model.config.window : end].to(model.device)
            position = torch.full((num_texts,), end, device=model.device)
            state = replace(model.new_state(num_texts), position=position, tail=hidden)
            tails.append(tails_of(model.open(state), end))
        return replace(self, tails=joined(tails))


def save_pool(pool: Pool, path: Path) -> None:
    """Keep it at `path`, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_whole(_pack(pool), path)


def load_pool(path: Path) -> Pool:
    """What `save_pool` kept; it is read from the file as it is used. Raises ValueError for one of an earlier recipe."""
    fields = torch.load(path, weights_only=True, mmap=True)
    if "replaced" not in fields:
        raise ValueError(f"{path} is of an earlier recipe: begin another run")
    return Pool(
        fields["haystack"],
        fields["haystack_tokens"],
        fields["names"],
        [Statement(*row) for row in fields["statements"]],
        {i: [Statement(*row) for row in rows] for i, rows in fields["replaced"].items()},
        [Question(*row) for row in fields["questions"]],
        {i: Question(*row) for i, row in fields["unanswered"].items()},
        Tails(**fields["tails"]),
    )


def _pack(pool: Pool) -> dict[str, object]:
    """Plain tensors and tuples, which a file can hold."""
    return {
        "haystack": pool.haystack,
        "haystack_tokens": pool.haystack_tokens,
        "names": pool.names,
        "statements": [tuple(vars(x).values()) for x in pool.statements],
        "replaced": {i: [tuple(vars(x).values()) for x in told] for i, told in pool.replaced.items()},
        "questions": [tuple(vars(x).values()) for x in pool.questions],
        "unanswered": {i: tuple(vars(x).values()) for i, x in pool.unanswered.items()},
        "tails": vars(pool.tails),
    }


def joined(tails: Sequence[Tails]) -> Tails:
    """One after another."""
    return Tails(*(torch.cat([getattr(t, name) for t in tails]) for name in vars(tails[0])))


def tails_of(stream: Stream, end: int) -> Tails:
    """What the layers above see of each row of a stream, a text each, whose first `end` tokens these are."""
    count = stream.state.batch_size
    return Tails(
        keys=torch.stack([parts["keys"] for parts in stream.upper], dim=1).cpu(),
        values=torch.stack([parts["values"] for parts in stream.upper], dim=1).cpu(),
        text=torch.arange(count),
        position=torch.full((count,), end),
    )
