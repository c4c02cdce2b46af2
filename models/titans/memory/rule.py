"""What every memory does, whatever its weights are: absorb a run of tokens, and answer queries.

The inner loss is l(M; x_t) = 1/2 |M(k_t) - v_t|^2 (Titans, eq. 12, which has no 1/2: our theta is twice the paper's).
A rule is a function from state to state. Its weights are one flat row of N floats a head, and its momentum one of N',
so that everything that keeps, saves or batches states knows one shape whatever the memory is made of.

Shapes: B batch · H memory heads · L layers of the memory · T tokens · K key dim · V value dim · N floats of weights ·
N' floats that S is kept as · I, O inputs and outputs of a layer.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titans.config import MemoryConfig
from titans.memory.chunk import Chunk, Writes, chunks, stretches


class Absorbed(NamedTuple):
    """The memory after a run of tokens, and what it answered on the way."""

    weights: Tensor  # M [B, H, N]
    momentum: Tensor  # S [B, H, N']; as given where there is none
    reads: Tensor | None  # [B, H, T, V]: q_t answered by the memory as of token t; None where nobody asked


class Step(NamedTuple):
    """The same, layer by layer: no copy into one row and out again between two chunks."""

    weights: list[Tensor]  # [B, H, I, O] of each layer
    momentum: list[Tensor]  # of the shapes that `MemoryConfig.momentum_shapes` names; empty where there is none
    reads: Tensor | None  # [B, H, C, V]


class Rule(nn.Module):
    """How a memory learns and answers. It holds what training learns of it: the weights it starts from."""

    bound_to_chunks: bool  # True: the result depends on where chunks begin
    start_weights: Tensor  # M_0 [H, N], float32

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.chunk_size = config.chunk_size
        self.shapes = config.layer_shapes  # (I, O) of each layer
        self.momentum_shapes = config.momentum_shapes

    def start(self, batch: int) -> Tensor:
        """M_0 for each of a batch, [B, H, N]: a view of `start_weights`."""
        return self.start_weights.expand(batch, -1, -1)

    def split(self, flat: Tensor) -> list[Tensor]:
        """[B, H, N] to [B, H, I, O] of each layer: views. Nothing where there are no heads."""
        return _split(flat, self.shapes)

    def split_momentum(self, flat: Tensor) -> list[Tensor]:
        """The same of momentum [B, H, N']."""
        return _split(flat, self.momentum_shapes)

    def surprise(self, momentum: Tensor) -> Tensor:
        """S itself (eq. 10), [B, H, N], of what it is kept as [B, H, N']."""
        return momentum

    @staticmethod
    def join(layers: list[Tensor], like: Tensor) -> Tensor:
        """The inverse of `split`, a copy; of no layers, `like` itself, which has no heads."""
        return torch.cat([layer.flatten(-2) for layer in layers], dim=-1) if layers else like

    def absorb(
        self,
        writes: Writes,
        weights: Tensor,
        momentum: Tensor,
        queries: Tensor | None = None,
        ends_B: Tensor | None = None,
    ) -> Absorbed:
        """`step` on flat weights [B, H, N], all the tokens (one or more) one chunk; no momentum is [B, 0, N']."""
        (chunk,) = chunks(writes, writes.keys.shape[2], queries)
        after = self.step(chunk, self.split(weights), self.split_momentum(momentum), ends_B)
        return Absorbed(self.join(after.weights, weights), self.join(after.momentum, momentum), after.reads)

    def walk(
        self,
        writes: Writes,
        weights: Tensor,
        momentum: Tensor,
        queries: Tensor | None = None,
        ends_B: Tensor | None = None,
        *,
        keeping: bool = True,
    ) -> Absorbed:
        """`absorb`, chunk by chunk.

        Where `bound_to_chunks`, the first token begins one, and one that is not full at the end is left alone, but
        answers. `keeping` False: for a backward pass a few chunks at a time are computed again.
        """
        layers, steps = self.split(weights), self.split_momentum(momentum)
        reads, start = [], 0
        for some, asked in stretches(writes, self.chunk_size, queries):
            given = (some, layers, steps, asked, None if ends_B is None else ends_B - start)
            after = self._stretch(*given) if keeping else checkpoint(self._stretch, *given, use_reentrant=False)
            layers, steps, start = after.weights, after.momentum, start + some.keys.shape[2]
            if after.reads is not None:
                reads.append(after.reads)
        answered = torch.cat(reads, dim=2) if reads else None
        return Absorbed(self.join(layers, weights), self.join(steps, momentum), answered)

    def _stretch(
        self,
        writes: Writes,
        weights: list[Tensor],
        momentum: list[Tensor],
        queries: Tensor | None,
        ends_B: Tensor | None,
    ) -> Step:
        """A few chunks, or less than one, of which row b's first `ends_B[b]` tokens count, or all."""
        size, bound, reads = self.chunk_size, self.bound_to_chunks, []
        length = min(size, writes.keys.shape[2])
        shortest = int(ends_B.min()) if bound and ends_B is not None else writes.keys.shape[2]
        if bound and queries is None and length < size:
            return Step(weights, momentum, None)  # a chunk that only begins here is taken up when it is full
        for i, chunk in enumerate(chunks(writes, length, queries)):
            start = i * size
            complete = not bound or start + size <= shortest  # in every row
            ends = None if bound or ends_B is None else (ends_B - start).clamp(0, length)
            after = self.step(chunk, weights, momentum, ends)
            if after.reads is not None:
                reads.append(after.reads)
            if bound and not complete:
                assert ends_B is not None, "chunks are not aligned with calls"
                ended_B = ends_B >= start + size
                weights, momentum = _where(ended_B, after.weights, weights), _where(ended_B, after.momentum, momentum)
            else:
                weights, momentum = after.weights, after.momentum
        return Step(weights, momentum, torch.cat(reads, dim=2) if reads else None)

    def step(self, chunk: Chunk, weights: list[Tensor], momentum: list[Tensor], ends_B: Tensor | None = None) -> Step:
        """The memory after the first `ends_B[b]` tokens of row b (all by default), and what it answers on the way.

        Each query asks after the token of its place has been written (eq. 15). Where `bound_to_chunks`, the run is a
        chunk or the beginning of one, for gradients are taken at the weights given. These, [B, H, I, O] of each layer,
        and the momentum are not changed. `ends_B` [B] int64, 0 to C: tokens past it weigh nothing, but must be finite,
        and what is read there means nothing.
        """
        raise NotImplementedError

    def read(self, weights: Tensor, queries: Tensor) -> Tensor:
        """[B, H, T, V]: what one memory [B, H, N] answers to all the queries [B, H, T, K]; no update (eq. 15)."""
        raise NotImplementedError


def _split(flat: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    if not flat.shape[1]:
        return []
    parts = flat.split([rows * columns for rows, columns in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _where(rows_B: Tensor, new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    """Of each layer the new weights in these rows, the old ones in the others."""
    return [torch.where(rows_B[:, None, None, None], x, y) for x, y in zip(new, old, strict=True)]


def row_at(rows: Tensor, ends_B: Tensor | None) -> Tensor:
    """Of a coefficient [B, H, L, P, ...], the row after `ends_B[b]` tokens [B, H, L, ...]; the last one by default."""
    if ends_B is None:
        return rows[:, :, :, -1]
    index = ends_B.view(-1, *[1] * (rows.ndim - 1)).expand(*rows.shape[:3], 1, *rows.shape[4:])
    return rows.gather(3, index).squeeze(3)
