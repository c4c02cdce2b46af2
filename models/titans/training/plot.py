"""The picture of a run: loss, teacher-forced recall, and generated recall at the end of each stage."""

import importlib.util
import json
from pathlib import Path
from typing import Any


def check() -> None:
    """Raises ValueError where there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('the picture of a run needs matplotlib: pip install "titans-server[train]"')


def plot(log: Path, target: Path) -> None:
    """Draw `log.json` of a run as a PNG."""
    import matplotlib as mpl  # noqa: PLC0415 — slow to import

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 — after the backend is chosen

    history = json.loads(log.read_text())["history"]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(9, 6), layout="constrained")

    def draw(axes: Any, name: str, label: str) -> None:
        rows = [row for row in history if name in row]
        dots = "." if name.startswith("held_out") else ""
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], dots, label=label, linewidth=0.7)

    draw(top, "recall", "all facts, read straight from the memory")
    draw(top, "answer", "answers, by the whole model")
    draw(top, "text", "plain text")
    top.set_ylabel("loss, nats a token")
    top.legend()
    draw(bottom, "recalled", "whole facts, read straight from the memory")
    draw(bottom, "held_out_recalled", "the same, unseen facts")
    draw(bottom, "right", "whole answers, teacher-forced")
    draw(bottom, "held_out_right", "the same, unseen facts")
    scored = [row for row in history if "generated" in row]
    generated = [row["generated"] for row in scored]
    bottom.plot([row["step"] for row in scored], generated, "o", label="generated: unseen text, unseen things")
    for row in scored:
        bottom.annotate(f"{row['tokens']:,}", (row["step"], row["generated"]), rotation=45)
    bottom.set_ylabel("exact match")
    bottom.set_xlabel("step")
    bottom.legend()
    figure.savefig(target, dpi=110)
