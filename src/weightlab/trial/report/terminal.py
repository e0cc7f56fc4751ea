"""The final tables of a trial in a terminal, readable with and without colour at any width."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from weightlab.trial.report import wording
from weightlab.trial.result import ArmReport, Profile, TrialReport

STYLES = {"held": "bold green", "not held": "red", "inconclusive": "yellow"}


@dataclass(frozen=True)
class _Column:
    """A column and how readily it is given up: the highest `rank` goes first, rank 0 stays."""

    title: str
    cells: Sequence[Text]
    rank: int
    right: bool = False

    @property
    def width(self) -> int:
        lines = [
            line for text in (self.title, *(cell.plain for cell in self.cells)) for line in text.split("\n")
        ]
        return max(map(cell_len, lines))

    @property
    def empty(self) -> bool:
        return all(cell.plain in ("", "-") for cell in self.cells)


def _text(text: object, style: str = "") -> Text:
    return Text(wording.plain(text), style)


def _table(columns: Sequence[_Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column.title, justify="right" if column.right else "left", overflow="fold")
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*row)
    return table


def _split(columns: Sequence[_Column], width: int) -> tuple[list[_Column], list[_Column]]:
    """Part the columns that have something to say into those that fit `width` and the rest."""
    kept, rest = [column for column in columns if column.rank == 0 or not column.empty], []
    while sum(column.width + 2 for column in kept) > width and any(column.rank for column in kept):
        rest.insert(0, max(kept, key=lambda column: column.rank))
        kept.remove(rest[0])
    return kept, rest


def _verdict(arm: ArmReport) -> Text:
    if arm.versus is None:
        return Text("baseline", "dim")
    return Text(arm.versus.verdict, STYLES[arm.versus.verdict])


def _beside(text: str, extra: str) -> Text:
    return Text(f"{text} ({extra})" if extra else text)


def _results(report: TrialReport, plus_minus: str) -> list[_Column]:
    scores, differences = wording.score_rounding(report), wording.difference_rounding(report)
    seeds = len(report.budget.seeds)
    best = min(report.arms, key=lambda arm: -wording.improvement(report, arm.mean), default=None)
    names, means, gaps, won, corrected = [], [], [], [], []
    for arm in report.arms:
        names.append(_text(arm.name, "bold" if arm is best else ""))
        means.append(
            Text(f"{scores(arm.mean)} {plus_minus} {scores(arm.std)}" if seeds > 1 else scores(arm.mean))
        )
        versus = arm.versus
        gaps.append(
            Text("-", "dim")
            if versus is None
            else Text(f"{differences(versus.difference, signed=True)} {differences.range(versus.interval)}")
        )
        won.append(Text("" if versus is None else wording.wins(versus)))
        corrected.append(Text("" if versus is None else f"{versus.adjusted_p_value:.2g}"))
    level = wording.percent(report.level)
    return [
        _Column("arm", names, 0),
        _Column(f"test {wording.plain(report.metric)}", means, 0, right=True),
        _Column(f"difference [{level} interval]", gaps, 0),
        _Column("verdict", [_verdict(arm) for arm in report.arms], 0),
        _Column("better in", won, 1),
        _Column("p (corrected)", corrected, 2, right=True),
    ]


def _costs(report: TrialReport) -> list[_Column]:
    base = report.arm(report.baseline)
    differences = wording.difference_rounding(report)
    steps, memory, state, fair, target = [], [], [], [], []
    for arm in report.arms:
        own = arm is base
        step = "-" if arm.step_ms is None else wording.duration(arm.step_ms / 1000)
        steps.append(_beside(step, "" if own else wording.ratio(arm.step_ms, base.step_ms)))
        memory.append(
            _beside(
                wording.memory(arm.peak_memory_mb),
                "" if own else wording.ratio(arm.peak_memory_mb, base.peak_memory_mb),
            )
        )
        state.append(Text(wording.memory(arm.state_mb)))
        timed = arm.versus.time_matched if arm.versus else None
        fair.append(
            Text("-", "dim")
            if timed is None
            else Text.assemble(
                f"{differences(timed.difference, signed=True)} ", (timed.verdict, STYLES[timed.verdict])
            )
        )
        target.append(_target(report, arm))
    title = "to target" if report.target is None else f"to {wording.number(report.target)}"
    return [
        _Column("arm", [_text(arm.name) for arm in report.arms], 0),
        _Column("a step", steps, 0),
        _Column("at equal time", fair, 1),
        _Column(f"time {title}", target, 2),
        _Column("peak memory", memory, 3),
        _Column("optimizer state", state, 4, right=True),
    ]


def _target(report: TrialReport, arm: ArmReport) -> Text:
    """The arm's own median time to the target, with its speed-up over the baseline."""
    if arm.versus is not None:
        seconds = arm.versus.time_to_target.get(arm.name)
        note = wording.speed(arm.versus.speedup)
        return _beside("not reached" if seconds is None else wording.duration(seconds), note)
    known = [rival.time_to_target for _, rival in wording.challengers(report) if rival.time_to_target]
    if not known:
        return Text("-", "dim")
    seconds = known[0].get(arm.name)
    return Text("not reached" if seconds is None else wording.duration(seconds))


def _facts(report: TrialReport, dot: str) -> str:
    budget = report.budget
    seeds = len(budget.seeds)
    tuned = f"{budget.tune} tuning runs an arm" if budget.tune else "no tuning"
    facts = [
        f"{wording.plain(report.metric)} on the test split, {wording.direction(report)}",
        f"{seeds} {'paired ' if report.paired else ''}{'seed' if seeds == 1 else 'seeds'} "
        f"of {budget.steps:,} steps",
        tuned,
        wording.plain(budget.device),
    ]
    return f"{dot} ".join(facts)


def _bullets(console: Console, lines: Sequence[str], mark: str, style: str = "") -> None:
    for line in lines:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(Text(mark, style), Text(line))
        console.print(grid)


def render(
    report: TrialReport, console: Console | None = None, *, html: str | os.PathLike[str] | None = None
) -> None:
    """Print a finished trial: who won, by how much, how sure, at what cost.

    Arm, score, difference with interval and verdict are always there; costs that do not fit the width
    follow in a second table.

    Args:
        report: What to print.
        console: Where to; a rich console on standard output by default.
        html: Path of the HTML report to point to, if one was written.
    """
    console = console or Console()
    width = console.width
    plus_minus, dot = ("+/-", ";") if console.options.ascii_only else ("±", " ·")
    console.print()
    console.print(Text(f"{wording.plain(report.task)}: {wording.headline(report)}", "bold"))
    console.print(Text(_facts(report, dot), "dim"))
    console.print(_table(_split(_results(report, plus_minus), width)[0]))
    costs = _costs(report)
    kept, rest = _split(costs, width)
    console.print(_table(kept))
    while rest:
        kept, rest = _split([costs[0], *rest], width)
        if len(kept) == 1:
            break
        console.print(_table(kept))

    tuned = Table.grid(padding=(0, 2))
    tuned.add_column(overflow="fold")
    tuned.add_column(overflow="fold")
    for arm in report.arms:
        if arm.hyperparameters:
            tuned.add_row(_text(arm.name), Text(wording.settings(arm.hyperparameters)))
    if tuned.row_count:
        console.print(Text("hyper-parameters", "bold"))
        console.print(Padding(tuned, (0, 0, 1, 0)))

    _bullets(console, [wording.sentence(report, arm) for arm, _ in wording.challengers(report)], "*")
    notes = wording.warnings(report)
    if notes:
        console.print()
        _bullets(console, notes, "!", "yellow")
    if html is not None:
        console.print()
        console.print(
            Text(f"curves, tuning and all numbers: {wording.plain(os.fspath(html))}"), soft_wrap=True
        )


def render_profile(profile: Profile, console: Console | None = None) -> None:
    """Print a performance profile: per arm its score and its time to target on every task."""
    console = console or Console()
    order = sorted(profile.scores, key=lambda name: -profile.scores[name])
    columns = [
        _Column("arm", [_text(name) for name in order], 0),
        _Column("score", [Text(f"{profile.scores[name]:.3f}") for name in order], 0, right=True),
    ]
    for index, task in enumerate(profile.tasks):
        cells = []
        for name in order:
            seconds = profile.times[name][index]
            cells.append(Text("not reached" if seconds is None else wording.duration(seconds)))
        columns.append(_Column(wording.plain(task), cells, index + 1))
    console.print()
    console.print(Text(f"Over {len(profile.tasks)} tasks: training time to the target", "bold"))
    limit = wording.number(max(profile.taus, default=1.0), 3)
    console.print(
        Text(
            "score: share of tasks solved within tau times the fastest arm's time, "
            f"averaged over tau from 1 to {limit}",
            "dim",
        )
    )
    console.print(_table(_split(columns, console.width)[0]))
