"""Trials inside claims: run from the claim's context, drawn as the claim's figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from weightlab.papers.figure import rounded

if TYPE_CHECKING:
    from weightlab.papers.schema import ClaimContext
    from weightlab.tasks.base import Task
    from weightlab.trial.arm import Arm
    from weightlab.trial.result import TrialReport
    from weightlab.trial.spec import Job, Progress, RunResult


def run_trial(
    ctx: ClaimContext,
    task: str | Task,
    arms: Sequence[str | Arm],
    *,
    tune: int,
    seeds: int,
    span: tuple[float, float] = (0.0, 1.0),
    **settings: Any,
) -> TrialReport:
    """Run a trial on a claim's store, device and engine, telling its progress.

    A task or arm that is an object rather than a name can only be run in this process, so then the
    engine is the local one whatever the context says; the numbers are the same.

    Args:
        ctx: The claim's context.
        task: As in `weightlab.trial.run_trial`.
        arms: As there.
        tune: Tuning points an arm.
        seeds: Report seeds.
        span: Fractions of the claim's progress at which this trial begins and ends.
        **settings: Further settings of `weightlab.trial.run_trial`.
    """
    from weightlab import trial

    named = isinstance(task, str) and all(isinstance(arm, str) for arm in arms)
    return trial.run_trial(
        task,
        arms,
        tune=tune,
        seeds=seeds,
        store=ctx.store,
        device=ctx.device,
        engine=ctx.engine if named else "local",
        workers=ctx.workers if named and ctx.engine != "local" else None,
        display=_Relay(ctx.progress, span, len(arms) * (tune + seeds)),
        **settings,
    )


def curves(report: TrialReport, title: str = "") -> dict[str, Any]:
    """Draw a trial's learning curves: the mean over seeds, with a band from lowest to highest."""
    series = []
    for arm in report.arms:
        points = list(zip(*(run.curve for run in arm.runs), strict=False))
        scores = [[point.metric for point in at_step] for at_step in points]
        series.append(
            {
                "name": arm.name,
                "x": [at_step[0].step for at_step in points],
                "y": rounded(map(statistics.fmean, scores)),
                "low": rounded(map(min, scores)),
                "high": rounded(map(max, scores)),
            }
        )
    return {
        "title": title or report.task,
        "x_label": "training step",
        "y_label": f"test {report.metric}",
        "log_x": False,
        "log_y": False,
        "series": series,
    }


class _Relay:
    """Shows a trial as the progress of the claim that it is part of."""

    def __init__(self, progress: Callable[[float, str], None], span: tuple[float, float], runs: int) -> None:
        self._progress, self._span, self._runs = progress, span, runs
        self._done = 0
        self._what = ""

    def start_phase(self, name: str, total: int, done: int) -> None:
        self._what = name
        self._done += done

    def started(self, job: Job) -> None:
        self._what = f"{job.spec.task}: {job.spec.arm}, seed {job.spec.seed}"
        self._tell(0.0)

    def progress(self, progress: Progress) -> None:
        self._tell(progress.step / progress.steps)

    def finished(self, result: RunResult, score: float) -> None:
        self._done += 1
        self._tell(0.0)

    def reused(self, result: RunResult, score: float) -> None:
        pass  # counted at the start of the phase

    def _tell(self, part: float) -> None:
        start, end = self._span
        self._progress(start + (end - start) * min(1.0, (self._done + part) / self._runs), self._what)
