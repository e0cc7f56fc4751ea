"""The report's figures as SVG text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weightlab._lazy import require
from weightlab._pages.drawing import GOOD, GRID, MUTED, PAGE, SERIES, TEXT, canvas, style_axes, svg
from weightlab.trial.report import wording
from weightlab.trial.result import ArmReport, Profile, SeedRun, TrialReport, TuningPoint

ARM_COLOURS = len(SERIES)
"""Colours the page defines as `--arm-0`, ...; further arms use them again with other dashes."""

DASHES = ("", "7 3", "2 2", "9 3 2 3", "5 2", "3 1.5", "11 3", "6 2 2 2 2 2")
"""Stroke patterns that tell arms apart without colour, in points at line width 1.6."""

_MOST_POINTS = 200


def colour(index: int) -> int:
    """Return which `--arm-N` variable an arm uses: the baseline is arm 0 and has that one to itself."""
    return 0 if index == 0 else 1 + (index - 1) % (ARM_COLOURS - 1)


def dash(index: int) -> str:
    """Return an arm's stroke pattern as SVG's `stroke-dasharray`; empty for a solid line."""
    return "" if index == 0 else DASHES[1 + (index - 1) % (len(DASHES) - 1)]


def _line(index: int) -> dict[str, Any]:
    pattern = tuple(float(part) for part in dash(index).split())
    return {
        "color": SERIES[colour(index)],
        "linestyle": (0, pattern) if pattern else "-",
        "linewidth": 2.0 if index == 0 else 1.6,
    }


def _limits(values: Sequence[float], pad: float = 0.06) -> tuple[float, float] | None:
    """Return axis limits around finite values, with room beside a single one."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    room = (high - low) * pad or abs(high) * 0.05 or 1.0
    return low - room, high + room


def _mean_curve(runs: Sequence[SeedRun]) -> list[tuple[int, float, float, float, float]]:
    """Return step, seconds, mean, lowest and highest metric wherever every run that ended well has a point."""
    good = [run for run in runs if run.status == "ok" and run.curve]
    if not good:
        return []
    by_step = [{point.step: point for point in run.curve} for run in good]
    steps = sorted(set.intersection(*(set(points) for points in by_step)))
    stride = max(1, math.ceil(len(steps) / _MOST_POINTS))
    kept = sorted({*steps[::stride], *steps[-1:]})
    rows = []
    for step in kept:
        points = [run[step] for run in by_step]
        values = [point.metric for point in points]
        if all(map(math.isfinite, values)):
            seconds = sum(point.seconds for point in points) / len(points)
            rows.append((step, seconds, sum(values) / len(values), min(values), max(values)))
    return rows


def has_curves(report: TrialReport) -> bool:
    """Tell whether any arm has a learning curve to draw."""
    return any(_mean_curve(arm.runs) for arm in report.arms)


def has_seconds(report: TrialReport) -> bool:
    """Tell whether learning curves carry training seconds."""
    return any(row[1] > 0 for arm in report.arms for row in _mean_curve(arm.runs))


def learning_curves(report: TrialReport, salt: str, *, against: str) -> str:
    """Draw the metric along training, one line an arm: the mean over seeds, with the range as a band.

    The vertical axis covers what happens after the first fifth of training, where arms differ. Runs
    that failed are thin lines of their own that end in a cross.

    Args:
        report: A trial with curves.
        salt: Makes ids in this SVG differ from those of others on the page.
        against: `"steps"` or `"seconds"`.
    """
    column = 0 if against == "steps" else 1
    with canvas(5.4, 3.5) as figure:
        axes = style_axes(figure.subplots())
        seen: list[float] = []
        for index, arm in enumerate(report.arms):
            rows = _mean_curve(arm.runs)
            if not rows:
                continue
            xs = [row[column] for row in rows]
            style = _line(index)
            if len(arm.runs) - arm.failures > 1:
                axes.fill_between(
                    xs,
                    [row[3] for row in rows],
                    [row[4] for row in rows],
                    color=style["color"],
                    alpha=0.16,
                    linewidth=0,
                )
            axes.plot(xs, [row[2] for row in rows], zorder=4 if index == 0 else 3, **style)
            late = [row for row in rows if row[0] >= rows[-1][0] / 5] or rows
            seen += [value for row in late for value in row[3:]]
        for index, arm in enumerate(report.arms):
            for run in arm.runs:
                points = [point for point in run.curve if math.isfinite(point.metric)]
                if run.status == "ok" or not points:
                    continue
                xs = [point.step if column == 0 else point.seconds for point in points]
                style = {**_line(index), "linewidth": 0.8}
                axes.plot(xs, [point.metric for point in points], alpha=0.8, **style)
                axes.plot(xs[-1:], [points[-1].metric], marker="x", color=style["color"], markersize=6)
        limits = _limits(seen)
        if limits:
            axes.set_ylim(*limits)
        if report.target is not None and limits and limits[0] < report.target < limits[1]:
            axes.axhline(report.target, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
            axes.text(
                0.01,
                report.target,
                "target",
                transform=axes.get_yaxis_transform(),
                ha="left",
                va="bottom",
                fontsize=8,
                color=MUTED,
            )
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=column == 0)
        axes.set_xlabel("training steps" if column == 0 else "training seconds")
        axes.set_ylabel(f"test {wording.plain(report.metric)}")
        label = (
            f"Learning curves of {wording.listed([wording.plain(arm.name) for arm in report.arms])}: test "
            f"{wording.plain(report.metric)} against training {against}, mean and range over seeds. "
            + " ".join(
                f"{wording.plain(arm.name)} ends at {wording.score_rounding(report)(arm.mean)}."
                for arm in report.arms
            )
        )
        return svg(figure, salt, label)


def tuned_names(arm: ArmReport) -> list[str]:
    """Return the numeric hyper-parameters that took more than one value while tuning."""
    names = list(dict.fromkeys(name for point in arm.tuning for name in point.hyperparameters))
    return [name for name in names if len(set(_values(arm.tuning, name))) > 1]


def _values(points: Sequence[TuningPoint], name: str) -> list[float]:
    values = (point.hyperparameters.get(name) for point in points)
    return [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]


def tuning_limits(report: TrialReport) -> tuple[float, float] | None:
    """Return the score axis that all tuning panels of a trial share.

    It holds at least the better three quarters; scores far worse would squeeze all others together
    and are drawn at its border.
    """
    scores = sorted(
        point.score
        for arm in report.arms
        for point in arm.tuning
        if point.status == "ok" and math.isfinite(point.score)
    )
    if not scores:
        return None
    if report.mode == "max":
        scores.reverse()
    reach = 1.5 * abs(scores[math.ceil(0.75 * (len(scores) - 1))] - scores[0])
    return _limits([score for score in scores if abs(score - scores[0]) <= reach] or scores)


def tuning(report: TrialReport, index: int, salt: str) -> str | None:
    """Draw an arm's tuning points, one panel a numeric hyper-parameter; `None` with nothing to draw.

    The chosen point wears a ring, failed ones are crosses above the axis, scores beyond the axis are
    triangles at its border.
    """
    arm = report.arms[index]
    names = tuned_names(arm)
    if not names:
        return None
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    limits = tuning_limits(report) or (0.0, 1.0)
    hue = SERIES[colour(index)]
    with canvas(3.0 * columns, 2.3 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for place, axes in enumerate(grid.flat):
            if place >= len(names):
                axes.set_axis_off()
                continue
            style_axes(axes)
            _tuning_panel(axes, arm.tuning, names[place], limits, hue, lower=report.mode == "min")
            if place % columns == 0:
                axes.set_ylabel(f"validation {wording.plain(report.metric)}")
        best = next((point for point in arm.tuning if point.chosen), None)
        failed = sum(point.status != "ok" for point in arm.tuning)
        label = (
            f"Tuning of {wording.plain(arm.name)}: {len(arm.tuning)} points, {failed} failed, over "
            f"{wording.listed([wording.plain(name) for name in names])}."
        )
        if best is not None:
            label += f" Chosen: {wording.settings(best.hyperparameters)}."
        return svg(figure, salt, label)


def _tuning_panel(
    axes: Any,
    points: Sequence[TuningPoint],
    name: str,
    limits: tuple[float, float],
    hue: str,
    *,
    lower: bool,
) -> None:
    low, high = limits
    for point in points:
        x = next(iter(_values([point], name)), None)
        if x is None or not math.isfinite(x):
            continue
        if point.status != "ok" or not math.isfinite(point.score):
            # In axes coordinates: a failed run has no score that belongs on the scale.
            axes.plot(
                [x],
                [1.06],
                transform=axes.get_xaxis_transform(),
                marker="x",
                color=MUTED,
                markersize=6,
                clip_on=False,
                linestyle="",
            )
            continue
        y = min(max(point.score, low), high)
        marker = "o" if y == point.score else "^" if y == high else "v"
        fill = hue if y == point.score else "none"
        axes.plot([x], [y], marker=marker, color=hue, markerfacecolor=fill, markersize=5, clip_on=False)
        if point.chosen:
            axes.plot(
                [x],
                [y],
                marker="o",
                markersize=11,
                color=TEXT,
                markerfacecolor="none",
                markeredgewidth=1.4,
                clip_on=False,
            )
            axes.annotate(
                "chosen",
                (x, y),
                xytext=(0, 8 if lower else -8),
                textcoords="offset points",
                ha="center",
                va="bottom" if lower else "top",
                fontsize=8,
            )
    axes.set_ylim(low, high)
    values = [value for value in _values(points, name) if math.isfinite(value)]
    if values and min(values) > 0 and max(values) / min(values) >= 10:
        _log_axis(axes, min(values), max(values))
    elif (window := _limits(values)) is not None:
        axes.set_xlim(*window)
        axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(wording.plain(name))


def _log_axis(axes: Any, low: float, high: float) -> None:
    ticker = require("matplotlib.ticker", "trial")
    axes.set_xscale("log")
    room = (high / low) ** 0.06
    axes.set_xlim(low / room, high * room)
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 1.6 else (1.0, 3.0)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=6))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def differences(report: TrialReport, salt: str) -> str | None:
    """Draw each challenger's paired differences to the baseline; `None` without a challenger.

    A row a challenger: one dot a seed, joined to zero; below them the mean (diamond), its interval
    (thick) and the corrected interval that decides the verdict (thin). The shaded side is where the
    claim holds.
    """
    rivals = [(index, arm) for index, arm in enumerate(report.arms) if arm.versus is not None]
    if not rivals:
        return None
    most = max(len(arm.versus.differences) for _, arm in rivals if arm.versus)
    thickness = min(0.16, 1.6 / max(most, 1))
    heights = [thickness * most + 0.42] * len(rivals)
    sign = -1 if report.mode == "min" else 1
    threshold = sign * report.minimal_effect
    with canvas(8.6, sum(heights) + 0.85) as figure:
        axes = style_axes(figure.subplots(), grid="x")
        axes.spines["left"].set_visible(False)
        window = _limits(_reach(report, threshold), 0.08) or (-1.0, 1.0)
        axes.set_xlim(*window)
        bottom, middles = 0.0, []
        for (index, arm), height in zip(rivals, heights, strict=True):
            _difference_row(axes, report, index, arm, bottom, height, thickness, window)
            middles.append(bottom + height / 2)
            bottom += height
            if len(rivals) > 1:
                axes.axhline(bottom, color=GRID, linewidth=0.6)
        axes.set_ylim(bottom, 0)
        edge = window[0] if sign < 0 else window[1]
        axes.axvspan(threshold, edge, color=GOOD, alpha=0.10, linewidth=0, zorder=0)
        axes.axvline(0, color=TEXT, linewidth=1.0)
        if threshold:
            axes.axvline(threshold, color=GOOD, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.set_yticks(middles, [_short(arm.name) for _, arm in rivals])
        axes.tick_params(axis="y", length=0)
        claim = (
            "claim holds here"
            if not threshold
            else f"claim: at least {wording.number(abs(threshold))} better"
        )
        for x, text, side, tone in (
            (threshold, f"◀ {claim}" if sign < 0 else f"{claim} ▶", "right" if sign < 0 else "left", GOOD),
            (0, "worse ▶" if sign < 0 else "◀ worse", "left" if sign < 0 else "right", MUTED),
        ):
            axes.annotate(
                text,
                (x, 1.0),
                xycoords=axes.get_xaxis_transform(),
                xytext=(-4 if side == "right" else 4, 3),
                textcoords="offset points",
                ha=side,
                va="bottom",
                fontsize=8.5,
                color=tone,
                annotation_clip=False,
            )
        axes.set_xlabel(
            f"difference in test {wording.plain(report.metric)}, challenger − {_short(report.baseline)}"
        )
        label = "Paired differences per seed. " + " ".join(wording.sentence(report, arm) for _, arm in rivals)
        return svg(figure, salt, label)


def _reach(report: TrialReport, threshold: float) -> list[float]:
    """Values the difference axis must hold: the seeds that ended well, and intervals within reason.

    A failed run's difference can be a hundred times the others'; it is drawn at the border, so that
    the others stay apart. So is what an interval has beyond twice the span of the dots.
    """
    dots = [0.0, threshold * 1.6]
    spare: list[float] = []
    bars: list[float] = []
    for arm, versus in wording.challengers(report):
        failed = _failed_seeds(report, arm)
        for value, bad in zip(versus.differences, failed, strict=True):
            if math.isfinite(value):
                (spare if bad else dots).append(value)
        bars += [value for value in (*versus.interval, *versus.adjusted_interval) if math.isfinite(value)]
    if len(dots) == 2:
        dots += spare
    span = max(dots) - min(dots)
    low, high = min(dots) - span, max(dots) + span
    return [*dots, *(min(max(value, low), high) for value in bars)]


def _failed_seeds(report: TrialReport, arm: ArmReport) -> list[bool]:
    """Tell per paired difference whether the challenger's or the baseline's run failed."""
    theirs = {run.seed: run.status for run in report.arm(report.baseline).runs}
    failed = [run.status != "ok" or theirs.get(run.seed, "ok") != "ok" for run in arm.runs]
    count = len(arm.versus.differences) if arm.versus else 0
    return (failed + [False] * count)[:count]


def _difference_row(
    axes: Any,
    report: TrialReport,
    index: int,
    arm: ArmReport,
    bottom: float,
    height: float,
    thickness: float,
    window: tuple[float, float],
) -> None:
    versus = arm.versus
    if versus is None:
        return
    hue = SERIES[colour(index)]

    def mark(value: float, y: float, marker: str, **style: Any) -> float:
        inside = min(max(value, window[0]), window[1])
        if inside != value:
            marker = "<" if value < inside else ">"
        axes.plot([inside], [y], marker=marker, clip_on=False, **style)
        return inside

    for place, (value, bad) in enumerate(zip(versus.differences, _failed_seeds(report, arm), strict=True)):
        if not math.isfinite(value):
            continue
        y = bottom + 0.1 + thickness * (place + 0.5)
        inside = mark(value, y, "X" if bad else "o", color=hue, markersize=6 if bad else 4)
        axes.plot([0, inside], [y, y], color=hue, linewidth=0.9, alpha=0.55)
    y = bottom + height - 0.2
    for interval, width in ((versus.adjusted_interval, 1.0), (versus.interval, 3.2)):
        if all(map(math.isfinite, interval)):
            low, high = (min(max(bound, window[0]), window[1]) for bound in interval)
            axes.plot([low, high], [y, y], color=TEXT, linewidth=width, solid_capstyle="butt")
    if math.isfinite(versus.difference):
        style = {"color": TEXT, "markerfacecolor": PAGE, "markeredgewidth": 1.4}
        mark(versus.difference, y, "D", markersize=6.5, **style)


def _short(name: str, most: int = 26) -> str:
    name = wording.plain(name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def profile(data: Profile, order: Callable[[str], int], salt: str) -> str:
    """Draw a performance profile: share of tasks solved within tau times the fastest arm's time.

    Args:
        data: The profile.
        order: Arm name -> its index, which decides colour and dashes.
        salt: Makes ids in this SVG differ from those of others on the page.
    """
    with canvas(5.4, 3.3) as figure:
        axes = style_axes(figure.subplots())
        fractions: Mapping[str, Sequence[float]] = data.fractions
        for name, shares in fractions.items():
            axes.plot(data.taus, shares, drawstyle="steps-post", **_line(order(name)))
        axes.set_ylim(-0.02, 1.04)
        axes.set_xlabel("tau: training time as a multiple of the fastest arm's")
        axes.set_ylabel("share of tasks solved")
        ranked = sorted(data.scores, key=lambda name: -data.scores[name])
        label = "Performance profile. " + " ".join(
            f"{wording.plain(name)} scores {data.scores[name]:.3f}." for name in ranked
        )
        return svg(figure, salt, label)
