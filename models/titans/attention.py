"""Sliding-window attention with persistent tokens, over a ring of past keys and values.

The window sees the last W tokens, the query's own included; where attention is segmented it sees the tokens of the
query's own segment of W. P constant keys and values per layer never leave it: persistent memory (Titans, eq. 19). A
pretrained body has one, the attention sink: a window that loses its first token wrecks it (Xiao et al. 2023,
"Efficient Streaming Language Models with Attention Sinks"). They stand where bos would: right before the session's
first token (the segment's, where attention is segmented), and never further back than W.

Shapes: B batch · T new tokens · W window · S keys in sight · H query heads · G kv heads · E head dim · P persistent.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from titans.layers import Rotation

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
    """Where the tokens of one call stand: all that attention needs to know of positions, once for all layers."""

    rotation: Rotation  # of queries and keys [B, T]
    persistent_rotation: Rotation  # of queries, as seen from the persistent tokens
    bias_BTS: Tensor  # float32: 0 where a query may see a key, else UNSEEN; S = W + T (ring, then new), or W if T = 1
    rows: Tensor  # [N] batch row of each valid token that the ring keeps
    columns: Tensor  # [N] its column among the new tokens
    slots: Tensor  # [N] its slot in the ring

    @classmethod
    def place(
        cls,
        position_B: Tensor,
        lengths_B: Tensor,
        num_tokens: int,
        *,
        window: int,
        head_dim: int,
        theta: float,
        segmented: bool = False,
    ) -> "Placement":
        """Place `num_tokens` columns after `position_B` tokens; row b uses its first `lengths_B[b]` columns.

        Both are [B] int64. `window` is W, `head_dim` E, `theta` the base of the rotary angles.
        """
        columns_T = torch.arange(num_tokens, device=position_B.device)
        new_BT = position_B[:, None] + columns_T
        if num_tokens == 1:  # the one token is in the ring before it looks
            keys_BS = _ring_positions(position_B + lengths_B, window)
        else:
            keys_BS = torch.cat((_ring_positions(position_B, window), new_BT), dim=1)
        distance_BTS = new_BT[:, :, None] - keys_BS[:, None, :]
        unseen_BTS = (distance_BTS < 0) | (keys_BS < 0)[:, None, :]
        if segmented:
            unseen_BTS |= (new_BT // window)[:, :, None] != (keys_BS // window)[:, None, :]
        else:
            unseen_BTS |= distance_BTS >= window
        kept_BT = (columns_T < lengths_B[:, None]) & (columns_T >= lengths_B[:, None] - window)
        rows, columns = kept_BT.nonzero(as_tuple=True)
        back_BT = new_BT % window + 1 if segmented else (new_BT + 1).clamp(max=window)
        return cls(
            rotation=Rotation(new_BT, head_dim, theta),
            persistent_rotation=Rotation(back_BT, head_dim, theta),
            bias_BTS=torch.zeros(unseen_BTS.shape, device=unseen_BTS.device).masked_fill_(unseen_BTS, UNSEEN),
            rows=rows,
            columns=columns,
            slots=new_BT[rows, columns] % window,
        )


def _ring_positions(position_B: Tensor, window: int) -> Tensor:
    """[B, W]: the position of the token in each slot, negative where there is none yet."""
    slots_W = torch.arange(window, device=position_B.device)
    last_B1 = position_B[:, None] - 1
    return last_B1 - (last_B1 - slots_W) % window


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
        q_BTHE, k_BTGE, v_BTGE = self.split(x_BTD)
        keys, values = self._see(k_BTGE, v_BTGE, place, ring)
        bias_BTS = place.bias_BTS
        if context is not None:
            _, k_BTGE, v_BTGE = self.split(context[0])
            more_keys, more_values = self._see(k_BTGE, v_BTGE, place, context[1])
            keys, values = torch.cat((more_keys, keys), dim=2), torch.cat((more_values, values), dim=2)
            bias_BTS = torch.cat((bias_BTS, bias_BTS), dim=2)
        return self.out(self._attend(q_BTHE, keys, values, place, bias_BTS))  # type: ignore[no-any-return]

    def _see(self, k_BTGE: Tensor, v_BTGE: Tensor, place: Placement, ring: Ring) -> Ring:
        """All keys and values in sight, [B, G, S, E]; the new ones are then in the ring."""
        k_BTGE, v_BTGE = place.rotation(k_BTGE).to(ring.keys.dtype), v_BTGE.to(ring.values.dtype)
        if k_BTGE.shape[1] == 1:
            self._append(ring, k_BTGE, v_BTGE, place)
            return ring
        keys = torch.cat((ring.keys, k_BTGE.transpose(1, 2)), dim=2)
        values = torch.cat((ring.values, v_BTGE.transpose(1, 2)), dim=2)
        self._append(ring, k_BTGE, v_BTGE, place)
        return Ring(keys, values)

    @staticmethod
    def _append(ring: Ring, k_BTGE: Tensor, v_BTGE: Tensor, place: Placement) -> None:
        ring.keys[place.rows, :, place.slots] = k_BTGE.detach()[place.rows, place.columns]
        ring.values[place.rows, :, place.slots] = v_BTGE.detach()[place.rows, place.columns]

    def _attend(self, q_BTHE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, place: Placement, bias_BTS: Tensor) -> Tensor:
        q_BHTE = place.rotation(q_BTHE).to(k_BGSE.dtype).transpose(1, 2)
        fused = q_BTHE.device.type == "cpu" and not torch.is_grad_enabled()
        mix = mix_fused if fused else mix_plain
        mixed_BHTE, total_BHT = mix(q_BHTE, k_BGSE, v_BGSE, bias_BTS)
        if self.persistent_keys.shape[0]:
            constant_BHTE, constant_BHT = self._recollect(place.persistent_rotation(q_BTHE))
            share = (constant_BHT - total_BHT).float().sigmoid()[..., None]  # among all that the softmax runs over
            mixed_BHTE = torch.lerp(mixed_BHTE.float(), constant_BHTE.float(), share).to(v_BGSE.dtype)
        return mixed_BHTE.transpose(1, 2).flatten(2)

    def _recollect(self, q_BTHE: Tensor) -> tuple[Tensor, Tensor]:
        """What the persistent tokens give, [B, H, T, E], and the log of their share of the softmax's sum."""
        keys_PHE, values_PHE = (
            x.float().repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
            for x in (self.persistent_keys, self.persistent_values)
        )
        scores_BHTP = torch.einsum("bthe,phe->bhtp", q_BTHE.float(), keys_PHE) * self.head_dim**-0.5
        mixed_BHTE = torch.einsum("bhtp,phe->bhte", scores_BHTP.softmax(-1), values_PHE)
        return mixed_BHTE, scores_BHTP.logsumexp(-1)


def mix_plain(q_BHTE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, bias_BTS: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(E) + bias) v as written: [B, H, T, E], and the log of its sum [B, H, T], float32."""
    q_BGRTE = q_BHTE.unflatten(1, (k_BGSE.shape[1], -1))
    scores_BGRTS = (q_BGRTE @ k_BGSE[:, :, None].transpose(-1, -2)).float() * q_BHTE.shape[-1] ** -0.5
    scores_BGRTS = scores_BGRTS + bias_BTS[:, None, None]
    mixed_BGRTE = scores_BGRTS.softmax(dim=-1).to(v_BGSE.dtype) @ v_BGSE[:, :, None]
    return mixed_BGRTE.flatten(1, 2), scores_BGRTS.logsumexp(-1).flatten(1, 2)


def mix_fused(q_BHTE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, bias_BTS: Tensor) -> tuple[Tensor, Tensor]:
    """The same in one pass over the keys (FlashAttention, Dao 2023), on a CPU; it has no gradient for the sum."""
    shared = q_BHTE.shape[1] // k_BGSE.shape[1]
    k_BHSE, v_BHSE = k_BGSE.repeat_interleave(shared, dim=1), v_BGSE.repeat_interleave(shared, dim=1)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mixed_BHTE, total_BHT = attend(q_BHTE, k_BHSE, v_BHSE, attn_mask=bias_BTS[:, None])
    return mixed_BHTE, total_BHT
