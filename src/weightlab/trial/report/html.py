"""The HTML report: one self-contained page that opens anywhere, forever."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightlab._pages.files import write_text
from weightlab._pages.shell import markup, render
from weightlab.trial.report import plots, wording
from weightlab.trial.result import ArmReport, Profile, TrialReport


def write(
    reports: TrialReport | Sequence[TrialReport],
    path: str | os.PathLike[str],
    profile: Profile | None = None,
) -> Path:
    """Write one HTML page about one or several trials, with everything it needs inside.

    Args:
        reports: What to write about.
        path: File to write; replaced whole, its folder is made.
        profile: Performance profile over the reports' tasks; drawn when there is more than one report.

    Returns:
        The path written.

    Raises:
        MissingDependencyError: Without matplotlib or jinja2.
        WeightlabError: When the file cannot be written.
    """
    return write_text(path, page(reports, profile))


def page(reports: TrialReport | Sequence[TrialReport], profile: Profile | None = None) -> str:
    """Return the HTML of `write`. Equal arguments give equal text."""
    many = [reports] if isinstance(reports, TrialReport) else list(reports)
    names = list(dict.fromkeys(arm.name for report in many for arm in report.arms))
    title = (
        f"{many[0].task}: {wording.headline(many[0])}" if len(many) == 1 else f"{len(many)} weightlab trials"
    )
    return render(
        "weightlab.trial.report",
        "page.html.j2",
        title=wording.plain(title),
        trials=[_trial(report, index) for index, report in enumerate(many)],
        rivals=list(
            dict.fromkeys(
                wording.plain(arm.name) for report in many for arm, _ in wording.challengers(report)
            )
        ),
        profile=None if profile is None else _profile(profile, names),
    )


def _trial(report: TrialReport, number: int) -> dict[str, Any]:
    rivals = wording.challengers(report)
    budget = report.budget
    seeds = f"{len(budget.seeds)} {'seed' if len(budget.seeds) == 1 else 'seeds'}"
    curves = []
    if plots.has_curves(report):
        kinds = ["steps", "seconds"] if plots.has_seconds(report) else ["steps"]
        curves = [markup(plots.learning_curves(report, f"{number} {kind}", against=kind)) for kind in kinds]
    figure = plots.differences(report, f"{number} differences")
    arms = [_arm(report, index, number) for index in range(len(report.arms))]
    corrected = any(versus.adjusted_interval != versus.interval for _, versus in rivals)
    return {
        "task": wording.plain(report.task),
        "description": wording.plain(report.task_description),
        "headline": wording.headline(report),
        "baseline": wording.plain(report.baseline),
        "metric": wording.plain(report.metric),
        "direction": wording.direction(report),
        "level": wording.percent(report.level),
        "seeds": seeds,
        "facts": _facts(report, seeds),
        "cards": [_card(report, arm) for arm, _ in rivals],
        "several": len(rivals) if corrected else 0,
        "verdicts": {wording.plain(arm.name): versus.verdict for arm, versus in rivals},
        "notes": wording.warnings(report),
        "differences": None if figure is None else markup(figure),
        "curves": curves,
        "failures": sum(arm.failures for arm in report.arms),
        "arms": arms,
        "cost_names": [name for name, _, _ in _COSTS],
        "per_seed": _per_seed(report),
        "errors": [
            f"{wording.plain(arm.name)}, seed {run.seed}: {wording.plain(run.error)}"
            for arm in report.arms
            for run in arm.runs
            if run.error
        ],
        "tuning_lead": _tuning_lead(report),
        "any_tuning_figure": any(arm["tuning_figure"] for arm in arms),
        "protocol": _protocol(report),
        "command": wording.plain(report.command),
        "versions": ", ".join(
            f"{wording.plain(name)} {wording.plain(version)}" for name, version in report.versions.items()
        ),
    }


def _facts(report: TrialReport, seeds: str) -> list[str]:
    budget = report.budget
    claim = (
        f"a claim needs {wording.number(report.minimal_effect)} or more"
        if report.minimal_effect
        else "a claim needs any gain"
    )
    return [
        f"test {wording.plain(report.metric)}, {wording.direction(report)}",
        f"{seeds}{', paired' if report.paired and len(report.arms) > 1 else ''}",
        f"{budget.steps:,} steps a run",
        f"{budget.tune} tuning runs an arm" if budget.tune else "no tuning",
        claim,
        wording.plain(budget.device),
        wording.plain(report.created_at)[:10],
    ]


def _card(report: TrialReport, arm: ArmReport) -> dict[str, Any]:
    versus = arm.versus
    assert versus is not None
    form = wording.difference_rounding(report)
    base = report.arm(report.baseline)
    known = any(map(math.isfinite, versus.interval))
    seeds = len(versus.differences)
    costs = []
    pace = wording.ratio(arm.step_ms, base.step_ms)
    if pace:
        costs.append(("a step takes", f"{pace} as long"))
    space = wording.ratio(arm.peak_memory_mb, base.peak_memory_mb)
    if space:
        costs.append(("peak memory", space))
    if versus.time_matched is not None:
        timed = versus.time_matched
        costs.append(
            ("at equal time", f"{form(timed.difference, signed=True)}, {timed.verdict}"),
        )
    if versus.speedup is not None:
        costs.append(("to the target", wording.speed(versus.speedup)))
    reason = wording.reason(report, arm)
    way = wording.side(report, versus.difference)
    share = wording.relative(report, versus.difference)
    return {
        "name": wording.plain(arm.name),
        "baseline": wording.plain(versus.baseline),
        "verdict": versus.verdict,
        "difference": form(versus.difference, signed=True),
        "gain": f"{wording.plain(report.metric)}, {share + ' ' if share else ''}{way}",
        "facts": [
            (f"{wording.percent(versus.level)} interval", form.range(versus.interval) if known else "none"),
            ("better in", f"{wording.wins(versus)} {'seed' if seeds == 1 else 'seeds'}"),
            *costs,
        ],
        "why": f"{reason[:1].upper()}{reason[1:]}.",
    }


_COSTS = (
    ("a step", "step_ms", lambda value: wording.duration(value / 1000)),
    ("a run", "train_seconds", wording.duration),
    ("peak memory", "peak_memory_mb", wording.memory),
    ("optimizer state", "state_mb", wording.memory),
)


def _arm(report: TrialReport, index: int, number: int) -> dict[str, Any]:
    arm, base = report.arms[index], report.arm(report.baseline)
    scores, form = wording.score_rounding(report), wording.difference_rounding(report)
    costs = []
    for _, key, write_cost in _COSTS:
        value, reference = getattr(arm, key), getattr(base, key)
        most = max((getattr(each, key) or 0.0 for each in report.arms), default=0.0)
        times = "" if arm is base else wording.ratio(value, reference)
        text = "-" if value is None else write_cost(value)
        costs.append(
            {
                "text": f"{text} ({times})" if times else text,
                "share": None if value is None or not most else f"{100 * value / most:.1f}",
            }
        )
    figure = plots.tuning(report, index, f"{number} tuning {index}")
    names = list(dict.fromkeys(name for point in arm.tuning for name in point.hyperparameters))
    result = {
        "name": wording.plain(arm.name),
        "description": wording.plain(arm.description),
        "colour": plots.colour(index),
        "dash": plots.dash(index),
        "score": f"{scores(arm.mean)} ± {scores(arm.std)}" if len(arm.runs) > 1 else scores(arm.mean),
        "difference": "-",
        "verdict": "baseline",
        "wins": "",
        "p": "",
        "effect": "",
        "timed": "",
        "timed_verdict": "",
        "target": _own_target(report, arm),
        "costs": costs,
        "settings": wording.settings(arm.hyperparameters),
        "tuning_figure": None if figure is None else markup(figure),
        "tuning_width": 20 * min(3, len(plots.tuned_names(arm))),
        "tuning_names": [wording.plain(name) for name in names],
        "tuning": [
            {
                "values": [wording.number(point.hyperparameters.get(name)) for name in names],
                "score": wording.number(point.score),
                "status": point.status,
                "chosen": point.chosen,
            }
            for point in arm.tuning
        ],
    }
    versus = arm.versus
    if versus is not None:
        result |= {
            "difference": f"{form(versus.difference, signed=True)} {form.range(versus.interval)}",
            "verdict": versus.verdict,
            "wins": wording.wins(versus),
            "p": f"{versus.adjusted_p_value:.2g}",
            "effect": "-" if versus.effect_size is None else f"{versus.effect_size:+.2f}",
        }
        timed = versus.time_matched
        if timed is not None:
            result["timed"] = f"{form(timed.difference, signed=True)} {form.range(timed.interval)}"
            result["timed_verdict"] = timed.verdict
    return result


def _own_target(report: TrialReport, arm: ArmReport) -> str:
    """The arm's median time to the target; the baseline's is kept with its challengers."""
    holders = [arm.versus] if arm.versus else [versus for _, versus in wording.challengers(report)]
    for versus in holders:
        if arm.name in versus.time_to_target:
            seconds = versus.time_to_target[arm.name]
            text = "not reached" if seconds is None else wording.duration(seconds)
            pace = "" if arm.versus is None else wording.speed(versus.speedup)
            return f"{text} ({pace})" if pace else text
    return "-"


def _per_seed(report: TrialReport) -> list[dict[str, Any]]:
    form = wording.score_rounding(report)
    found: Mapping[str, Mapping[int, Any]] = {
        arm.name: {run.seed: run for run in arm.runs} for arm in report.arms
    }
    rows = []
    for seed in dict.fromkeys(run.seed for arm in report.arms for run in arm.runs):
        runs = [found[arm.name].get(seed) for arm in report.arms]
        cells = [
            {"score": "-", "status": "ok"}
            if run is None
            else {"score": form(run.score), "status": run.status}
            for run in runs
        ]
        rows.append({"seed": seed, "cells": cells})
    return rows


def _tuning_lead(report: TrialReport) -> str:
    budget = report.budget
    if not budget.tune:
        return "Nothing was tuned: every arm ran with its defaults."
    return (
        f"Every arm had {budget.tune} quasi-random points, scored on the validation split with "
        f"{_seed_list(budget.tune_seeds)}; the best one ran on other seeds and the test split."
    )


def _seed_list(seeds: Sequence[int]) -> str:
    if not seeds:
        return "no seed"
    word = "seed" if len(seeds) == 1 else "seeds"
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{word} {seeds[0]} to {seeds[-1]}"
    return f"{word} {wording.listed([str(seed) for seed in seeds])}"


def _protocol(report: TrialReport) -> list[tuple[str, str]]:
    budget = report.budget
    rivals = wording.challengers(report)
    methods = wording.listed(list(dict.fromkeys(versus.method for _, versus in rivals)))
    facts = [
        ("Claim on trial", f"a challenger's {wording.plain(report.metric)} is better than the baseline's"),
        ("Threshold, fixed beforehand", f"{wording.number(report.minimal_effect)} better"),
        (
            "Budget a run",
            f"{budget.steps:,} steps of {budget.batch_size:,}, {budget.eval_points} evaluations",
        ),
        ("Tuning", f"{budget.tune} runs an arm, {_seed_list(budget.tune_seeds)}, validation split"),
        ("Report", f"{_seed_list(budget.seeds)}, test split"),
        (
            "Pairing",
            "same initial weights and data order in every seed, checked by hash"
            if report.paired
            else "initial weights or data order differed between arms",
        ),
        ("Failed runs", "count with the untrained model's score; none is dropped"),
        ("Device", f"{wording.plain(budget.device)}, {budget.threads} CPU threads a run"),
        ("Compute", f"{wording.duration(report.seconds)} of training and evaluation in all"),
        ("Date", wording.plain(report.created_at)),
    ]
    if methods:
        facts.insert(5, ("Interval", f"{wording.percent(report.level)}, {methods}"))
    if len(rivals) > 1:
        facts.insert(6, ("Correction", f"Holm, for {len(rivals)} challengers"))
    if report.target is not None:
        facts.insert(2, ("Target", f"{wording.plain(report.metric)} {wording.number(report.target)}"))
    return facts


def _profile(profile: Profile, names: Sequence[str]) -> dict[str, Any]:
    def order(name: str) -> int:
        return names.index(name) if name in names else len(names)

    ranked = sorted(profile.scores, key=lambda name: -profile.scores[name])
    return {
        "figure": markup(plots.profile(profile, order, "profile")),
        "tasks": [wording.plain(task) for task in profile.tasks],
        "arms": [
            {
                "name": wording.plain(name),
                "colour": plots.colour(order(name)),
                "dash": plots.dash(order(name)),
            }
            for name in ranked
        ],
        "rows": [
            {
                "name": wording.plain(name),
                "score": f"{profile.scores[name]:.3f}",
                "times": [
                    "not reached" if seconds is None else wording.duration(seconds)
                    for seconds in profile.times[name]
                ],
            }
            for name in ranked
        ],
    }
