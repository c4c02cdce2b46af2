"""Lists, tables, records and logs: how texts state many things in one layout, a line each.

In layouts <t> is the thing, <v> its value, <a> what is told of it (<A> at a line's beginning, <k> as programs name
it), <n> what such things are called, <d> a date, <i> the line's number; <o> is a value that is told by the way, and <p>
what of. A thing stands before its value: keys are made of what comes before.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from titans.evaluation.wording import Split


@dataclass(frozen=True)
class Layout:
    """How a list looks. Its lines begin with a line's end."""

    heading: str
    line: str

    @property
    def spaced(self) -> bool:
        """Whether a space stands before a value, as it does in a sentence."""
        return " <v>" in self.line


@dataclass(frozen=True)
class Line:
    """A line of a list; the first has the heading in front."""

    thing: str
    before: str  # what it says before the value
    gap: str  # the space between, where there is one
    value: str
    after: str
    holds: bool  # no later line tells another value of the thing


_NAMES = "name item place thing entry object unit record title asset_name".split()
_DAYS = 3_000  # within which lists begin
_FIRST_DAY = datetime(2015, 1, 1)
_OTHERS = (
    ("colour", "red blue green white black brown grey yellow".split()),
    ("state", "new used old lost good poor open closed".split()),
    ("count", [str(i) for i in range(1, 40)]),
    ("floor", [str(i) for i in range(1, 10)]),
    ("shelf", "A1 A2 B1 B2 C1 C3 D4 E2".split()),
)
LAYOUTS: dict[Split, tuple[Layout, ...]] = {
    "train": (
        Layout("\n\n<A>s:\n", "\n<t>: <v>"),
        Layout("\n\n<A>s:\n", "\n- <t>: <v>"),
        Layout("\n\n<a>s by <n>", "\n<i>. <t>: <v>"),
        Layout("\n\nThe following <a>s are on file.\n", "\n* <t> – <v>"),
        Layout("\n\nHere is every <n> with its <a>:\n", "\n- **<t>**: <v>"),
        Layout("\n\n| <n> | <a> |\n|---|---|", "\n| <t> | <v> |"),
        Layout("\n\n| <n> | <p> | <a> |\n|---|---|---|", "\n| <t> | <o> | <v> |"),
        Layout("\n\n| <n> | <a> | <p> |\n|---|---|---|", "\n| <t> | <v> | <o> |"),
        Layout("\n\n<n>,<a>", "\n<t>,<v>"),
        Layout("\n\n<n>, <a>", "\n<t>, <v>"),
        Layout("\n\n<i>,<n>,<k>,<p>", "\n<i>,<t>,<v>,<o>"),
        Layout("\n\n<n>\t<a>", "\n<t>\t<v>"),
        Layout("\n\n<n>,<k>,<p>", "\n<t>,<v>,<o>"),
        Layout("\n\n<n>,<p>,<k>", "\n<t>,<o>,<v>"),
        Layout("\n\n<n>\t<p>\t<a>", "\n<t>\t<o>\t<v>"),
        Layout('\n\n"<n>","<a>"', '\n"<t>","<v>"'),
        Layout("\n\n<n>|<k>", "\n<t>|<v>"),
        Layout("\n\n|<n>|<a>|\n|-|-|", "\n|<t>|<v>|"),
        Layout("\n\n<A>s\n", "\n<t>:<v>"),
        Layout("\n\n[<k>]", "\n<t>=<v>"),
        Layout("\n", "\n<k>[<t>]=<v>"),
        Layout("\n", '\n{"<n>":"<t>","<k>":<v>}'),
        Layout("\n", '\n{"<k>":{"<t>":<v>}}'),
        Layout("\n", '\n{"<n>": "<t>", "<k>": <v>}'),
        Layout("\n", '\n{"<n>": "<t>", "<p>": "<o>", "<k>": <v>}'),
        Layout("\n\n{", '\n  "<t>": <v>,'),
        Layout("\n\n<A>s", "\n<t> = <v>"),
        Layout("\n", "\n[<t>]\n<k> = <v>"),
        Layout("\n", "\n<t>:\n  <k>: <v>"),
        Layout("\n", "\n<A> (<t>): <v>"),
        Layout("\n", "\n<A> of the <t>: <v>"),
        Layout("\n", "\n<t>, <a>: <v>"),
        Layout("\n", "\n<t> (<p>: <o>), <a> <v>"),
        Layout("\n\n<A>s\n", "\n<t> ..... <v>"),
        Layout("\n\n<table>", "\n<tr><td><t></td><td><v></td></tr>"),
        Layout("\n", "\n<d> <t> <a>: <v>"),
        Layout("\n", "\n<d> INFO <t> <a> set to <v>"),
        Layout("\n", "\n<d>: the <a> of the <t> was changed to <v>."),
        Layout("\n", "\n[<d>] <t>: <k> <v>, <p> <o>"),
        Layout("\n", "\nThe <a> of the <t> is <v>."),
        Layout("\n", "\nThe <a> for the <t> is <v>."),
        Layout("\n", "\nThe <t> has the <a> <v>."),
        Layout("\n", "\nThe <t>'s <a> is now <v>."),
        Layout("\n", "\nRemember: the <a> of <t> is <v>."),
    ),
    "test": (
        Layout("\n\nRegister of <a>s:\n", "\n<t> - <v>"),
        Layout("\n\n| Asset | <A> | Checked |\n|:--|--:|:--|", "\n| <t> | <v> | <d> |"),
        Layout("\n\nasset;<k>", "\n<t>;<v>"),
        Layout("\n", '\n{"asset": "<t>", "<k>": <v>, "ok": true}'),
        Layout("\n\nPlease learn these <a>s by heart.\n", "\n(<i>) <t>, <v>"),
        Layout("\n", "\n<d> [audit] <a> for <t> recorded as <v>"),
        Layout("\n", "\n- asset: <t>\n  <k>: <v>"),
        Layout("\n", "\nIn the register the <t> is listed with the <a> <v>."),
    ),
}


def write_list(layout: Layout, attribute: str, told: Sequence[tuple[str, str]], rng: random.Random) -> list[Line]:
    """The lines that tell `told` things and their values, in the order of the text."""
    other, choices = rng.choice(_OTHERS)
    names = {"a": attribute, "A": attribute[0].upper() + attribute[1:], "k": attribute.replace(" ", "_")}
    names |= {"n": rng.choice(_NAMES), "p": other, "i": "number"}
    gap = " " if layout.spaced else ""
    before_value, after_value = layout.line.split(f"{gap}<v>")
    before, moment = _filled(layout.heading, names), _FIRST_DAY + timedelta(days=rng.randrange(_DAYS))
    newest = {thing: i for i, (thing, _) in enumerate(told)}
    lines = []
    for i, (thing, value) in enumerate(told):
        moment += timedelta(days=rng.randrange(3), seconds=rng.randrange(86_400))
        names |= {"t": thing, "i": str(i + 1), "d": moment.isoformat(sep=" "), "o": rng.choice(choices)}
        before, after = before + _filled(before_value, names), _filled(after_value, names)
        lines.append(Line(thing, before, gap, value, after, newest[thing] == i))
        before = ""
    return [*lines[:-1], *(replace(line, after=f"{line.after}\n\n") for line in lines[-1:])]


def _filled(part: str, names: dict[str, str]) -> str:
    return re.sub(r"<(\w)>", lambda found: names[found[1]], part)
