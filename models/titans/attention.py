"""Sliding-window attention with one attention sink, over a ring of past keys and values.

The window sees the last W tokens, the query's own included. A window that loses its first token wrecks a
pretrained body (Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks"), so one
constant key and value per layer, those of the bos token, never leave it: the body's persistent memory
(Titans, equation 19). The sink stands where bos would: right before the session's first token, and never
further back than W.

Shapes: B batch · T new tokens · W window · S keys in sight · H query heads · G kv heads · E head dim.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from titans.layers import Rotation


class Ring(NamedTuple):
    """Keys and values of the last W tokens of one layer; token p lives in slot p % W. Views, written in place."""

    keys: Tensor  # [B, G, W, E], rotated by absolute position
    values: Tensor  # [B, G, W, E]


@dataclass(frozen=True)
class Block:
    """Where the tokens of one call stand: all that attention needs to know of positions, once for all layers."""

    rotation: Rotation  # of queries and keys
    sink_rotation: Rotation  # of queries, as seen from the sink
    mask_BTS: Tensor  # True where a query may look at a key
    rows: Tensor  # [N] batch row of each valid token
    columns: Tensor  # [N] its column among the new tokens
    slots: Tensor  # [N] its slot in the ring
    ring_in_sight: bool  # S = W + T (the ring, then the new tokens); else S = T, or S = W when T = 1

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
        start: int = 0,
        ring: bool = True,
    ) -> "Block":
        """Place `num_tokens` columns after `position_B` tokens; row b uses its first `lengths_B[b]` columns.

        `start` is the position of the first token there is: nothing before it is looked at. With
        `ring=False` the new tokens see each other only, and their number may exceed the window.
        """
        device = position_B.device
        columns_T = torch.arange(num_tokens, device=device)
        new_BT = position_B[:, None] + columns_T
        keys_BS = new_BT
        if ring:
            assert num_tokens <= window, "a ring takes at most a window at once"
            if num_tokens == 1:  # the one token is in the ring before it looks
                keys_BS = _ring_positions(position_B + lengths_B, window)
            else:
                keys_BS = torch.cat((_ring_positions(position_B, window), new_BT), dim=1)
        distance_BTS = new_BT[:, :, None] - keys_BS[:, None, :]
        mask_BTS = (distance_BTS >= 0) & (distance_BTS < window) & (keys_BS >= start)[:, None, :]
        rows, columns = (columns_T < lengths_B[:, None]).nonzero(as_tuple=True)
        return cls(
            rotation=Rotation(new_BT, head_dim, theta),
            sink_rotation=Rotation((new_BT + 1).clamp(max=window), head_dim, theta),
            mask_BTS=mask_BTS,
            rows=rows,
            columns=columns,
            slots=new_BT[rows, columns] % window,
            ring_in_sight=ring,
        )


def _ring_positions(position_B: Tensor, window: int) -> Tensor:
    """[B, W]: the position of the token in each slot, negative where there is none yet."""
    slots_W = torch.arange(window, device=position_B.device)
    last_B1 = position_B[:, None] - 1
    return last_B1 - (last_B1 - slots_W) % window


class Attention(nn.Module):
    """Grouped-query attention over a block and, where given, the ring before it."""

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

    def forward(self, x_BTD: Tensor, block: Block, ring: Ring | None) -> Tensor:
        """Attend; the ring, where given, then holds the block's valid tokens. Returns [B, T, D]."""
        q_BTHE, k_BTGE, v_BTGE = self.split(x_BTD)
        k_BTGE = block.rotation(k_BTGE)
        if ring is None:
            keys, values = k_BTGE.transpose(1, 2), v_BTGE.transpose(1, 2)
        elif x_BTD.shape[1] == 1:
            self._append(ring, k_BTGE, v_BTGE, block)
            keys, values = ring
        else:
            keys = torch.cat((ring.keys, k_BTGE.transpose(1, 2)), dim=2)
            values = torch.cat((ring.values, v_BTGE.transpose(1, 2)), dim=2)
            self._append(ring, k_BTGE, v_BTGE, block)
        return self.out(self._attend(q_BTHE, keys, values, block))  # type: ignore[no-any-return]

    @staticmethod
    def _append(ring: Ring, k_BTGE: Tensor, v_BTGE: Tensor, block: Block) -> None:
        ring.keys[block.rows, :, block.slots] = k_BTGE[block.rows, block.columns]
        ring.values[block.rows, :, block.slots] = v_BTGE[block.rows, block.columns]

    def _attend(self, q_BTHE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, block: Block) -> Tensor:
        batch, num_tokens = q_BTHE.shape[:2]
        scores = self._group(block.rotation(q_BTHE)) @ k_BGSE[:, :, None].transpose(-1, -2)
        scores_BGRTS = scores.float() * self.head_dim**-0.5
        scores_BGRTS = scores_BGRTS.masked_fill(~block.mask_BTS[:, None, None], float("-inf"))
        if self.sink:
            q_sink = self._group(block.sink_rotation(q_BTHE)).float()
            sink_BGRT1 = q_sink @ self.sink_key.float()[:, None, :, None] * self.head_dim**-0.5
            scores_BGRTS = torch.cat((sink_BGRT1, scores_BGRTS), dim=-1)
        weights = scores_BGRTS.softmax(dim=-1)
        if self.sink:
            sink_weight, weights = weights[..., :1], weights[..., 1:]
        mixed = weights.to(v_BGSE.dtype) @ v_BGSE[:, :, None]
        if self.sink:
            mixed = mixed + (sink_weight * self.sink_value.float()[:, None, None, :]).to(mixed.dtype)
        joined: Tensor = mixed.permute(0, 3, 1, 2, 4).reshape(batch, num_tokens, -1)
        return joined

    def _group(self, q_BTHE: Tensor) -> Tensor:
        """[B, G, R, T, E]: R query heads share each kv head."""
        grouped: Tensor = q_BTHE.unflatten(2, (self.num_kv_heads, -1)).permute(0, 2, 3, 1, 4)
        return grouped
