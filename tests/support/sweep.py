"""One life after another, each damaged one step later, until there is no step left."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from support.extent import whole_or
from support.life import Life, LostError, Outcome
from support.table import Table


@dataclass(frozen=True)
class Sweep:
    """What has to come of every life, and where it is counted."""

    uninterrupted: list[Outcome]
    table: Table

    def __call__(
        self,
        row: tuple[str, str, str],  # store, fault, moment
        make_life: Callable[[], Life],
        damage: Callable[[int], AbstractContextManager[object]],  # at a step, counted from 0
        was_done: Callable[[], bool] | None = None,  # whether the step was reached; None: a life knows its troubles
        representative: int = 0,  # the step that is tried where not all are
    ) -> None:
        """Raises LostError where a life does not end as if nothing had happened."""
        num_done = 0
        for position in whole_or(range(representative, representative + 1), range(1_000)):
            life = make_life()
            with damage(position), self.table.attempt(*row) as attempt:
                if (outcome := life.run()) != self.uninterrupted:
                    raise LostError(f"step {position}: {outcome} is not {self.uninterrupted}")
                attempt.was_made = life.num_troubles > 0 if was_done is None else was_done()
            if not attempt.was_made:
                break
            num_done += 1
        assert num_done, "something was done to it"
