"""What a finished trial says: plain data that the terminal table, HTML, JSON and CSV are drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from weightlab.trial.spec import CurvePoint, Scalar, Status

Verdict = Literal["held", "not held", "inconclusive"]


@dataclass(frozen=True)
class TuningPoint:
    """One tuning run: hyper-parameters tried and the validation score they earned."""

    hyperparameters: Mapping[str, Scalar]
    score: float
    status: Status
    chosen: bool = False


@dataclass(frozen=True)
class SeedRun:
    """One report run of an arm: its seed, score on the test split, learning curve, and all final metrics."""

    seed: int
    score: float
    status: Status
    curve: Sequence[CurvePoint] = ()
    train_seconds: float | None = None
    error: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TimeMatched:
    """The comparison when both arms get the same training time instead of the same steps.

    Attributes:
        seconds: The common training time: that of the faster arm.
        steps: Arm name -> steps it completes in that time.
        difference: Mean paired difference of the metric at that time, challenger − baseline.
        interval: Its interval, by the same method and level as the step-matched one.
        verdict: By the same thresholds, without correction for the number of arms.
    """

    seconds: float
    steps: Mapping[str, int]
    difference: float
    interval: tuple[float, float]
    verdict: Verdict


@dataclass(frozen=True)
class Versus:
    """A challenger against the baseline. The claim on trial: "the challenger is better".

    Attributes:
        baseline: Name of the baseline arm.
        differences: Per seed, challenger − baseline, in units of the metric (so negative is better
            when the metric is minimised).
        difference: Their mean.
        interval: Interval of the mean at confidence `level`.
        level: Confidence level of `interval`, e.g. 0.95.
        method: How the interval was made: `"paired t"` or `"BCa bootstrap"`.
        adjusted_interval: Interval at the level that Holm's correction leaves this arm; decides the verdict.
        p_value: Two-sided, of "the true difference is exactly the minimal effect", uncorrected.
        adjusted_p_value: The same after Holm's correction over the trial's challengers.
        minimal_effect: Smallest improvement worth claiming, fixed before the run, in metric units ≥ 0.
        effect_size: Mean difference over its standard deviation (Cohen's d_z with Hedges' correction),
            signed so that positive is better; `None` when differences do not vary.
        win_rate: Share of seeds in which the challenger is better; a tie counts half.
        verdict: `"held"`, `"not held"` or `"inconclusive"`.
        seeds_needed: For an inconclusive verdict, seeds that would settle it with 80 % power if the
            mean and spread stay as they are; `None` if no number under 10,000 would.
        time_matched: The comparison at equal training time; `None` when no run of an arm was timed.
        time_to_target: Arm name -> median training seconds until the target is reached; `None` where
            most seeds never reach it. Contains the challenger and the baseline.
        speedup: Baseline's time to target over the challenger's; `None` where either never reaches it.
    """

    baseline: str
    differences: Sequence[float]
    difference: float
    interval: tuple[float, float]
    level: float
    method: str
    adjusted_interval: tuple[float, float]
    p_value: float
    adjusted_p_value: float
    minimal_effect: float
    effect_size: float | None
    win_rate: float
    verdict: Verdict
    seeds_needed: int | None = None
    time_matched: TimeMatched | None = None
    time_to_target: Mapping[str, float | None] = field(default_factory=dict)
    speedup: float | None = None


@dataclass(frozen=True)
class ArmReport:
    """All that a trial found out about one arm.

    Attributes:
        name: The arm.
        description: Its one line.
        hyperparameters: Chosen by tuning, with the arm's fixed defaults.
        tuning: Every point tried, in order.
        edges: Hyper-parameters whose optimum lies at the edge of the space, e.g. `"lr at its upper edge"`.
        runs: Report runs, one a seed, in seed order.
        mean: Mean score over seeds.
        std: Sample standard deviation of the score (0 for one seed).
        failures: Report runs that did not end `"ok"`; their score is the untrained model's.
        step_ms: Median milliseconds a step.
        train_seconds: Median training seconds of a run.
        peak_memory_mb: Largest peak memory of a report run, MiB.
        state_mb: Optimizer state, MiB.
        versus: Against the baseline; `None` for the baseline itself.
    """

    name: str
    description: str
    hyperparameters: Mapping[str, Scalar]
    tuning: Sequence[TuningPoint]
    edges: Sequence[str]
    runs: Sequence[SeedRun]
    mean: float
    std: float
    failures: int
    step_ms: float | None
    train_seconds: float | None
    peak_memory_mb: float | None
    state_mb: float | None
    versus: Versus | None = None


@dataclass(frozen=True)
class BudgetReport:
    """What every arm of the trial was given.

    Attributes:
        steps: Training steps a run.
        tune: Tuning runs an arm.
        tune_seeds: Seeds used for tuning.
        seeds: Seeds reported on, disjoint from `tune_seeds`.
        batch_size: Examples a batch.
        eval_points: Evaluations along a run.
        threads: CPU threads a run.
        device: Device kind.
    """

    steps: int
    tune: int
    tune_seeds: Sequence[int]
    seeds: Sequence[int]
    batch_size: int
    eval_points: int
    threads: int
    device: str


@dataclass(frozen=True)
class TrialReport:
    """The outcome of one trial on one task.

    Attributes:
        task: Task name.
        task_description: Its one line.
        baseline: Baseline arm's name.
        metric: Name of the deciding metric.
        mode: `"min"` or `"max"`.
        minimal_effect: Threshold of every verdict, in metric units, stated before the run.
        level: Confidence level.
        target: Metric value of time-to-target.
        budget: What each arm was given.
        arms: Baseline and challengers in the order asked for.
        paired: Whether all arms had identical initial weights and data order for each seed, by hash.
        notes: Things a reader must know: unequal dimensions, edges, failures, pairing broken, ...
        command: Command line that repeats the trial.
        versions: Package versions.
        created_at: UTC time, ISO 8601.
        seconds: Training and evaluation time of all runs in sum.
    """

    task: str
    task_description: str
    baseline: str
    metric: str
    mode: Literal["min", "max"]
    minimal_effect: float
    level: float
    target: float | None
    budget: BudgetReport
    arms: Sequence[ArmReport]
    paired: bool
    notes: Sequence[str]
    command: str
    versions: Mapping[str, str]
    created_at: str
    seconds: float

    def arm(self, name: str) -> ArmReport:
        """Return one arm's report.

        Raises:
            KeyError: When the trial has no such arm.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `weightlab trial --json` prints."""
        data = asdict(self)
        for arm in data["arms"]:
            arm["metric"] = {
                "name": self.metric,
                "mode": self.mode,
                "per_seed": [run["score"] for run in arm["runs"]],
                "mean": arm.pop("mean"),
                "std": arm.pop("std"),
            }
        return data


@dataclass(frozen=True)
class Profile:
    """AlgoPerf-style performance profile of arms over several tasks.

    Attributes:
        tasks: Names of the tasks.
        times: Arm name -> per task, median seconds to target (`None`: not reached).
        taus: Time ratios to the best arm at which the profile is evaluated, from 1 upwards.
        fractions: Arm name -> share of tasks solved within tau times the best arm's time.
        scores: Arm name -> area under its profile over [1, max tau], normalised to [0, 1].
    """

    tasks: Sequence[str]
    times: Mapping[str, Sequence[float | None]]
    taus: Sequence[float]
    fractions: Mapping[str, Sequence[float]]
    scores: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return asdict(self)
