"""What the engine asks of the model, batch by batch, kernel by kernel; `GraphSteps` does it in one launch each."""

from collections.abc import Iterator

import torch
from titans.model import TitansModel
from titans.state import State, Stream
from torch import Tensor

from titans_server.engine.pool import Pool, move_on


class Steps:
    """The steps of one model, where it is."""

    def __init__(self, model: TitansModel) -> None:
        self._model = model

    @property
    def largest_block(self) -> int:
        """Tokens of a document that are read at once at most; several windows only of few documents."""
        return self._model.config.window

    def new_pool(self, max_running: int) -> Pool:
        """One for `decode`: `max_running` streams at most."""
        del max_running  # it grows as it must
        return Pool()

    def warm_up(self, pool: Pool) -> None:
        """Take the first steps in an empty pool, so that no request waits for what is only made once."""
        with torch.inference_mode():
            for count in (1, 2):
                _, stream = self.read([0], self._open())
                pool.join(stream)
                self.decode(pool, [0] * count)
            pool.leave(1)
            pool.leave(0)

    def decode(self, pool: Pool, tokens: list[int]) -> Tensor:
        """Move every stream of a pool on by a token of its own: the scores of what follows [B, N], float32.

        They are where the model is, and good until the next call.
        """
        return scores_after(self._model, self.padded([[token] for token in tokens]), pool.stream)

    def ingest(self, parts: list[list[int]], states: list[State]) -> list[State]:
        """Each of the states after reading its part of a text, a `largest_block` at most; those given stay."""
        if len(states) == 1:
            return [self._model.ingest(self.padded(parts), states[0])]
        sizes = [len(part) for part in parts]
        lengths = sizes if len(set(sizes)) > 1 else None
        return self._model.ingest(self.padded(parts), State.cat(states), lengths).split()

    def opening(self, state: State) -> Iterator[Stream | None]:
        """A stream on a state, bit by bit: `TitansModel.opening`. For those who only read."""
        return self._model.opening(state.to(self._model.device))

    def read(self, tokens: list[int], stream: Stream) -> tuple[Tensor, Stream]:
        """The next tokens of a stream, a window at most: their hidden states [T, D], and the stream after them.

        The stream given must not be used again.
        """
        hidden, stream = self._model(self.padded([tokens]), stream)
        return hidden[0], stream

    def begin(self, pool: Pool, prompts: list[list[int]]) -> list[Tensor]:
        """Move the last streams of a pool on by a prompt each, a window at most: their hidden states [T, D] each."""
        lengths = [len(prompt) for prompt in prompts]
        places = pool.last(len(prompts))
        hidden_BTD, after = self._model(self.padded(prompts), places, lengths if len(set(lengths)) > 1 else None)
        move_on(places, after)
        return [hidden_TD[:length] for hidden_TD, length in zip(hidden_BTD, lengths, strict=True)]

    def _open(self) -> Stream:
        """A stream on a session that has read nothing."""
        *_, stream = self.opening(self._model.new_state())
        assert stream is not None
        return stream.clone()

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
