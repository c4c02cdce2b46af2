"""Sliding-window attention with persistent tokens, over a ring of past keys and values.

The window sees the last W tokens, the query's own included; where attention is segmented it sees the tokens of the
query's own segment of W. P constant keys and values per layer never leave it: persistent memory (Titans, eq. 19). A
pretrained body has one, the attention sink: a window that loses its first token wrecks it (Xiao et al. 2023,
"Efficient Streaming Language Models with Attention Sinks"). They stand where bos would: right before the session's
first token (the segment's, where attention is segmented), and never further back than W.

Many new tokens attend a block of queries at a time: a block sees no more than W keys and its own, so what is out of
sight is never computed. On a CPU a block is two products and a softmax, so few queries that its cache holds them; on a
CUDA device it is torch's fused attention, which writes no scores down.

Shapes: B batch · T new tokens · W window · S keys in sight · H query heads · G kv heads · E head dim · P persistent ·
R = H / G query heads that share a kv head.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans.layers import Rotation

_BLOCK, _FUSED_BLOCK = 64, 256  # queries that are mixed together
_ALIGNED = 8  # numbers between two rows of a mask: a multiple of it is what fused attention reads as it is
UNSEEN = -1e30  # exp of it is 0 beside any score; finite, so that a padding token that sees nothing stays finite


class Ring(NamedTuple):
    """Keys and values of the last W tokens of one layer; token p lives in slot p % W.

    Views in the dtype of x, written in place; no gradient flows through them, and so none to the key and value of a
    token that comes alone: it looks at itself in the ring.
    """

    keys: Tensor  # [B, G, W, E], rotated by absolute position
    values: Tensor  # [B, G, W, E]


@dataclass(frozen=True)
class Placement:
    """Where the tokens of one call stand: all that attention needs to know of positions, once for all layers.

    A token that comes alone looks at the ring as it lies, with itself in it: S = W. Several look at the ring, its
    oldest token first, and then at themselves: S = W + T.
    """

    rotation: Rotation  # [B, T, 2]: of queries and keys, and of queries as seen from the persistent tokens
    bias_BTS: Tensor  # float32: 0 where a query may see a key, else UNSEEN
    oldest_first: Tensor | None  # [B, 1, W, 1] the slots in order; None: they are, or the token comes alone
    columns: Tensor  # [B, N] of the last N = min(T, W) tokens that count: what the ring keeps
    slots: Tensor  # [B, N] theirs in the ring
    counted: Tensor | None  # [B, N, 1] False: no new token but one of before, which keeps its slot; None: all are new
    cells: Tensor  # [B N G] the slots, counted through all of a ring [B, G, W]
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # made by the first layer that needs them

    @classmethod
    def place(
        cls,
        position_B: Tensor,
        lengths_B: Tensor | None,
        num_tokens: int,
        *,
        window: int,
        num_kv_heads: int,
        head_dim: int,
        theta: float,
        segmented: bool = False,
    ) -> "Placement":
        """Place `num_tokens` columns after `position_B` tokens; row b uses its first `lengths_B[b]` columns, or all.

        Both are [B] int64. `window` is W, `num_kv_heads` G, `head_dim` E, `theta` the base of the rotary angles.
        Nothing here waits for the device, if it is not a CPU.
        """
        columns_T = torch.arange(num_tokens, device=position_B.device)
        slots_W = torch.arange(window, device=position_B.device)
        new_BT = position_B[:, None] + columns_T
        oldest_first = None
        if num_tokens == 1:
            last_B1 = position_B[:, None] - (0 if lengths_B is None else 1 - lengths_B[:, None])
            keys_BS = last_B1 - (last_B1 - slots_W) % window
        else:
            keys_BS = torch.cat((position_B[:, None] - window + slots_W, new_BT), dim=1)
            first_B1 = position_B[:, None] % window
            if position_B.device.type != "cpu" or first_B1.any():  # elsewhere to look is dearer than to gather
                oldest_first = ((first_B1 + slots_W) % window)[:, None, :, None]
        distance_BTS = new_BT[:, :, None] - keys_BS[:, None, :]
        unseen_BTS = (distance_BTS < 0) | (keys_BS < 0)[:, None, :]
        if segmented:
            unseen_BTS |= (new_BT // window)[:, :, None] != (keys_BS // window)[:, None, :]
        else:
            unseen_BTS |= distance_BTS >= window
        columns_BN = columns_T[max(0, num_tokens - window) :].expand(len(position_B), -1)
        if lengths_B is not None:
            columns_BN = columns_BN + (lengths_B - num_tokens)[:, None]
        slots_BN = (position_B[:, None] + columns_BN) % window
        groups_BG = torch.arange(len(position_B) * num_kv_heads, device=position_B.device).view(-1, num_kv_heads)
        back_BT = new_BT % window + 1 if segmented else (new_BT + 1).clamp(max=window)
        return cls(
            rotation=Rotation(torch.stack((new_BT, back_BT), dim=-1), head_dim, theta),
            bias_BTS=torch.zeros(unseen_BTS.shape, device=unseen_BTS.device).masked_fill_(unseen_BTS, UNSEEN),
            oldest_first=oldest_first,
            columns=columns_BN.clamp(min=0),
            slots=slots_BN,
            counted=None if lengths_B is None else columns_BN[..., None] >= 0,
            cells=(groups_BG[:, None] * window + slots_BN[..., None]).flatten(),
        )

    def kept(self, new: Tensor) -> Tensor:
        """Of new tokens [B, T, ...] those of `columns` [B, N, ...]; what is not `counted` among them means nothing."""
        if self.counted is None and self.columns.shape[1] == new.shape[1]:
            return new
        return new.take_along_dim(self.columns.view(*self.columns.shape, *[1] * (new.ndim - 2)), dim=1)


class Attention(nn.Module):
    """Grouped-query attention over the ring and a block of new tokens; `size` is D."""

    def __init__(self, size: int, num_heads: int, num_kv_heads: int, head_dim: int, num_persistent: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.qkv = nn.Linear(size, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.out = nn.Linear(num_heads * head_dim, size, bias=False)
        self.persistent_keys = nn.Parameter(torch.randn(num_persistent, num_kv_heads, head_dim))  # not rotated
        self.persistent_values = nn.Parameter(torch.zeros(num_persistent, num_kv_heads, head_dim))

    def split(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, E], keys and values [B, T, G, E], before rotation."""
        heads = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        return q, k, v

    def forward(
        self, x_BTD: Tensor, place: Placement, ring: Ring, context: tuple[Tensor, Ring] | None = None
    ) -> Tensor:
        """Attend; the ring then holds the new tokens too, those that count. Returns [B, T, D]: finite past their end.

        `context`: as many tokens again [B, T, D] and their own ring, each seen from where x's token of its place is.
        """
        q_BHTE, lasting_BHTE, seen = self._place(x_BTD, place, ring)
        sights = [seen]
        if context is not None:
            sights.insert(0, self._place(context[0], place, context[1])[2])
        keys_PGE, values_PGE, lasting = self.persistent_keys, self.persistent_values, None
        if keys_PGE.shape[0]:
            lasting = Lasting(lasting_BHTE, keys_PGE.permute(1, 2, 0), values_PGE.transpose(0, 1))
        mixed_BHTE = mix_in_blocks(q_BHTE, sights, place, lasting, fused=x_BTD.is_cuda)
        return self.out(mixed_BHTE.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _place(self, x_BTD: Tensor, place: Placement, ring: Ring) -> tuple[Tensor, Tensor, Ring]:
        """Queries as the window's keys and as the persistent ones see them [B, H, T, E]; and all keys in sight."""
        heads = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim))
        turning, v_BTGE = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=2)
        turned, lasting = place.rotation(turning[:, :, None]).unbind(2)
        q_BTHE, k_BTGE = turned.to(ring.keys.dtype).split([self.num_heads, self.num_kv_heads], dim=2)
        seen = self._see(k_BTGE, v_BTGE.to(ring.values.dtype), place, ring)
        return q_BTHE.transpose(1, 2), lasting[:, :, : self.num_heads].transpose(1, 2), seen

    def _see(self, k_BTGE: Tensor, v_BTGE: Tensor, place: Placement, ring: Ring) -> Ring:
        """All keys and values in sight, [B, G, S, E]; the new ones are then in the ring."""
        pairs, seen = list(zip(ring, (k_BTGE, v_BTGE), strict=True)), ring
        if k_BTGE.shape[1] > 1:
            seen = Ring(*(self._before(past, new, place) for past, new in pairs))
        for past, new in pairs:
            cells, kept = past.view(-1, self.head_dim), place.kept(new.detach())
            if place.counted is not None:
                kept = kept.where(place.counted[..., None], cells[place.cells].view_as(kept))
            cells.index_copy_(0, place.cells, kept.reshape(-1, self.head_dim))
        return seen

    @staticmethod
    def _before(past_BGWE: Tensor, new_BTGE: Tensor, place: Placement) -> Tensor:
        if place.oldest_first is not None:
            past_BGWE = past_BGWE.take_along_dim(place.oldest_first, dim=2)
        return torch.cat((past_BGWE, new_BTGE.transpose(1, 2)), dim=2)


class Lasting(NamedTuple):
    """Persistent tokens, and the queries as they see them."""

    queries: Tensor  # [B, H, T, E], float32
    keys: Tensor  # [G, E, P]
    values: Tensor  # [G, P, E]


def mix_in_blocks(
    q_BHTE: Tensor, sights: list[Ring], place: Placement, lasting: Lasting | None, *, fused: bool
) -> Tensor:
    """`mix` or `mix_fused`, some queries after the others, each with the keys that one of them may see."""
    num_tokens, num_keys = place.bias_BTS.shape[1:]
    size, mixed = _FUSED_BLOCK if fused else _BLOCK, []
    for start in range(0, num_tokens, size):
        queries = slice(start, min(start + size, num_tokens))
        keys = slice(start + 1 if num_tokens > 1 else 0, num_keys - num_tokens + queries.stop)
        inside = [Ring(sight.keys[:, :, keys], sight.values[:, :, keys]) for sight in sights]
        block = lasting and lasting._replace(queries=lasting.queries[:, :, queries])
        asking_BHTE, bias_BTS = q_BHTE[:, :, queries], place.bias_BTS[:, queries, keys]
        if not fused:
            mixed.append(mix(asking_BHTE, inside, bias_BTS, block))
            continue
        if (key := (start, len(sights))) not in place.masks:
            place.masks[key] = make_mask(asking_BHTE, inside, bias_BTS, block)
        mixed.append(mix_fused(asking_BHTE, inside, place.masks[key], block))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)


def mix(q_BHTE: Tensor, sights: list[Ring], bias_BTS: Tensor, lasting: Lasting | None = None) -> Tensor:
    """softmax(q k^T / sqrt(E) + bias) v over the keys of all sights and those that last: [B, H, T, E], in v's dtype.

    Each sight has S keys and values [B, G, S, E], and the bias [B, T, S] is that of each. The softmax is in float32.
    """
    batch, num_heads, num_tokens, head_dim = q_BHTE.shape
    grouped = batch, sights[0].keys.shape[1], -1, head_dim
    q_AME, scale = q_BHTE.reshape(grouped).flatten(0, 1), head_dim**-0.5  # A = B G, M = R T
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


def make_mask(q_BHTE: Tensor, sights: list[Ring], bias_BTS: Tensor, lasting: Lasting | None = None) -> Tensor:
    """The bias for `mix_fused`, in q's dtype: [B, 1, R T, S'], S' the keys of all sights and those that last."""
    batch, num_tokens, num_keys = bias_BTS.shape
    num_seen, num_lasting = len(sights) * num_keys, 0 if lasting is None else lasting.keys.shape[2]
    width = num_seen + num_lasting
    repeats = q_BHTE.shape[1] // sights[0].keys.shape[1]
    shape = batch, repeats, num_tokens, -(-width // _ALIGNED) * _ALIGNED
    mask_BRTS = torch.zeros(shape, dtype=q_BHTE.dtype, device=q_BHTE.device)
    mask_BRTS[..., :num_seen] = bias_BTS.repeat(1, 1, len(sights))[:, None]
    return mask_BRTS.flatten(1, 2)[:, None, :, :width]


def mix_fused(q_BHTE: Tensor, sights: list[Ring], mask: Tensor, lasting: Lasting | None = None) -> Tensor:
    """`mix` as one call of torch's; `mask` is `make_mask`'s.

    A persistent token is one more key. Queries see it turned in another way, so they stand there twice, side by side,
    and a key has zeros where it is not meant.
    """
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
