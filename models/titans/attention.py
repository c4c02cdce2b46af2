"""Sliding-window attention with persistent tokens, over a ring of past keys and values.

The window sees the last W tokens, the query's own included; where attention is segmented it sees the tokens of the
query's own segment of W. P constant keys and values per layer never leave it: persistent memory (Titans, eq. 19). A
pretrained body has one, the attention sink: a window that loses its first token wrecks it (Xiao et al. 2023,
"Efficient Streaming Language Models with Attention Sinks"). They stand where bos would: right before the session's
first token (the segment's, where attention is segmented), and never further back than W.

Shapes: B batch · T new tokens · W window · S keys in sight · H query heads · G kv heads · E head dim · P persistent.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from titans.layers import Rotation
from titans.mixing import UNSEEN, Lasting, Masks, Ring, mix_fused, mix_in_turn

_FUSED_ON = "cuda"  # kind of device; a query that comes alone is mixed faster in turn there, too


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
    masks: Masks = field(default_factory=dict)  # made by the first layer that wants them

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
        if self.counted is None:
            return new[:, new.shape[1] - self.columns.shape[1] :]
        columns = self.columns.view(*self.columns.shape, *[1] * (new.ndim - 2))
        return new.gather(1, columns.expand(-1, -1, *new.shape[2:]))


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
        if q_BHTE.device.type == _FUSED_ON and q_BHTE.shape[2] > 1:
            mixed_BHTE = mix_fused(q_BHTE, sights, place.bias_BTS, lasting, place.masks)
        else:
            mixed_BHTE = mix_in_turn(q_BHTE, sights, place.bias_BTS, lasting)
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
            past_BGWE = past_BGWE.gather(2, place.oldest_first.expand_as(past_BGWE))
        return torch.cat((past_BGWE, new_BTGE.transpose(1, 2)), dim=2)
