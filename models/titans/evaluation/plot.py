"""The picture of a run: recall by length and by depth."""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from titans.evaluation.scoring import Cell, wilson
from titans.evaluation.task import EvaluationError

NOTHING = "--plot draws what tasks recall, and there is none"
_PARTS = 5  # of a document, in the picture by depth


def check(target: Path) -> None:
    """Raises EvaluationError where there is nothing to draw with, or no file to draw in."""
    if target.is_dir():
        raise EvaluationError(f"{target} is a folder")
    if not target.parent.is_dir():
        raise EvaluationError(f"{target.parent} is not a folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise EvaluationError('a plot needs matplotlib: pip install "titans-server[train]"')


def plot(cells: Sequence[Cell], documents: Iterable[dict[str, Any]], target: Path) -> None:
    """Draw a PNG. Bars are 95 % intervals; dashed lines have the memory off.

    Raises EvaluationError where there are no cells.
    """
    if not cells:
        raise EvaluationError(NOTHING)
    import matplotlib as mpl  # noqa: PLC0415 — slow to import, and not always there

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 — after the backend is chosen

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    for task in dict.fromkeys(cell.task for cell in cells):
        of_task = [cell for cell in cells if cell.task == task]
        lengths = [cell.tokens for cell in of_task]
        color = _draw(left, lengths, [_counts(cell, "memory") for cell in of_task], task)
        off = [(cell.tokens, *_counts(cell, "off")) for cell in of_task if "off" in cell.tallies]
        left.plot([x for x, *_ in off], [right / asked for *_, right, asked in off], "--", color=color, linewidth=0.8)
    lengths = sorted({cell.tokens for cell in cells})
    left.set(xscale="log", xlabel="tokens", ylabel="exact match", title="by length; dashed: memory off")
    left.set_xticks(lengths, [f"{length:,}" for length in lengths])
    left.minorticks_off()
    left.legend()
    for tokens, counts in by_depth(documents).items():
        places = [(i + 0.5) / _PARTS for i in range(_PARTS) if counts[i][1]]
        _draw(right, places, [count for count in counts if count[1]], f"{tokens:,} tokens")
    right.set(
        xlabel="depth (0: the document's beginning)", title="by depth; all tasks of one value", ylim=(-0.05, 1.05)
    )
    right.legend()
    figure.savefig(target, dpi=110, format="png")
    plt.close(figure)


def by_depth(documents: Iterable[dict[str, Any]]) -> dict[int, list[tuple[int, int]]]:
    """Right and asked in each fifth of the documents, by length; of the questions about one place in the document."""
    found: dict[int, list[tuple[int, int]]] = {}
    for document in documents:
        counts = found.setdefault(document["tokens"], [(0, 0)] * _PARTS)
        for question in document["questions"]:
            if len(question["depths"]) == 1:
                i = min(_PARTS - 1, int(question["depths"][0] * _PARTS))
                counts[i] = counts[i][0] + question["memory"]["right"], counts[i][1] + 1
    return dict(sorted(found.items()))


def _counts(cell: Cell, name: str) -> tuple[int, int]:
    return cell.tallies[name].right, cell.tallies[name].asked


def _draw(axes: Any, places: Sequence[float], counts: Sequence[tuple[int, int]], label: str) -> Any:
    """A line with its intervals; its colour."""
    shares = [right / asked for right, asked in counts]
    bounds = [wilson(*count) for count in counts]
    below = [max(0.0, share - low) for share, (low, _) in zip(shares, bounds, strict=True)]
    above = [max(0.0, high - share) for share, (_, high) in zip(shares, bounds, strict=True)]
    line = axes.errorbar(places, shares, yerr=(below, above), marker="o", markersize=3, capsize=2, label=label)
    return line.lines[0].get_color()
