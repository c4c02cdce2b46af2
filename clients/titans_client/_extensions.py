"""Subcommands that other packages bring, through the entry-point group `titans.commands`.

An entry point loads a callable of no arguments that returns `(help, add_arguments, run)`. It is imported only when its
command is the one that is asked for: what it imports (torch) takes seconds.
"""

import argparse
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

GROUP = "titans.commands"
EXTRAS = {
    "average": "server",
    "eval": "server",
    "keys": "server",
    "scratch": "train",
    "serve": "server",
    "train": "train",
}  # command: the extra that it needs

Run = Callable[[argparse.Namespace], int]


def installed() -> list[EntryPoint]:
    """What is there, by name; nothing is imported."""
    return sorted(entry_points(group=GROUP), key=lambda entry_point: entry_point.name)


class Parser(argparse.ArgumentParser):
    """A parser that, given an entry point, takes its arguments from there once it has something to parse."""

    def __init__(self, *args: Any, entry_point: EntryPoint | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._entry_point = entry_point

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse's."""
        if self._entry_point is not None:
            self._load(self._entry_point)
        return super().parse_known_args(args, namespace)

    def _load(self, entry_point: EntryPoint) -> None:
        self._entry_point = None
        try:
            command = entry_point.load()
        except ImportError as error:
            self.exit(1, f"titans: {entry_point.name} cannot be loaded: {error}{_remedy(entry_point.name)}\n")
        self.description, add_arguments, run = command()
        add_arguments(self)
        self.set_defaults(command=run)


def listed_help(name: str) -> str:
    """What `titans --help` says about a command that it does not import."""
    extra = EXTRAS.get(name)
    return "(from another package)" if extra is None else f'(needs "titans-server[{extra}]")'


def _remedy(name: str) -> str:
    extra = EXTRAS.get(name)
    return "" if extra is None else f'; try: pip install "titans-server[{extra}]"'
