"""Sliding-window attention with one attention sink, over a ring of past keys and values.

The window sees the last W tokens, the query's own included. A window that loses its first token wrecks a
pretrained body (Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks"), so one
constant key and value per layer, those of the bos token, never leave it: the body's persistent memory
(Titans, equation 19). The sink stands where bos would: right before the session's first token, and never
further back than W.

Shapes: B batch · T new tokens · W window · S keys in sight · H query heads · G kv heads · E head dim.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from titans.layers import Rotation

UNSEEN = -1e30  # exp of it is 0 beside any score; finite, so that a padding token that sees nothing stays finite


class Ring(NamedTuple):
    """Keys and values of the last W tokens of one layer; token p lives in slot p % W.

    Views, written in place; no gradient flows through them.
    """

    keys: Tensor  # [B, G, W, E], rotated by absolute position
    values: Tensor  # [B, G, W, E]


class Rings(Protocol):
    """The windows of a run of layers."""

    def ring(self, layer: int) -> Ring:
        """Of one of them, counted from the first."""


@dataclass(frozen=True)
class Block:
    """Where the tokens of one call stand: all that attention needs to know of positions, once for all layers."""

    rotation: Rotation  # of queries and keys
    sink_rotation: Rotation  # of queries, as seen from the sink
    bias_BTS: Tensor  # 0 where a query may look at a key, else UNSEEN; S = W + T (ring, then new tokens), or W if T = 1
    rows: Tensor  # [N] batch row of each valid token
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
    ) -> "Block":
        """Place `num_tokens` columns after `position_B` tokens; row b uses its first `lengths_B[b]` columns."""
        assert num_tokens <= window, "a ring takes at most a window at once"
        columns_T = torch.arange(num_tokens, device=position_B.device)
        new_BT = position_B[:, None] + columns_T
        if num_tokens == 1:  # the one token is in the ring before it looks
            keys_BS = _ring_positions(position_B + lengths_B, window)
        else:
            keys_BS = torch.cat((_ring_positions(position_B, window), new_BT), dim=1)
        distance_BTS = new_BT[:, :, None] - keys_BS[:, None, :]
        unseen_BTS = (distance_BTS < 0) | (distance_BTS >= window) | (keys_BS < 0)[:, None, :]
        rows, columns = (columns_T < lengths_B[:, None]).nonzero(as_tuple=True)
        return cls(
            rotation=Rotation(new_BT, head_dim, theta),
            sink_rotation=Rotation((new_BT + 1).clamp(max=window), head_dim, theta),
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
    """Grouped-query attention over the ring and a block of new tokens."""

    sink_key: Tensor  # [G, E], not rotated
    sink_value: Tensor  # [G, E]

    def __init__(self, size: int, num_heads: int, num_kv_heads: int, head_dim: int, *, sink: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.sink = sink
        self.qkv = nn.Linear(size, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.out = nn.Linear(num_heads * head_dim, size, bias=False)
        self.register_buffer("sink_key", torch.zeros(num_kv_heads, head_dim))
        self.register_buffer("sink_value", torch.zeros(num_kv_heads, head_dim))

    def split(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, E], keys and values [B, T, G, E], before rotation."""
        heads = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        return q, k, v

    def forward(self, x_BTD: Tensor, block: Block, ring: Ring) -> Tensor:
        """Attend; the ring then holds the block's valid tokens too. Returns [B, T, D]."""
        q_BTHE, k_BTGE, v_BTGE = self.split(x_BTD)
        k_BTGE = block.rotation(k_BTGE)
        if x_BTD.shape[1] == 1:
            self._append(ring, k_BTGE, v_BTGE, block)
            keys, values = ring
        else:
            keys = torch.cat((ring.keys, k_BTGE.transpose(1, 2)), dim=2)
            values = torch.cat((ring.values, v_BTGE.transpose(1, 2)), dim=2)
            self._append(ring, k_BTGE, v_BTGE, block)
        return self.out(self._attend(q_BTHE, keys, values, block))  # type: ignore[no-any-return]

    @staticmethod
    def _append(ring: Ring, k_BTGE: Tensor, v_BTGE: Tensor, block: Block) -> None:
        ring.keys[block.rows, :, block.slots] = k_BTGE.detach()[block.rows, block.columns]
        ring.values[block.rows, :, block.slots] = v_BTGE.detach()[block.rows, block.columns]

    def _attend(self, q_BTHE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, block: Block) -> Tensor:
        q_BHTE = block.rotation(q_BTHE).transpose(1, 2)
        sink_BHT = self._sink_scores(block.sink_rotation(q_BTHE)) if self.sink else None
        fused = q_BHTE.device.type == "cpu" and not torch.is_grad_enabled()
        mix = mix_fused if fused else mix_plain
        mixed_BHTE, total_BHT = mix(q_BHTE, k_BGSE, v_BGSE, block.bias_BTS)
        if sink_BHT is not None:
            share = (sink_BHT - total_BHT).sigmoid()[..., None]  # of the sink among all that the softmax runs over
            sink_HE = self.sink_value.float().repeat_interleave(self.num_heads // self.num_kv_heads, dim=0)
            mixed_BHTE = torch.lerp(mixed_BHTE.float(), sink_HE[:, None], share).to(v_BGSE.dtype)
        return mixed_BHTE.transpose(1, 2).flatten(2)

    def _sink_scores(self, q_BTHE: Tensor) -> Tensor:
        sink_HE = self.sink_key.float().repeat_interleave(self.num_heads // self.num_kv_heads, dim=0)
        scores: Tensor = torch.einsum("bthe,he->bht", q_BTHE.float(), sink_HE) * self.head_dim**-0.5
        return scores


def mix_plain(q_BHTE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, bias_BTS: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(E) + bias) v as it is written: [B, H, T, E], and the log of the softmax's sum, [B, H, T]."""
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
