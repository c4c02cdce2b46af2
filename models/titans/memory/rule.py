"""What every memory does, whatever its weights are: absorb a run of tokens, and answer queries.

The inner loss is l(M; x_t) = 1/2 |M(k_t) - v_t|^2 (Titans, eq. 12; the 1/2 is taken out of theta). A rule is a
function from state to state. Its weights are one flat row of N floats a head, so that everything that keeps, saves or
batches states knows one shape whatever the memory is made of.

Shapes: B batch · H memory heads · L layers of the memory · T tokens · K key dim · V value dim · N floats of weights.
"""

from typing import NamedTuple

from torch import Tensor, nn


class Writes(NamedTuple):
    """What a run of tokens asks of the memory; float32 (float64 in the oracle)."""

    keys: Tensor  # [B, H, T, K], unit length
    values: Tensor  # [B, H, T, V]
    theta: Tensor  # [B, H, L, T]: step size
    log_keep: Tensor  # [B, H, L, T]: log(1 - alpha)
    log_eta: Tensor | None  # [B, H, L, T]; None: no momentum

    def slice(self, start: int, stop: int) -> "Writes":
        """Some of the tokens."""
        return Writes(
            self.keys[:, :, start:stop],
            self.values[:, :, start:stop],
            self.theta[..., start:stop],
            self.log_keep[..., start:stop],
            None if self.log_eta is None else self.log_eta[..., start:stop],
        )


class Absorbed(NamedTuple):
    """The memory after a chunk, and what it answered on the way."""

    weights: Tensor  # M [B, H, N]
    momentum: Tensor  # S [B, H, N]; as given where there is none
    reads: Tensor | None  # [B, H, T, V]: q_t answered by the memory as of token t


class Rule(nn.Module):
    """How a memory learns and answers. It holds what training learns of it: the weights it starts from."""

    bound_to_chunks: bool  # True: the result depends on where chunks begin
    start_weights: Tensor  # M_0 [H, N], float32

    def start(self, batch: int) -> Tensor:
        """M_0 for each of a batch, [B, H, N]."""
        return self.start_weights.expand(batch, -1, -1)

    def absorb(
        self,
        writes: Writes,
        weights: Tensor,
        momentum: Tensor,
        queries: Tensor | None = None,
        ends_B: Tensor | None = None,
    ) -> Absorbed:
        """One chunk: the memory after the first `ends_B[b]` tokens of row b (all by default), and the causal reads.

        `queries` [B, H, T, K] ask after each token has been written (eq. 15).
        """
        raise NotImplementedError

    def read(self, weights: Tensor, queries: Tensor) -> Tensor:
        """[B, H, T, V]: what one memory answers to all the queries; no update (eq. 15)."""
        raise NotImplementedError


def row_at(rows: Tensor, ends_B: Tensor | None) -> Tensor:
    """Of a coefficient [B, H, L, P, ...], the row after `ends_B[b]` tokens; the last one by default."""
    if ends_B is None:
        return rows[:, :, :, -1]
    return rows.take_along_dim(ends_B.view(-1, *[1] * (rows.ndim - 1)), dim=3).squeeze(3)
