"""One life after another, each damaged one step later, until there is no step left."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from support.life import Life, LostError, Outcome
from support.table import Table


@dataclass(frozen=True)
class Sweep:
    """Which steps are tried, and what has to come of every life."""

    positions: Iterable[int]
    uninterrupted: Outcome
    table: Table

    def __call__(
        self,
        row: tuple[str, str, str],  # store, fault, moment
        make_life: Callable[[], Life],
        damage: Callable[[int], AbstractContextManager[object]],  # at a step, counted from 0
        was_done: Callable[[], bool] | None = None,  # whether the step was reached; None: a life knows its troubles
    ) -> None:
        """Raises LostError where a life does not end as if nothing had happened."""
        num_done = 0
        for position in self.positions:
            life = make_life()
            with damage(position):
                with self.table.attempt(*row):
                    if (outcome := life.run()) != self.uninterrupted:
                        raise LostError(f"step {position}: {outcome} is not {self.uninterrupted}")
                done = life.num_troubles > 0 if was_done is None else was_done()
            if not done:
                break
            num_done += 1
        assert num_done, "something was done to it"
