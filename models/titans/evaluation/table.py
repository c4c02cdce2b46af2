"""The table that is printed, a row a cell."""

from titans.evaluation.perplexity import Perplexity
from titans.evaluation.scoring import Cell, Tally

HEAD = (
    f"{'task':<11}{'tokens':>10}{'asked':>7}{'right':>7}{'95 % interval':>15}{'given':>7}"
    f"{'memory off':>12}{'full attention':>16}{'absent: a value':>17}{'planted':>12}"
)


def caption(model: str, through: str, questions_per_document: int) -> str:
    """What stands above it."""
    lines = [f"{model}, {through}; answers generated greedily; right: exact match; given: mean share of the answer"]
    if questions_per_document > 1:
        lines.append(
            f"up to {questions_per_document} questions share a document, each with needles of its own, which distract "
            "from the others': harder than RULER's one"
        )
    return "\n".join(lines)


def row(cell: Cell) -> str:
    """One cell; counts of right answers, "-" where nothing was asked."""
    memory = cell.tallies["memory"]
    low, high = memory.interval
    asked, value, planted = cell.absent
    return (
        f"{cell.task:<11}{cell.tokens:>10,}{memory.asked:>7}{memory.right:>7}{f'{low:.1%} - {high:.1%}':>15}"
        f"{memory.share:>7.1%}{_right(cell.tallies.get('off')):>12}{_right(cell.tallies.get('full')):>16}"
        f"{_of(value, asked):>17}{_of(planted, asked):>12}"
    )


def perplexity_head() -> str:
    """Of the other table: nats per token."""
    return (
        f"{'nats per token':<16}{'tokens':>10}{'memory':>9}{'memory off':>12}{'full attention':>16}"
        f"{'the body':>10}{'its full attention':>20}"
    )


def perplexity_rows(tokens: int, found: Perplexity) -> str:
    """One text read as a stream: all tokens, and those of names met again, with how many they are."""
    rows = [_nats("all", tokens, found.nats)]
    if found.names:
        rows.append(_nats(f"{found.num_names:,} of names", tokens, found.names))
    return "\n".join(rows)


def _nats(what: str, tokens: int, nats: dict[str, float]) -> str:
    conditions = ("memory", "off", "full", "body", "body_full")
    memory, off, full, body, body_full = (f"{nats[name]:.3f}" if name in nats else "-" for name in conditions)
    return f"{what:<16}{tokens:>10,}{memory:>9}{off:>12}{full:>16}{body:>10}{body_full:>20}"


def _right(tally: Tally | None) -> str:
    return "-" if tally is None else _of(tally.right, tally.asked)


def _of(count: int, total: int) -> str:
    return f"{count} of {total}" if total else "-"
