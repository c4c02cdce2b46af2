"""What a session IS: every tensor that the next token needs, and nothing else.

A state is a pure function of the tokens ingested so far. Its size is fixed by the model: the millionth token
costs what the first did. There is no input or output here; `titans_server.sessions.codec` writes it down.

Shapes: B sessions · W window · D hidden. Each layer says what it carries itself (`titans.architecture`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Parts = dict[str, Tensor]  # what one layer carries from token to token, by name; [B, ...] each


@dataclass(frozen=True)
class State:
    """The states of B sessions side by side. The model never changes one that it was given."""

    position: Tensor  # [B] int64: tokens ingested
    layers: tuple[Parts, ...]  # of each layer that ingest runs
    # [B, W, D]: what the other layers were given for the last W tokens; token p in slot p % W. W = 0: there are none
    tail: Tensor

    def parts(self) -> dict[str, Tensor]:
        """All the tensors, not copied: "position", "tail", and "i.name" for the part `name` of `layers[i]`."""
        layers = {f"{i}.{name}": x for i, parts in enumerate(self.layers) for name, x in parts.items()}
        return {"position": self.position, "tail": self.tail} | layers

    @classmethod
    def from_parts(cls, parts: dict[str, Tensor]) -> "State":
        """The inverse of `parts`; nothing is copied.

        Raises KeyError where "position" or "tail" is missing, ValueError where a name has a dot but not the form
        "i.name". Other names are ignored, and whether a layer has all its parts is not checked.
        """
        names = [name.split(".") for name in parts if "." in name]
        layers: list[Parts] = [{} for _ in range(1 + max((int(i) for i, _ in names), default=-1))]
        for i, name in names:
            layers[int(i)][name] = parts[f"{i}.{name}"]
        return cls(parts["position"], tuple(layers), parts["tail"])

    @classmethod
    def cat(cls, states: Sequence["State"]) -> "State":
        """One batch of all the sessions, in order; a copy. One state at least, all of one model (not checked)."""
        every = [state.parts() for state in states]
        return cls.from_parts({name: torch.cat([parts[name] for parts in every]) for name in every[0]})

    def split(self) -> list["State"]:
        """Each session's state by itself; copies, so that one does not keep the batch alive."""
        rows = {name: x.split(1) for name, x in self.parts().items()}
        return [State.from_parts({name: x[row].clone() for name, x in rows.items()}) for row in range(self.batch_size)]

    def select(self, rows: Sequence[int]) -> "State":
        """Some of the sessions (one at least), in any order, any number of times; a copy. IndexError for others."""
        index = torch.tensor(rows, device=self.position.device)
        return self.map(lambda _, x: x[index])

    def clone(self) -> "State":
        """A copy that shares nothing."""
        return self.map(lambda _, x: x.clone())

    def to(self, device: torch.device | str) -> "State":
        """The state on a device; itself, where it is there."""
        return self if self.position.device == torch.device(device) else self.map(lambda _, x: x.to(device))

    @property
    def batch_size(self) -> int:
        """B."""
        return self.position.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all the tensors."""
        return sum(x.numel() * x.element_size() for x in self.parts().values())

    def map(self, change: Callable[[str, Tensor], Tensor]) -> "State":
        """The state that `change` makes of each of its tensors, given their names, which are those of `parts`."""
        return State.from_parts({name: change(name, x) for name, x in self.parts().items()})


@dataclass(frozen=True)
class Stream:
    """B sessions being read from: a private copy of their states, and what the other layers carry.

    A stream's rings are written in place as it moves on; the sessions' own states are not touched.
    """

    state: State  # moves on with what is read, but for its tail: not one to `open` or to keep
    upper: tuple[Parts, ...]  # of each layer that ingest does not run
    write: bool  # True: tokens are learnt as they pass; False: the memories' weights stay as they are
    recall: bool  # False: the memories answer nothing (the control)

    def map(self, change: Callable[[str, Tensor], Tensor]) -> "Stream":
        """The stream that `change` makes of each of its tensors [B, ...], given their names too."""
        state = self.state.map(change)
        upper = tuple(
            {name: change(f"upper.{i}.{name}", x) for name, x in parts.items()} for i, parts in enumerate(self.upper)
        )
        return Stream(state, upper, self.write, self.recall)

    def clone(self) -> "Stream":
        """A copy that shares nothing."""
        return self.map(lambda _, x: x.clone())

    def select(self, rows: Sequence[int]) -> "Stream":
        """Some of the streams, as `State.select`; a copy."""
        index = torch.tensor(rows, device=self.state.position.device)
        return self.map(lambda _, x: x[index])
