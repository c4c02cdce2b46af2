"""`titans scratch`: a small model of any architecture from nothing, on a task that only a memory can do."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from titans.config import Architecture
from titans.training.scratch.config import PAPER, ScratchConfig, ablations
from titans.training.scratch.tasks import TASKS
from titans.training.scratch.trainer import LENGTHS, Scores, ScratchTrainer, settings
from titans.training.settings import check_run, seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `titans scratch` takes."""
    parser.add_argument("architecture", choices=get_args(Architecture))
    parser.add_argument("--task", choices=sorted(TASKS), default="recall")
    parser.add_argument("--run", type=Path, default=Path("runs/scratch"), help="where runs live; each resumes")
    parser.add_argument("--steps", type=steps, default=ScratchConfig.num_steps)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--ablations", action="store_true", help="also train it with one part less each time")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")


def steps(text: str) -> int:
    """One or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"not a number from 1: {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Train, score, print the table."""
    config = ScratchConfig(architecture=args.architecture, task=args.task, seed=args.seed, num_steps=args.steps)
    variants = ablations(config) if args.ablations else {"all": config}
    folders = {name: args.run / folder_of(config, name) for name in variants}
    try:
        for name, variant in variants.items():  # all, before minutes of work on the first
            check_run(folders[name], settings(variant, args.mixed_precision))
        rows = []
        for name, variant in variants.items():
            trainer = ScratchTrainer(
                variant, folders[name], checkpointing=args.checkpointing, mixed_precision=args.mixed_precision
            )
            rows.append((name, trainer.train()))
    except ValueError as error:
        sys.stderr.write(f"titans: scratch: {error}\n")
        return 1
    trainer.accelerator.print(table(args.architecture, rows))
    return 0


def folder_of(config: ScratchConfig, name: str) -> str:
    """The name of the folder of a run, by the name of what is left out."""
    return f"{config.architecture}-{config.task}-{name.replace(',', '').replace(' ', '-')}-{config.seed}"


def table(architecture: str, rows: Iterable[tuple[str, Scores]]) -> str:
    """Scores side by side; the lengths are those of the documents, in lengths of training. With the paper's beside."""
    longest = max(LENGTHS, key=LENGTHS.__getitem__)
    heading = "".join(f"{length:>8}" for length in LENGTHS)
    lines = [f"{'':<28}{heading}{f'memory off, {longest}':>18}{'paper, table 5':>18}"]
    for name, scores in rows:
        on = "".join(f"{scores['memory on'][length]:>8.1%}" for length in LENGTHS)
        paper = f"{PAPER[name]:.1f}%" if name in PAPER else "-"
        lines.append(f"{f'{architecture}, {name}':<28}{on}{scores['memory off'][longest]:>18.1%}{paper:>18}")
    return "\n".join(lines)


def command() -> tuple[str, object, object]:
    """The subcommand for `titans`: its help, its arguments, its action."""
    return "train a small model of any architecture from nothing", add_arguments, run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args()))
