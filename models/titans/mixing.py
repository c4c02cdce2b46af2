"""softmax(q k^T / sqrt(E) + bias) v over all keys in sight, a block of queries at a time.

A block sees no more than W keys before it and its own, so what is out of sight is never computed. `mix_in_turn` is for
a CPU: a block is two products and a softmax, and so small that the processor's cache holds it. `mix_fused` is for a
CUDA device: a block is a window, whole ones are rows of one batch, and torch's fused attention writes no scores down.

Shapes: B batch · T queries · W window · S keys in sight · H query heads · G kv heads · E head dim · P persistent ·
R = H / G query heads that share a kv head.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

UNSEEN = -1e30  # exp of it is 0 beside any score; finite, so that a padding token that sees nothing stays finite
_BLOCK = 64  # queries that are mixed in turn (measured on a CPU)
_ALIGNED = 8  # numbers between two rows of a mask: a multiple of it is what fused attention reads as it is

Masks = dict[tuple[int, int], Tensor]  # biases as fused attention reads them, by first query and number of sights


class Ring(NamedTuple):
    """Keys and values of the last W tokens of one layer; token p lives in slot p % W.

    Views in the dtype of x, written in place; no gradient flows through them, and so none to the key and value of a
    token that comes alone: it looks at itself in the ring.
    """

    keys: Tensor  # [B, G, W, E], rotated by absolute position
    values: Tensor  # [B, G, W, E]


class Lasting(NamedTuple):
    """Persistent tokens, and the queries as they see them."""

    queries: Tensor  # [B, H, T, E], float32
    keys: Tensor  # [G, E, P]
    values: Tensor  # [G, P, E]


class _Block(NamedTuple):
    """Queries, and what one of them may see."""

    queries: Tensor  # [B, H, T, E]
    sights: list[Ring]  # [B, G, S, E] each
    lasting: Lasting | None


def mix_in_turn(q_BHTE: Tensor, sights: list[Ring], bias_BTS: Tensor, lasting: Lasting | None) -> Tensor:
    """Some queries after the others: [B, H, T, E], in v's dtype.

    Each sight has S keys and values [B, G, S, E], and the bias [B, T, S] is that of each: W of them and then those of
    the queries' own tokens or, of a query that comes alone, W with its own.
    """
    num_tokens = q_BHTE.shape[2]
    if num_tokens == 1:
        return _mix(_Block(q_BHTE, sights, lasting), bias_BTS)
    mixed = []
    for start in range(0, num_tokens, _BLOCK):
        block, keys = _cut(q_BHTE, sights, lasting, start, min(start + _BLOCK, num_tokens))
        mixed.append(_mix(block, bias_BTS[:, start : start + _BLOCK, keys]))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)


def mix_fused(q_BHTE: Tensor, sights: list[Ring], bias_BTS: Tensor, lasting: Lasting | None, masks: Masks) -> Tensor:
    """The same, of two queries or more, in few operations. `masks`: kept by the caller as long as the bias is."""
    mixed = []
    for start, block, bias in _blocks(q_BHTE, sights, bias_BTS, lasting):
        if (key := (start, len(sights))) not in masks:
            masks[key] = _mask(block, bias)
        mixed_BHTE = _attend(block, masks[key])
        mixed.append(mixed_BHTE.unflatten(0, (len(q_BHTE), -1)).transpose(1, 2).flatten(2, 3))  # rows of a batch again
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)


def _blocks(
    q_BHTE: Tensor, sights: list[Ring], bias_BTS: Tensor, lasting: Lasting | None
) -> Iterator[tuple[int, _Block, Tensor]]:
    """Each with its first query and its bias: all whole windows as one, where there are several, then what is left."""
    num_tokens, window = q_BHTE.shape[2], bias_BTS.shape[2] - q_BHTE.shape[2]
    whole = num_tokens - num_tokens % window if num_tokens >= 2 * window else 0
    if whole:
        yield 0, *_side_by_side(q_BHTE[:, :, :whole], sights, bias_BTS[:, :whole], lasting, window)
    for start in range(whole, num_tokens, window):
        block, keys = _cut(q_BHTE, sights, lasting, start, min(start + window, num_tokens))
        yield start, block, bias_BTS[:, start : start + window, keys]


def _cut(q_BHTE: Tensor, sights: list[Ring], lasting: Lasting | None, start: int, stop: int) -> tuple[_Block, slice]:
    """The queries from `start` to `stop`, of several, and which keys these see."""
    keys = slice(start + 1, sights[0].keys.shape[2] - q_BHTE.shape[2] + stop)
    inside = [Ring(sight.keys[:, :, keys], sight.values[:, :, keys]) for sight in sights]
    asking = lasting and lasting._replace(queries=lasting.queries[:, :, start:stop])
    return _Block(q_BHTE[:, :, start:stop], inside, asking), keys


def _side_by_side(
    q_BHTE: Tensor, sights: list[Ring], bias_BTS: Tensor, lasting: Lasting | None, window: int
) -> tuple[_Block, Tensor]:
    """Whole blocks of `window` queries, each of them a row of the batch."""
    num_tokens = q_BHTE.shape[2]
    reach = 2 * window - 1  # keys that one of a block's queries may see

    def blocks(x_BHTE: Tensor) -> Tensor:
        cut_BHNTE: Tensor = x_BHTE[:, :, :num_tokens].unflatten(2, (-1, window))
        return cut_BHNTE.transpose(1, 2).flatten(0, 1)

    def in_sight(x_BGSE: Tensor) -> Tensor:
        return x_BGSE[:, :, 1:].unfold(2, reach, window).permute(0, 2, 1, 4, 3).flatten(0, 1)

    inside = [Ring(in_sight(sight.keys), in_sight(sight.values)) for sight in sights]
    every = bias_BTS[:, :, 1:].unflatten(1, (-1, window)).unfold(3, reach, window)  # block by block of keys
    bias_BTS = every.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)
    lasting = lasting and lasting._replace(queries=blocks(lasting.queries))
    return _Block(blocks(q_BHTE), inside, lasting), bias_BTS


def _mix(block: _Block, bias_BTS: Tensor) -> Tensor:
    """[B, H, T, E]; the softmax is in float32."""
    (q_BHTE, sights, lasting), scale = block, block.queries.shape[3] ** -0.5
    batch, num_heads, num_tokens, head_dim = q_BHTE.shape
    grouped = batch, sights[0].keys.shape[1], -1, head_dim
    q_AME = q_BHTE.reshape(grouped).flatten(0, 1)  # A = B G, M = R T
    scores_AMS = []
    if lasting is not None:
        scores_AMS.append((lasting.queries.reshape(grouped) @ lasting.keys.float() * scale).flatten(0, 1))
    for keys, _ in sights:
        raw_AMS = torch.bmm(q_AME, keys.flatten(0, 1).transpose(1, 2))
        raw_BHTS = raw_AMS.view(batch, num_heads, num_tokens, -1)
        scores_AMS.append(torch.add(bias_BTS[:, None], raw_BHTS, alpha=scale).view(raw_AMS.shape))
    shares_AMS = torch.cat(scores_AMS, dim=-1).softmax(dim=-1)
    shares = shares_AMS.split([x.shape[-1] for x in scores_AMS], dim=-1)
    mixed_AME, *more = (
        torch.bmm(share_AMS.to(q_AME.dtype), values.flatten(0, 1))
        for share_AMS, (_, values) in zip(shares[-len(sights) :], sights, strict=True)
    )
    if lasting is not None:
        lasting_BGME = shares[0].unflatten(0, grouped[:2]) @ lasting.values.float()
        more.append(lasting_BGME.flatten(0, 1).to(q_AME.dtype))
    return sum(more, mixed_AME).view(q_BHTE.shape)


def _mask(block: _Block, bias_BTS: Tensor) -> Tensor:
    """[B, 1, R T, S'] in q's dtype, S' the keys of all sights and those that last."""
    (q_BHTE, sights, lasting), (batch, num_tokens, num_keys) = block, bias_BTS.shape
    num_seen, num_lasting = len(sights) * num_keys, 0 if lasting is None else lasting.keys.shape[2]
    width, repeats = num_seen + num_lasting, q_BHTE.shape[1] // sights[0].keys.shape[1]
    shape = batch, repeats, num_tokens, -(-width // _ALIGNED) * _ALIGNED
    mask_BRTS = torch.zeros(shape, dtype=q_BHTE.dtype, device=q_BHTE.device)
    mask_BRTS[..., :num_seen] = bias_BTS.repeat(1, 1, len(sights))[:, None]
    return mask_BRTS.flatten(1, 2)[:, None, :, :width]


def _attend(block: _Block, mask: Tensor) -> Tensor:
    """`_mix` as one call of torch's.

    A persistent token is one more key. Queries see it turned in another way, so they stand there twice, side by side,
    and a key has zeros where it is not meant.
    """
    q_BHTE, sights, lasting = block
    batch, _, _, head_dim = q_BHTE.shape
    keys, values = [sight.keys for sight in sights], [sight.values for sight in sights]
    if lasting is not None:
        q_BHTE = torch.cat((q_BHTE, lasting.queries.to(q_BHTE.dtype)), dim=-1)
        keys_GPE = F.pad(lasting.keys.transpose(1, 2).to(q_BHTE.dtype), (head_dim, 0))
        keys = [*(F.pad(x, (0, head_dim)) for x in keys), keys_GPE.expand(batch, -1, -1, -1)]
        values = [*values, lasting.values.to(q_BHTE.dtype).expand(batch, -1, -1, -1)]
    seen = torch.cat(keys, dim=2), torch.cat(values, dim=2)  # [B, G, S', E], those that last at the end
    q_BGME = q_BHTE.reshape(batch, seen[0].shape[1], -1, q_BHTE.shape[-1])  # M = R T
    mixed_BGME = F.scaled_dot_product_attention(q_BGME, *seen, attn_mask=mask, scale=head_dim**-0.5)
    return mixed_BGME.reshape(*q_BHTE.shape[:3], head_dim)
