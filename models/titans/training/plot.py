"""The picture of a run: loss, teacher-forced recall, and generated recall at the end of each stage."""

import json
from pathlib import Path


def plot(log: Path, target: Path) -> None:
    """Draw `log.json` of a run as a PNG."""
    import matplotlib as mpl  # noqa: PLC0415 — slow to import

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 — after the backend is chosen

    history = json.loads(log.read_text())["history"]
    steps = [row["step"] for row in history]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(9, 6), layout="constrained")
    top.plot(steps, [row["answer"] for row in history], label="answers", linewidth=0.8)
    top.plot(steps, [row["text"] for row in history], label="plain text", linewidth=0.8)
    top.set_ylabel("loss, nats a token")
    top.legend()
    bottom.plot(steps, [row["right"] for row in history], linewidth=0.5, label="teacher-forced, a step's questions")
    scored = [row for row in history if "generated" in row]
    generated = [row["generated"] for row in scored]
    bottom.plot([row["step"] for row in scored], generated, "o", label="generated, unseen text and things")
    for row in scored:
        bottom.annotate(f"{row['tokens']:,}", (row["step"], row["generated"]), rotation=45)
    bottom.set_ylabel("exact match")
    bottom.set_xlabel("step")
    bottom.legend()
    figure.savefig(target, dpi=110)
