"""Synthetic tasks for a memory: what is asked for lies further back than attention sees.

Every sample is a run of token ids and the targets that count. What is stated stands anywhere up to three quarters of
the document, what asks for it after that, noise elsewhere. In documents several windows long little that is asked for
is within a window; how little, the control with the memory off shows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = 32  # token ids 0..31
_KEYS, _VALUES = 64, 64
_PAIRS, _QUESTIONS = 8, 16
_DIGITS = 10
_PASSKEY = 5  # digits


@dataclass(frozen=True)
class Task:
    """What a model is trained on and scored by."""

    vocab_size: int
    sample: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
    """(batch, length, generator) to tokens [B, T] and the next token where it counts, -100 elsewhere [B, T]."""


def sample_recall(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall (Arora et al. 2023, "Zoology"): eight pairs, then sixteen questions.

    Every pair is a key's token and a value's token; a question is a key, its value follows. The length is 128 at
    least, so that there is room for all.
    """
    tokens = torch.randint(NOISE, (batch, length), generator=generator)
    targets = torch.full((batch, length), -100)
    keys = NOISE + torch.rand(batch, _KEYS, generator=generator).argsort(1)[:, :_PAIRS]
    values = NOISE + _KEYS + torch.randint(_VALUES, (batch, _PAIRS), generator=generator)
    asked = torch.randint(_PAIRS, (batch, _QUESTIONS), generator=generator)
    slots = torch.arange(length // 2)  # of two tokens
    divide = torch.randint(len(slots) // 4, 3 * len(slots) // 4 + 1, (batch, 1), generator=generator)
    rows = torch.arange(batch)[:, None]
    for free, k, v in (
        (slots < divide, keys, values),
        (slots >= divide, keys.gather(1, asked), values.gather(1, asked)),
    ):
        order = (torch.rand(batch, len(slots), generator=generator) + ~free).argsort(1)
        places = 2 * order[:, : k.shape[1]]
        tokens[rows, places], tokens[rows, places + 1] = k, v
    targets[rows, places] = v
    return tokens, targets


def sample_passkey(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A marker and five digits; the marker again at the end, and the digits are due."""
    marker = NOISE + _DIGITS
    tokens = torch.randint(NOISE, (batch, length), generator=generator)
    targets = torch.full((batch, length), -100)
    passkey = NOISE + torch.randint(_DIGITS, (batch, _PASSKEY), generator=generator)
    stated = torch.cat((torch.full((batch, 1), marker), passkey), dim=1)
    starts = torch.randint(3 * length // 4 - _PASSKEY, (batch, 1), generator=generator)
    tokens[torch.arange(batch)[:, None], starts + torch.arange(_PASSKEY + 1)] = stated
    tokens[:, -_PASSKEY - 1 :] = stated
    targets[:, -_PASSKEY - 1 : -1] = passkey
    return tokens, targets


TASKS = {
    "recall": Task(NOISE + _KEYS + _VALUES, sample_recall),
    "passkey": Task(NOISE + _DIGITS + 1, sample_passkey),
}
