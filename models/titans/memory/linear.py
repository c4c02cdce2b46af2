"""The linear memory, exact per-token rule.

The gradient of the inner loss, k_t^T (k_t M_{t-1} - v_t), is taken at the weights as of the token before. The errors of
a chunk depend on one another only through M_{t-1}, so ONE unit-lower-triangular solve gives them all, and the chunk
size changes the speed and never the result. Without momentum this is the gated delta rule (Yang et al. 2024), but that
they take the error after forgetting and we before it, as eq. 13 does.

Shapes: as in `titans.memory.rule`, with L = 1 and N = K V · C tokens of the chunk · P = C + 1.
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
        keys, directions, theta = chunk.keys, chunk.directions, chunk.theta  # [B, H, C, K] twice, [B, H, 1, C]
        (memory,), num_tokens = weights, keys.shape[2]
        surprise = momentum[0] if momentum else None
        c = Coefficients(*(x[:, :, 0] for x in chunk.weighing))
        # (I + strict_tril(W_1 * K D^T) diag(theta)) e = A_1 * (K M_0) + f_1 * (K S_0) - V, subscript 1: one token ago
        system = c.weight_PC[..., :num_tokens, :] * (keys @ directions.transpose(-1, -2)) * theta
        expected = c.keep_P[..., :num_tokens, None] * (keys @ memory) - chunk.values
        if surprise is not None:
            expected = expected + c.carry_P[..., :num_tokens, None] * (keys @ surprise)
        # (the solver reads the strict lower triangle alone: the diagonal counts as 1)
        errors = torch.linalg.solve_triangular(system, expected, upper=False, unitriangular=True)

        reads = None
        if (queries := chunk.queries) is not None:
            similar = c.weight_PC[..., 1:, :] * (queries @ directions.transpose(-1, -2)) * theta
            reads = c.keep_P[..., 1:, None] * (queries @ memory) - similar @ errors
            if surprise is not None:
                reads = reads + c.carry_P[..., 1:, None] * (queries @ surprise)

        keep, carry, decay, weight, share = (row_at(x, ends_B)[:, :, 0] for x in chunk.weighing)
        step = theta[:, :, 0]
        learnt = (directions * (-weight * step)[..., None]).transpose(-1, -2) @ errors
        after = torch.addcmul(learnt, keep[..., None, None], memory)
        if surprise is None:
            return Step([after], [], reads)
        after = torch.addcmul(after, carry[..., None, None], surprise)
        pushed = (directions * (-share * step)[..., None]).transpose(-1, -2) @ errors
        return Step([after], [torch.addcmul(pushed, decay[..., None, None], surprise)], reads)

    def read(self, weights: Tensor, queries: Tensor) -> Tensor:
        """q M: [B, H, N] and [B, H, T, K] to [B, H, T, V]."""
        return queries @ self.split(weights)[0]
