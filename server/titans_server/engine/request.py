"""The work that the engine is given, and how it answers.

A request belongs to the asyncio side until it is submitted and to the compute thread from then on; `cancelled`
alone is written from outside, and read before every step.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from titans_server.errors import TitansError

if TYPE_CHECKING:  # the scheduler, which imports this, is torch-free
    from titans.sampling import Drawn, SamplingParams
    from titans.state import State

Finish = Literal["stop", "length"]


class StepFailed(TitansError):
    """The model failed in a step: on this request, or on another one that was computed with it."""


@dataclass(frozen=True)
class Read:
    """A token that is no part of the answer, and how likely the model found it: of the prompt, or the end-of-text.

    The first one of a prompt has no probability: nothing stands before it.
    """

    drawn: "Drawn"


@dataclass(eq=False)
class Ingestion:
    """Tokens for a session's memory. The state given stays as it is; the result is another."""

    state: "State"
    tokens: list[int]
    position: int  # tokens in the state, so that blocks keep to the session's own boundaries
    done: "Future[State]" = field(default_factory=Future)
    urgent: bool = False  # an answer waits for it
    num_done: int = 0
    before: "State" = field(init=False)  # the state as it was given, where it is computed

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the result any more."""
        return self.done.cancelled()

    def next_block(self, size: int, unit: int) -> int:
        """At most `size` tokens, a multiple of `unit`, up to another one as counted from the session's start."""
        return min(len(self.tokens) - self.num_done, size - (self.position + self.num_done) % unit)


@dataclass(eq=False)
class Generation:
    """An answer to a prompt. Read-only: the state given stays as it is."""

    state: "State"
    prompt: list[int]
    max_tokens: int
    sampling: "SamplingParams"
    recall: bool  # False: the memory answers nothing
    emit: "Callable[[Read | Drawn | Finish | BaseException], None]"  # called on the compute thread; how it ended last
    echo: bool = False  # tell of the prompt's tokens, too
    num_read: int = 0  # tokens of the prompt that have been read
    num_generated: int = 0
    cancelled: bool = False
