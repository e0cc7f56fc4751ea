"""The catalogue in a terminal: the reading list, search results, and everything about one paper."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from weightlab.papers.catalogue import STATUSES, Entry
from weightlab.papers.schema import Claim

Order = Literal["date", "room", "status"]

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_STYLES = {
    "held": "green",
    "not held": "red",
    "inconclusive": "yellow",
    "planned": "dim",
    "implemented": "cyan",
    "measured": "green",
}
_WIDE = 100


def reading_list(entries: Sequence[Entry], by: Order = "date", console: Console | None = None) -> None:
    """Print papers like a reading list, one line each, newest first.

    Args:
        entries: The papers.
        by: What to group by: year, room, or status.
        console: Where to print. Default: standard output.
    """
    console = console or Console()
    groups: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in sorted(entries, key=lambda entry: entry.paper.date, reverse=True):
        key = {"date": entry.paper.date[:4], "room": entry.paper.room, "status": entry.status}[by]
        groups[key].append(entry)
    order = {"date": list(groups), "room": sorted(groups), "status": list(STATUSES[::-1])}[by]
    slug_width = max((len(entry.paper.slug) for entry in entries), default=0)
    status_width = min(20, max((len(_outcome(entry).plain) for entry in entries), default=0))
    console.print(_totals(entries))
    for key in order:
        if not groups[key]:
            continue
        count = f" {len(groups[key])}" if by != "date" else ""
        console.print(Text.assemble("\n", (key, "bold"), (count, "dim")))
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False, expand=True)
        table.add_column(width=3 if by == "date" else 8, style="dim", no_wrap=True)
        table.add_column(width=slug_width, style="cyan", no_wrap=True)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        show_room = console.width >= _WIDE and by != "room"
        if show_room:
            table.add_column(width=8, style="dim", no_wrap=True)
        table.add_column(width=status_width)
        for entry in groups[key]:
            paper = entry.paper
            when = _month(paper.date) if by == "date" else f"{_month(paper.date)} {paper.date[:4]}"
            room = [paper.room] if show_room else []
            table.add_row(when, paper.slug, Text(paper.title), *room, _outcome(entry))
        console.print(table)


def search_results(
    results: Sequence[tuple[Entry, float]], console: Console | None = None, limit: int = 10
) -> None:
    """Print what a search found, best first.

    Args:
        results: As returned by `weightlab.papers.search`.
        console: Where to print. Default: standard output.
        limit: Papers to print at most.
    """
    console = console or Console()
    if not results:
        console.print("No paper matches. `weightlab papers` lists them all.", markup=False, highlight=False)
        return
    for entry, _ in results[:limit]:
        paper = entry.paper
        facts = f"  {_month(paper.date)} {paper.date[:4]} · {paper.room} · "
        console.print(Text.assemble((paper.slug, "bold cyan"), (facts, "dim"), _outcome(entry)))
        console.print(Padding(Text(paper.title), (0, 0, 0, 2)))
    rest = len(results) - limit
    if rest > 0:
        console.print(Text(f"… and {rest} more", style="dim"))


def show(entry: Entry, console: Console | None = None) -> None:
    """Print everything about one paper: facts, summary, parts, how to try it, claims, results.

    Args:
        entry: The paper.
        console: Where to print. Default: standard output.
    """
    console = console or Console()
    width = min(console.width, _WIDE)
    paper = entry.paper
    blocks: list[RenderableType] = [
        Text(paper.title, style="bold"),
        Text(_authors(entry), style="dim"),
        Text(),
        _facts(entry),
        *_section("Summary", Text(paper.summary)),
        *_section("Parts", _parts(entry)),
        *_section("Try it", *_commands(entry)),
    ]
    results = {result["name"]: result for result in entry.measured}
    if entry.claims:
        claims = [_claim(claim, results.get(claim.name)) for claim in entry.claims]
        blocks += _section("Claims", *claims)
    elif entry.status != "planned":
        blocks += _section("Claims", Text("None is under test yet.", style="dim"))
    if entry.record is not None and entry.scale is not None:
        run = entry.record["scales"][entry.scale]
        blocks += _section(f"Measured at scale {entry.scale}", _results(entry.measured), _provenance(run))
    console.print(Group(*blocks), width=width)


def _totals(entries: Iterable[Entry]) -> Text:
    counts = Counter(entry.status for entry in entries)
    text = Text(f"{sum(counts.values())} papers", style="bold")
    for status in STATUSES[::-1]:
        if counts[status]:
            text.append(" · ", style="dim").append(f"{counts[status]} {status}", style=_STYLES[status])
    return text


def _outcome(entry: Entry) -> Text:
    """The verdicts if there are any, else the status; those of a smoke run are no evidence, so it says so."""
    text = Text(style="not bold")
    for number, part in enumerate((entry.verdict or entry.status).split(", ")):
        text.append(", " if number else "").append(part, style=_STYLES.get(part.lstrip("0123456789 "), ""))
    return text.append(" (smoke)", style="dim") if entry.scale == "smoke" else text


def _month(date: str) -> str:
    return _MONTHS[int(date[5:7]) - 1]


def _authors(entry: Entry) -> str:
    names, count = entry.paper.authors, entry.paper.author_count
    if names:
        return ", ".join(names) + (f" and {count - len(names)} more" if count > len(names) else "")
    return f"{count} author{'s' if count != 1 else ''}"


def _facts(entry: Entry) -> Table:
    paper = entry.paper
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    venue = f", {paper.venue}" if paper.venue else ""
    link = f"https://arxiv.org/abs/{paper.arxiv}"
    table.add_row("Slug", Text(f"{paper.slug} (number {paper.number} of the list)"))
    table.add_row("Published", Text(f"{paper.date}{venue}"))
    table.add_row("arXiv", Text(link, style=f"link {link}"))
    for code in paper.code or ("none known",):
        url = code if "://" in code or code == "none known" else f"https://github.com/{code}"
        table.add_row("Official code", Text(url, style=f"link {url}" if "://" in url else ""))
    table.add_row("Room", Text(f"weightlab.{paper.room}"))
    verdict = Text.assemble(entry.status, ": ", _outcome(entry)) if entry.verdict else _outcome(entry)
    table.add_row("Status", verdict)
    return table


def _section(title: str, *content: RenderableType) -> list[RenderableType]:
    heading = Rule(Text(title, style="bold"), align="left", style="dim")
    return [Text(), heading, *content]


def _parts(entry: Entry) -> Text:
    text = Text()
    for number, part in enumerate(entry.paper.parts):
        there = part in entry.available
        text.append("\n" if number else "").append(f"weightlab.{part}", style="" if there else "dim")
        if not there:
            text.append("  planned", style=_STYLES["planned"])
    return text


def _commands(entry: Entry) -> list[Text]:
    lines = [*_import_lines(entry.available)]
    if entry.arms:
        lines.append(f"weightlab trial --task docs-gpt --arms adamw,{','.join(entry.arms)}")
    if entry.claims:
        offered = {scale for claim in entry.claims for scale in claim.scales}
        scale = next(scale for scale in ("cpu", "smoke", "gpu") if scale in offered)
        lines.append(f"weightlab reproduce {entry.paper.slug} --scale {scale}")
    if not lines:
        return [Text("Nothing to try yet: the parts above are planned.", style="dim")]
    return [Text(line, style="cyan") for line in lines]


def _import_lines(parts: Iterable[str]) -> list[str]:
    modules: defaultdict[str, list[str]] = defaultdict(list)
    for part in parts:
        module, _, name = part.rpartition(".")
        modules[module].append(name)
    return [f"from weightlab.{module} import {', '.join(names)}" for module, names in modules.items()]


def _claim(claim: Claim, result: dict[str, Any] | None) -> Group:
    heading = Text(claim.name, style="bold")
    if result is not None:
        heading.append(f"  {result['verdict']}", style=_STYLES[result["verdict"]])
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row("Statement", Text(claim.statement))
    table.add_row("Threshold", Text(claim.threshold))
    if claim.expected:
        table.add_row("Paper", Text(claim.expected))
    table.add_row("Scales", Text(", ".join(claim.scales)))
    return Group(heading, Padding(table, (0, 0, 0, 2)))


def _results(measured: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column in ("Claim", "Verdict"):
        table.add_column(column, no_wrap=True)
    table.add_column("Measured")
    for result in measured:
        verdict = result["verdict"]
        table.add_row(
            Text(result["name"]), Text(verdict, style=_STYLES[verdict]), Text(result.get("measured", ""))
        )
    return table


def _provenance(run: dict[str, Any]) -> Text:
    facts = [str(run[key]) for key in ("date", "machine") if run.get(key)]
    if isinstance(run.get("cost"), int | float):
        facts.append(f"{run['cost']:.0f} s")
    facts += [f"{package} {version}" for package, version in run.get("versions", {}).items()]
    failed = [f"{claim['name']} failed: {claim['error']}" for claim in run.get("failed", ())]
    return Text("\n".join(filter(None, [" · ".join(facts), *failed])), style="dim")
