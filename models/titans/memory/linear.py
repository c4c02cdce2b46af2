"""The linear memory, exact per-token rule.

The gradient of the inner loss, k_t^T (k_t M_{t-1} - v_t), is taken at the weights as of the token before. The errors of
a chunk depend on one another only through M_{t-1}, so ONE unit-lower-triangular solve gives them all, and the chunk
size changes the speed and never the result. Without momentum this is the gated delta rule (Yang et al. 2024), but that
they take the error after forgetting and we before it, as eq. 13 does.

S is kept as the steps that it is the sum of, the last R: d (x) u of each token, the direction and what it moved, of
which momentum has left so much by now. They are far smaller than S, and the products with them cheaper.

Shapes: as in `titans.memory.rule`, with L = 1, N = K V and N' = R (K + V) · C tokens of the chunk · P = C + 1.
"""

import torch
from torch import Tensor, nn

from titans.config import MemoryConfig
from titans.memory.chunk import Chunk, Coefficients
from titans.memory.rule import Rule, Step, row_at


class LinearRule(Rule):
    """M is a matrix [K, V]; q is answered with q M."""

    bound_to_chunks = False

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        zeros = torch.zeros(config.num_heads, config.num_weights)
        if config.learned_start:
            self.start_weights = nn.Parameter(zeros)
        else:
            self.register_buffer("start_weights", zeros, persistent=False)

    def step(self, chunk: Chunk, weights: list[Tensor], momentum: list[Tensor], ends_B: Tensor | None = None) -> Step:
        """One chunk of any size. `titans.memory.reference` is the same, token by token."""
        keys, along, theta = chunk.keys, chunk.directions, chunk.theta  # [B, H, C, K] twice, [B, H, 1, C]
        (memory,), num_tokens = weights, keys.shape[2]
        c = Coefficients(*(x[:, :, 0] for x in chunk.weighing))
        # (I + strict_tril(W_1 * K D^T) diag(theta)) e = A_1 * (K M_0) + f_1 * (K S_0) - V, subscript 1: one token ago
        system = c.weight_PC[..., :num_tokens, :] * (keys @ along.mT) * theta
        expected = c.keep_P[..., :num_tokens, None] * (keys @ memory) - chunk.values
        if momentum:
            expected = expected + c.carry_P[..., :num_tokens, None] * _times_sum(keys, momentum)
        # (the solver reads the strict lower triangle alone: the diagonal counts as 1)
        errors = torch.linalg.solve_triangular(system, expected, upper=False, unitriangular=True)

        reads = None
        if (queries := chunk.queries) is not None:
            similar = c.weight_PC[..., 1:, :] * (queries @ along.mT) * theta
            reads = c.keep_P[..., 1:, None] * (queries @ memory) - similar @ errors
            if momentum:
                reads = reads + c.carry_P[..., 1:, None] * _times_sum(queries, momentum)

        keep, carry, decay, weight, share = (row_at(x, ends_B)[:, :, 0, ..., None] for x in chunk.weighing)
        steps = -theta[:, :, 0, :, None] * errors
        moved, carried = weight * steps, []
        if momentum:
            before, steps_before = momentum
            along = torch.cat((before, along), dim=2)
            moved = torch.cat((carry[..., None] * steps_before, moved), dim=2)
            left = torch.cat((decay[..., None] * steps_before, share * steps), dim=2)
            carried = [_last(x, before.shape[2], ends_B) for x in (along, left)]
        after = torch.addcmul(along.mT @ moved, keep[..., None], memory)
        return Step([after], carried, reads)

    def read(self, weights: Tensor, queries: Tensor) -> Tensor:
        """q M: [B, H, N] and [B, H, T, K] to [B, H, T, V]."""
        return queries @ self.split(weights)[0]

    def surprise(self, momentum: Tensor) -> Tensor:
        """See `Rule.surprise`."""
        if not momentum.shape[1]:
            return momentum
        along, steps = self.split_momentum(momentum)
        return (along.mT @ steps).flatten(2)


def _times_sum(x: Tensor, momentum: list[Tensor]) -> Tensor:
    """x S, which is not built: [B, H, C, K] to [B, H, C, V]."""
    along, steps = momentum
    return (x @ along.mT) @ steps


def _last(rows: Tensor, count: int, ends_B: Tensor | None) -> Tensor:
    """Of `count` rows and those of a chunk [B, H, count + C, .], as many: the last ones as of its first `ends_B[b]`."""
    if ends_B is None:
        return rows[:, :, rows.shape[2] - count :]
    index = ends_B[:, None] + torch.arange(count, device=rows.device)
    return rows.take_along_dim(index[:, None, :, None], dim=2)
