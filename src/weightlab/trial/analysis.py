"""From report runs to comparisons: paired, corrected for several challengers, and matched in time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Literal

from weightlab.exceptions import TrialError, UsageError
from weightlab.trial.result import SeedRun, TimeMatched, Versus
from weightlab.trial.spec import RunResult
from weightlab.trial.statistics import (
    RESAMPLES,
    Interval,
    PairedMean,
    decide,
    effect_size,
    holm,
    seeds_needed,
    win_rate,
)

Mode = Literal["min", "max"]


def compare_arms(
    runs: Mapping[str, Sequence[SeedRun]],
    *,
    baseline: str,
    mode: Mode,
    minimal_effect: float,
    level: float = 0.95,
    step_ms: Mapping[str, float | None],
    steps: int,
    target: float | None = None,
    resamples: int = RESAMPLES,
) -> dict[str, Versus]:
    """Compare every challenger with the baseline, paired by seed.

    Everything but the Holm-adjusted quantities (adjusted interval and p-value, verdict, seeds needed)
    depends on the challenger's and the baseline's runs alone, so neither the order of the arms nor a
    further arm changes it.

    Args:
        runs: Arm name -> its report runs, one a seed; the same seeds for every arm. A failed run counts
            with its score, the untrained model's; a score that is not finite counts as worst of all.
        baseline: The arm to compare with.
        mode: `"min"` if a smaller score is better, `"max"` if a larger one is.
        minimal_effect: Smallest improvement worth claiming, in metric units, >= 0.
        level: Family-wise confidence level.
        step_ms: Arm name -> median milliseconds of a training step, `None` if unknown.
        steps: Training steps of every run.
        target: Score that counts as solved; by default the baseline's median final score.
        resamples: Bootstrap resamples.

    Returns:
        Challenger name -> comparison, in the order of `runs`.

    Raises:
        TrialError: When the baseline has no runs, or the arms' seeds differ.
        UsageError: When `minimal_effect` is negative or `level` is outside (0, 1).

    Example:
        >>> run = lambda seed, score: SeedRun(seed, score, "ok")
        >>> runs = {
        ...     "adamw": [run(0, 2.0), run(1, 2.2), run(2, 2.1)],
        ...     "muon": [run(0, 1.8), run(1, 2.1), run(2, 1.9)],
        ... }
        >>> versus = compare_arms(
        ...     runs, baseline="adamw", mode="min", minimal_effect=0.0, step_ms={}, steps=100
        ... )["muon"]
        >>> low, high = versus.interval
        >>> print(f"{versus.difference:.3f} [{low:.3f}, {high:.3f}] {versus.verdict}")
        -0.167 [-0.310, -0.023] held
    """
    if not (math.isfinite(minimal_effect) and minimal_effect >= 0):
        raise UsageError(f"minimal_effect must be a number >= 0 in units of the metric, not {minimal_effect}")
    if not 0 < level < 1:
        raise UsageError(f"level must lie between 0 and 1, e.g. 0.95, not {level}")
    _check_pairing(runs, baseline)
    sign = 1 if mode == "max" else -1
    arms = {name: sorted(arm, key=lambda run: run.seed) for name, arm in runs.items()}
    goal = default_target(arms[baseline]) if target is None else target
    reached = {name: time_to_target(arm, goal, mode) for name, arm in arms.items()}
    challengers = [name for name in arms if name != baseline]

    differences = {
        name: _differences(_scores(arms[name], mode), _scores(arms[baseline], mode)) for name in challengers
    }
    estimates = {name: PairedMean(differences[name], resamples) for name in challengers}
    p_values = {name: estimates[name].p_value(sign * minimal_effect) for name in challengers}
    corrected = holm(p_values, 1 - level)
    comparisons = {}
    for name in challengers:
        estimate, improvements = estimates[name], [sign * value for value in differences[name]]
        alpha = corrected[name].alpha
        adjusted = estimate.interval(1 - alpha)
        verdict = decide(_improvement(adjusted, mode), minimal_effect)
        ours, theirs = reached[name], reached[baseline]
        comparisons[name] = Versus(
            baseline=baseline,
            differences=differences[name],
            difference=estimate.mean,
            interval=estimate.interval(level),
            level=level,
            method=estimate.method,
            adjusted_interval=adjusted,
            p_value=p_values[name],
            adjusted_p_value=corrected[name].adjusted_p_value,
            minimal_effect=minimal_effect,
            effect_size=effect_size(improvements),
            win_rate=win_rate(improvements),
            verdict=verdict,
            seeds_needed=(
                seeds_needed(improvements, minimal_effect, alpha) if verdict == "inconclusive" else None
            ),
            time_matched=_time_matched(
                {name: arms[name], baseline: arms[baseline]},
                baseline=baseline,
                mode=mode,
                minimal_effect=minimal_effect,
                level=level,
                step_ms=step_ms,
                steps=steps,
                resamples=resamples,
            ),
            time_to_target={name: ours, baseline: theirs},
            speedup=theirs / ours if ours and theirs is not None else None,
        )
    return comparisons


def default_target(runs: Sequence[SeedRun]) -> float:
    """Return the target of a task that names none: the median final score of the baseline's `runs`.

    Example:
        >>> default_target([SeedRun(0, 2.0, "ok"), SeedRun(1, 1.5, "ok"), SeedRun(2, 1.8, "ok")])
        1.8
    """
    return median(run.score for run in runs)


def time_to_target(runs: Sequence[SeedRun], target: float, mode: Mode) -> float | None:
    """Return the median over `runs` of the training seconds until the metric reaches `target`.

    Per run: the first evaluation that reaches it, and from there linearly back to the crossing between
    that evaluation and the one before. A run that never does, or that failed, takes for ever.

    Returns:
        Seconds, or `None` where the median is infinite or there are no runs.

    Example:
        >>> from weightlab.trial.spec import CurvePoint
        >>> curve = [CurvePoint(0, 0.0, None, 4.0), CurvePoint(10, 2.0, 3.0, 2.0)]
        >>> time_to_target([SeedRun(0, 2.0, "ok", curve)], target=3.0, mode="min")
        1.0
    """
    seconds = median([_seconds_to(run, target, mode) for run in runs] or [math.inf])
    return seconds if math.isfinite(seconds) else None


def unpaired(results: Mapping[str, Sequence[RunResult]]) -> list[str]:
    """Name every seed on which arms did not start from the same weights or see the same batches.

    Initial weights are compared over all runs that got as far as having them, batches over the runs
    that ended `"ok"`, which alone went through all of them.

    Args:
        results: Arm name -> its runs.

    Returns:
        One line for each disagreement, in the order of seeds; empty when the trial was paired.

    Example:
        >>> unpaired({"adamw": [], "muon": []})
        []
    """
    seeds: dict[int, dict[str, RunResult]] = {}
    for name, runs in results.items():
        for run in runs:
            seeds.setdefault(run.spec.seed, {})[name] = run
    faults = []
    for seed, runs in sorted(seeds.items()):
        weights = {name: run.weights_hash for name, run in runs.items()}
        batches = {name: run.data_hash for name, run in runs.items() if run.status == "ok"}
        for what, hashes in (("initial weights", weights), ("training batches", batches)):
            groups: dict[str, list[str]] = {}
            for name, value in hashes.items():
                if value is not None:
                    groups.setdefault(value, []).append(name)
            if len(groups) > 1:
                faults.append(f"seed {seed}: {what} differ: {' | '.join(map(', '.join, groups.values()))}")
    return faults


def _check_pairing(runs: Mapping[str, Sequence[SeedRun]], baseline: str) -> None:
    if not runs.get(baseline):
        raise TrialError(f"the baseline {baseline!r} has no runs; arms given: {', '.join(runs) or 'none'}")
    expected = sorted(run.seed for run in runs[baseline])
    for name, arm in runs.items():
        seeds = sorted(run.seed for run in arm)
        if seeds != expected or len(set(seeds)) < len(seeds):
            raise TrialError(
                f"runs cannot be paired: {name!r} has seeds {seeds}, {baseline!r} has {expected}; "
                "every arm needs one run for each seed"
            )


def _scores(runs: Sequence[SeedRun], mode: Mode) -> list[float]:
    worst = math.inf if mode == "min" else -math.inf
    return [run.score if math.isfinite(run.score) else worst for run in runs]


def _differences(challenger: Sequence[float], baseline: Sequence[float]) -> list[float]:
    # Two infinitely bad scores are a tie; subtracting them would give NaN.
    pairs = zip(challenger, baseline, strict=True)
    return [0.0 if ours == theirs else ours - theirs for ours, theirs in pairs]


def _improvement(difference: Interval, mode: Mode) -> Interval:
    low, high = difference
    return (low, high) if mode == "max" else (-high, -low)


def _time_matched(
    arms: Mapping[str, Sequence[SeedRun]],
    *,
    baseline: str,
    mode: Mode,
    minimal_effect: float,
    level: float,
    step_ms: Mapping[str, float | None],
    steps: int,
    resamples: int,
) -> TimeMatched | None:
    """Compare two arms after the training time that the faster one needs for all its steps.

    The slower arm is read off its learning curve part-way. Its learning rate is not yet annealed there,
    so this is a lower bound on what it reaches when its schedule is made for that time.
    """
    pace = {name: step_ms.get(name) for name in arms}
    known = [value for value in pace.values() if value is not None and value > 0]
    if len(known) < 2:
        return None
    fastest = min(known)
    done = {name: int(steps * fastest / value) for name, value in pace.items() if value}
    read = {name: [_at_step(run, done[name], steps) for run in arm] for name, arm in arms.items()}
    if any(run is None for arm in read.values() for run in arm):
        return None
    scores = {name: _scores([run for run in arm if run], mode) for name, arm in read.items()}
    challenger = next(name for name in arms if name != baseline)
    estimate = PairedMean(_differences(scores[challenger], scores[baseline]), resamples)
    interval = estimate.interval(level)
    return TimeMatched(
        seconds=steps * fastest / 1000,
        steps=done,
        difference=estimate.mean,
        interval=interval,
        verdict=decide(_improvement(interval, mode), minimal_effect),
    )


def _at_step(run: SeedRun, step: int, steps: int) -> SeedRun | None:
    """Cut a run short at `step`, scored linearly between evaluations; `None` without a curve."""
    if run.status != "ok" or step >= steps:
        return run
    for before, after in pairwise(run.curve):
        if before.step <= step <= after.step:
            share = (step - before.step) / (after.step - before.step)
            return replace(run, score=before.metric + share * (after.metric - before.metric))
    return None


def _seconds_to(run: SeedRun, target: float, mode: Mode) -> float:
    if run.status != "ok" or not math.isfinite(target):
        return math.inf
    before = None
    for point in run.curve:
        if point.metric <= target if mode == "min" else point.metric >= target:
            if before is None or not math.isfinite(before.metric):
                return point.seconds
            share = (target - before.metric) / (point.metric - before.metric)
            return before.seconds + share * (point.seconds - before.seconds)
        before = point
    return math.inf
