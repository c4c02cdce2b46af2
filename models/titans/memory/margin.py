"""Whether a query asks for what was written, or for something like it.

A linear memory answers every query. Where nothing was written under its key, it is answered with a mixture of what was
written under keys that are like it, and as loudly. But a query for what was written is much more like one key than like
any other, and one for what was not is somewhat like several. By the last keys that were written well, which a state
keeps (`titans.memory.protection`), the two can be told apart. The margin of a query q in a head is

    (a - max_i q^T r_i (1 - s_i)) / a^(1/2),   a = max_i q^T r_i,   s_i = r_i^T r / |r|^2, from 0 to 1

r_i the keys kept, those that were written faintly shorter than 1, and r the one that is most like q: a rival is like
the query, and unlike r. So what is told twice is no rival of itself. By how much r leads counts, and by what share of
a: this is the geometric mean of both. Where the query is like no key it is 0. A token's margin is the mean of its
heads'.

Where as many keys are kept as there is room for, a query may ask for one that was written before them, and the margin
is infinite: nothing is doubted.

Shapes: B batch · H memory heads · T queries · F floats of a key as the memory sees it ·
S rows.
"""

from torch import Tensor

WHOLE_FROM = 1.25  # times the threshold: a margin that leaves an answer as it is

_TINY = 1e-30


def margins(queries: Tensor, rows: Tensor, room: int, in_sight: Tensor | None = None) -> Tensor:
    """Of each token, [B, T].

    `queries` [B, H, T, F] have unit length. `rows` [B, H, S, F], zeros where there is none: what `expand` makes of the
    keys kept, of which there is `room` for so many. `in_sight` [B, H, T, S]: which of them count for whom; all.
    """
    length: Tensor = rows.norm(dim=-1)[:, :, None]
    scale = 1 / length.clamp(min=1)  # of what a row has in common with others: the rows are large, and stay as they are
    alike = queries @ rows.mT * scale
    counted = (length > 0).expand_as(alike)
    if in_sight is not None:
        alike, counted = alike * in_sight, counted & in_sight
    most, at = alike.max(dim=-1, keepdim=True)
    nearest = rows.take_along_dim(at, dim=2)
    itself = nearest.square().sum(-1, keepdim=True) * scale.take_along_dim(at, dim=-1)
    same = (nearest @ rows.mT * scale / itself.clamp(min=_TINY)).clamp(0, 1)
    lead = (most.squeeze(-1) - (alike * (1 - same)).amax(dim=-1)).clamp(min=0)  # below 0: it is unlike all keys
    margin = (lead / most.squeeze(-1).clamp(min=_TINY).sqrt()).mean(dim=1)
    return margin.masked_fill((counted.sum(-1) >= room).any(dim=1), float("inf"))


def told(margins: Tensor, threshold: float) -> Tensor:
    """The share of an answer that is not doubted: none below the threshold, from WHOLE_FROM times that on all."""
    return ((margins / threshold - 1) / (WHOLE_FROM - 1)).clamp(0, 1)
