"""A hand-made report to draw: three arms on a small language model, with what real trials bring along."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from scipy import stats

from weightlab.trial.result import (
    ArmReport,
    BudgetReport,
    Profile,
    SeedRun,
    TimeMatched,
    TrialReport,
    TuningPoint,
    Versus,
)
from weightlab.trial.spec import CurvePoint

STEPS = 200
SEEDS = (100, 101, 102, 103, 104)


def compare(
    ours: Sequence[float], theirs: Sequence[float], *, mode: str = "min", minimal_effect: float = 0.01
) -> Versus:
    """Paired t comparison, as the trial would make it for a single challenger."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1)) if count > 1 else 0.0
    half = float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count) if count > 1 else math.inf
    sign = -1 if mode == "min" else 1
    low, high = sorted((sign * (mean - half), sign * (mean + half)))
    verdict = "held" if low > minimal_effect else "not held" if high < minimal_effect else "inconclusive"
    return Versus(
        baseline="adamw",
        differences=differences,
        difference=mean,
        interval=(mean - half, mean + half),
        level=0.95,
        method="paired t",
        adjusted_interval=(mean - 1.2 * half, mean + 1.2 * half) if math.isfinite(half) else (-half, half),
        p_value=0.01,
        adjusted_p_value=0.02,
        minimal_effect=minimal_effect,
        effect_size=sign * mean / deviation if deviation else None,
        win_rate=sum(1.0 if sign * d > 0 else 0.5 if d == 0 else 0.0 for d in differences) / count,
        verdict=verdict,
        seeds_needed=14 if verdict == "inconclusive" and count > 1 else None,
        time_matched=TimeMatched(
            seconds=8.4,
            steps={"adamw": 200, "challenger": 171},
            difference=mean + 0.02,
            interval=(mean + 0.02 - half, mean + 0.02 + half),
            verdict="inconclusive",
        ),
        time_to_target={"adamw": 7.9, "challenger": 5.2},
        speedup=7.9 / 5.2,
    )


def curve(rng: random.Random, floor: float, rate: float, step_ms: float, until: int = STEPS):
    """A falling loss with a little noise; a run that breaks off ends in NaN."""
    points = []
    for step in range(0, until + 1, 10):
        loss = floor + (4.6 - floor) * math.exp(-rate * step / STEPS) + rng.gauss(0, 0.012)
        points.append(CurvePoint(step, step * step_ms / 1000, loss if step else None, loss))
    if until < STEPS:
        points.append(CurvePoint(until + 10, (until + 10) * step_ms / 1000, math.nan, math.nan))
    return tuple(points)


def make_arm(
    name: str,
    *,
    floor: float,
    rate: float,
    step_ms: float,
    state_mb: float,
    seeds: Sequence[int] = SEEDS,
    broken: Sequence[int] = (),
    tune: int = 6,
    description: str = "",
) -> ArmReport:
    """One arm with tuning points (one of them diverged), report runs and costs."""
    rng = random.Random(f"{name} {floor}")
    tuning = []
    for index in range(tune):
        lr, decay = 10 ** rng.uniform(-4, -1.3), 10 ** rng.uniform(-3, 0)
        failed = index == 2
        score = 4.61 if failed else floor + 0.03 + 0.35 * (math.log10(lr) + 2.5) ** 2 + rng.gauss(0, 0.01)
        tuning.append(
            TuningPoint(
                {"lr": lr, "weight_decay": decay, "momentum": round(rng.uniform(0.85, 0.98), 3)},
                score,
                "diverged" if failed else "ok",
            )
        )
    best = min(range(tune), key=lambda index: tuning[index].score, default=None)
    if best is not None:
        tuning[best] = replace(tuning[best], chosen=True)
    runs = []
    for seed in seeds:
        shared = random.Random(seed).gauss(0, 0.02)
        bad = seed in broken
        points = curve(rng, floor + shared, rate, step_ms, until=60 if bad else STEPS)
        runs.append(
            SeedRun(
                seed,
                4.6 if bad else points[-1].metric,
                "diverged" if bad else "ok",
                points,
                None if bad else STEPS * step_ms / 1000 + rng.gauss(0, 0.05),
                "the training loss became NaN at step 63" if bad else None,
            )
        )
    scores = [run.score for run in runs]
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((s - mean) ** 2 for s in scores) / (len(scores) - 1)) if len(scores) > 1 else 0.0
    chosen = dict(tuning[best].hyperparameters) if best is not None else {"lr": 1e-3}
    return ArmReport(
        name=name,
        description=description,
        hyperparameters={**chosen, "nesterov": True},
        tuning=tuning,
        edges=(),
        runs=runs,
        mean=mean,
        std=std,
        failures=len(broken),
        step_ms=step_ms,
        train_seconds=STEPS * step_ms / 1000,
        peak_memory_mb=611.0 + 3 * state_mb,
        state_mb=state_mb,
    )


def make_report(
    *,
    seeds: Sequence[int] = SEEDS,
    names: Sequence[str] = ("adamw", "muon", "auon"),
    broken: Sequence[int] = (),
    tune: int = 6,
    task: str = "docs-gpt",
) -> TrialReport:
    """A report of a baseline and two challengers (more or fewer by `names`, the first the baseline)."""
    kinds = [(1.71, 6.0, 42.0, 6.4), (1.62, 7.0, 58.0, 3.2), (1.735, 5.8, 39.0, 3.2)]
    arms = []
    for index, name in enumerate(names):
        floor, rate, step_ms, state = kinds[index % 3]
        arm = make_arm(
            name,
            floor=floor - 0.05 * (index // 3),
            rate=rate,
            step_ms=step_ms + index,
            state_mb=state,
            seeds=seeds,
            broken=broken if index == 2 else (),
            tune=tune,
            description=f"What {name} does, in one line",
        )
        if index:
            versus = compare([run.score for run in arm.runs], [run.score for run in arms[0].runs])
            times = {names[0]: 7.9, name: 5.2 if index == 1 else None}
            versus = replace(
                versus,
                baseline=names[0],
                time_to_target=times,
                speedup=7.9 / 5.2 if index == 1 else None,
                time_matched=replace(versus.time_matched, steps={names[0]: 200, name: 171})
                if versus.time_matched
                else None,
            )
            arm = replace(arm, versus=versus)
        arms.append(arm)
    if len(arms) > 1 and tune:
        arms[1] = replace(arms[1], edges=("lr at its upper edge",))
    return TrialReport(
        task=task,
        task_description="Character GPT on the English text of Python's own documentation",
        baseline=names[0],
        metric="loss",
        mode="min",
        minimal_effect=0.01,
        level=0.95,
        target=1.9,
        budget=BudgetReport(STEPS, tune, (0,), tuple(seeds), 32, 20, 1, "cpu"),
        arms=arms,
        paired=True,
        notes=("muon tunes 3 dimensions, adamw 2: momentum is part of the method",),
        command=f"weightlab trial --task {task} --arms {','.join(names)} --tune {tune} --seeds {len(seeds)}",
        versions={"python": "3.11.2", "torch": "2.13.0", "weightlab": "0.1.0"},
        created_at="2025-01-31T12:34:56+00:00",
        seconds=312.4,
    )


def make_profile() -> Profile:
    """A profile of two arms over three tasks, one of them unsolved by the first."""
    taus = tuple(1 + 0.1 * index for index in range(31))
    times = {"adamw": (7.9, 20.0, None), "muon": (5.2, 24.0, 9.0)}
    best = [5.2, 20.0, 9.0]
    fractions = {
        name: tuple(
            sum(t is not None and t <= tau * b + 1e-9 for t, b in zip(row, best, strict=True)) / 3
            for tau in taus
        )
        for name, row in times.items()
    }
    return Profile(
        tasks=("docs-gpt", "digits-mlp", "mnist-mlp"),
        times=times,
        taus=taus,
        fractions=fractions,
        scores={name: sum(row) / len(row) for name, row in fractions.items()},
    )
