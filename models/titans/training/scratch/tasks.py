"""Synthetic tasks that only a memory can do: what is asked for lies further back than attention sees.

Every sample is a run of token ids and the targets that count. The first half states, the second asks, noise fills the
rest; what was stated and asked may be any distance apart.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = 32  # token ids 0..31
_KEYS, _VALUES = 64, 64
_DIGITS = 10
_PASSKEY = 5  # digits


@dataclass(frozen=True)
class Task:
    """What a model is trained on and scored by."""

    vocab_size: int
    sample: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
    """(batch, length, generator) to tokens [B, T] and the next token where it counts, -100 elsewhere [B, T]."""


def sample_recall(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall (Arora et al. 2023, "Zoology"): eight pairs, each asked for once.

    Every pair is a key's token and a value's token; a question is the key, its value follows.
    """
    num_pairs = 8
    tokens = torch.randint(NOISE, (batch, length), generator=generator)
    targets = torch.full((batch, length), -100)
    rows = torch.arange(batch)[:, None]
    keys = NOISE + torch.rand(batch, _KEYS, generator=generator).argsort(1)[:, :num_pairs]
    values = NOISE + _KEYS + torch.randint(_VALUES, (batch, num_pairs), generator=generator)
    slots = length // 2 // 2  # of two tokens, in each half
    for half in (0, 1):
        places = 2 * torch.rand(batch, slots, generator=generator).argsort(1)[:, :num_pairs] + half * 2 * slots
        tokens[rows, places], tokens[rows, places + 1] = keys, values
    targets[rows, places] = values
    return tokens, targets


def sample_passkey(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A marker and five digits somewhere in the first half; the marker again at the end, and the digits are due."""
    marker = NOISE + _DIGITS
    tokens = torch.randint(NOISE, (batch, length), generator=generator)
    targets = torch.full((batch, length), -100)
    passkey = NOISE + torch.randint(_DIGITS, (batch, _PASSKEY), generator=generator)
    stated = torch.cat((torch.full((batch, 1), marker), passkey), dim=1)
    starts = torch.randint(length // 2 - _PASSKEY, (batch, 1), generator=generator)
    tokens[torch.arange(batch)[:, None], starts + torch.arange(_PASSKEY + 1)] = stated
    tokens[:, -_PASSKEY - 1 :] = stated
    targets[:, -_PASSKEY - 1 : -1] = passkey
    return tokens, targets


TASKS = {
    "recall": Task(NOISE + _KEYS + _VALUES, sample_recall),
    "passkey": Task(NOISE + _DIGITS + 1, sample_passkey),
}
