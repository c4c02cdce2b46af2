"""What the engine asks of the model, batch by batch, kernel by kernel; `GraphSteps` does it in one launch each."""

import torch
from titans.model import TitansModel
from titans.state import State, Stream
from torch import Tensor

from titans_server.engine.pool import Pool, move_on


class Steps:
    """The steps of one model, where it is."""

    def __init__(self, model: TitansModel) -> None:
        self._model = model

    def new_pool(self, max_running: int) -> Pool:
        """One for `decode`: `max_running` streams at most."""
        del max_running  # it grows as it must
        return Pool()

    def warm_up(self, pool: Pool) -> None:
        """Take the first steps in an empty pool, so that no request waits for what is only made once."""
        with torch.inference_mode():
            for count in (1, 2):
                pool.join(self._model.open(self._model.new_state()))
                self.decode(pool, [0] * count)
            pool.leave(1)
            pool.leave(0)

    def decode(self, pool: Pool, tokens: list[int]) -> Tensor:
        """Move every stream of a pool on by a token of its own: the scores of what follows [B, N], float32 on the CPU.

        They are good until the next call.
        """
        return scores_after(self._model, self.padded([[token] for token in tokens]), pool.stream).cpu()

    def ingest(self, parts: list[list[int]], states: list[State]) -> list[State]:
        """Each of the states after reading its part of a text; those given stay as they are."""
        if len(states) == 1:
            return [self._model.ingest(self.padded(parts), states[0])]
        sizes = [len(part) for part in parts]
        lengths = sizes if len(set(sizes)) > 1 else None
        return self._model.ingest(self.padded(parts), State.cat(states), lengths).split()

    def padded(self, parts: list[list[int]]) -> Tensor:
        """[B, T] where the model is."""
        longest = max(len(part) for part in parts)
        rows = [part + [0] * (longest - len(part)) for part in parts]
        return torch.tensor(rows, device=self._model.device)


def scores_after(model: TitansModel, tokens_B1: Tensor, stream: Stream) -> Tensor:
    """The scores [B, N] of what follows a token more of each stream; they move on in their places."""
    hidden, after = model(tokens_B1, stream)
    move_on(stream, after)
    return model.logits(hidden[:, -1])
