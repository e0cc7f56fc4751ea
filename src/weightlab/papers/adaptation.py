"""Claims about adapters: arms on an adaptation task, each tuned alike, and what became of each seed.

What a run costs at the tasks' default sizes, 8 evaluations included, in processor time on a busy machine (a free core is
up to twice as fast): on `adapt-digits` 400 steps take 1.2 s (`bitfit`) to 3 s (`bone-affine`, `svfit`), 1.8 s with
`lora`; on `adapt-code` and `adapt-gpt` 300 steps take 15 s (`full-finetune`) to 24 s (`svfit`), 18 s with `lora`.
Each seed's model is pre-trained once a machine and kept: 1 s on digits, 28 s on text, for each report seed and one tuning
seed. A trial has arms × (tuning points + seeds) runs: 8 arms × (8 + 8) on digits are about 4 minutes on one core, 2 on
two; 4 arms × (4 + 5) on text about 13 and 7. Only arms given by name use the second core, by `--engine process`; `variant`
gives the name where nothing is fixed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightlab.papers import trials
from weightlab.papers.figure import rounded

if TYPE_CHECKING:
    from weightlab.papers.schema import ClaimContext
    from weightlab.tasks.base import Task
    from weightlab.trial.arm import Arm
    from weightlab.trial.result import ArmReport
    from weightlab.trial.spec import CurvePoint, Scalar


@dataclass(frozen=True)
class Outcome:
    """What one arm came to. Lists have one entry a seed, in the same order for all arms.

    Attributes:
        scores: The task's metric on the test split; a failed run has the pre-trained model's.
        early: Mean training loss over the first half of the steps; infinite where a run did not get so far.
        first: The same over the first quarter.
        late: The same over the second half.
        metrics: All final metrics, `"source_error"` or `"source_loss"` among them: what was forgotten. Not a number where
            a run did not get to the end.
        trained: Number of parameters that train, in seed 0.
        hyperparameters: Chosen by tuning, with what was fixed.
        edges: Those at an edge of their range.
        failures: Runs that failed.
        step_ms: Median milliseconds a step.
    """

    scores: list[float]
    early: list[float]
    first: list[float]
    late: list[float]
    metrics: dict[str, list[float]]
    trained: int
    hyperparameters: Mapping[str, Scalar]
    edges: Sequence[str]
    failures: int
    step_ms: float | None

    def values(self, what: str) -> list[float]:
        """Return `"score"`, `"early"`, `"first"` or `"late"`, or a metric by its name."""
        mine = {"score": self.scores, "early": self.early, "first": self.first, "late": self.late}
        return mine[what] if what in mine else self.metrics[what]


@dataclass(frozen=True)
class Adaptation:
    """What all arms came to.

    Attributes:
        metric: The task's.
        outcomes: By the names that the arms were given here.
        training: Figure of training losses.
        testing: Figure of the metric on the test split.
        cost: Seconds.
        seeds: The seeds.
        notes: What a reader must know: failures, edges, broken pairing.
    """

    metric: str
    outcomes: Mapping[str, Outcome]
    training: Mapping[str, Any]
    testing: Mapping[str, Any]
    cost: float
    seeds: Sequence[int]
    notes: Sequence[str]

    def difference(self, arm: str, other: str, what: str = "score") -> tuple[float, tuple[float, float]]:
        """Return the mean of `arm` minus `other`, paired by seed, and its 95 % interval.

        Args:
            arm: A name of `outcomes`.
            other: Another.
            what: As for `Outcome.values`.
        """
        return paired(self.outcomes[arm].values(what), self.outcomes[other].values(what))

    def log_ratio(self, arm: str, other: str, what: str = "early") -> tuple[float, tuple[float, float]]:
        """Return the mean logarithm of `arm` over `other`, paired by seed, and its 95 % interval."""
        logs = [[math.log(value) for value in self.outcomes[name].values(what)] for name in (arm, other)]
        return paired(*logs)

    def table(self, baseline: str) -> list[dict[str, Any]]:
        """Return a row for each arm, with its score minus the baseline's."""
        source = next((n for n in self.outcomes[baseline].metrics if n.startswith("source_")), None)
        rows = []
        for name, outcome in self.outcomes.items():
            mean, (low, high) = self.difference(name, baseline)
            rows.append(
                {
                    "arm": name,
                    "trained": outcome.trained,
                    "learning rate": outcome.hyperparameters.get("lr"),
                    "at an edge": ", ".join(outcome.edges),
                    "loss, first quarter": statistics.fmean(outcome.first),
                    "loss, first half": statistics.fmean(outcome.early),
                    "loss, second half": statistics.fmean(outcome.late),
                    f"test {self.metric}": statistics.fmean(outcome.scores),
                    f"minus {baseline}": mean,
                    "low": low,
                    "high": high,
                    **(
                        {source.replace("_", " "): statistics.fmean(outcome.metrics[source])}
                        if source
                        else {}
                    ),
                    "failures": outcome.failures,
                    "ms a step": outcome.step_ms,
                }
            )
        return rows

    def figure(self, *arms: str, testing: bool = False) -> dict[str, Any]:
        """Return the figure of training losses, or of the test metric, with some of its lines (default: all)."""
        whole = self.testing if testing else self.training
        return {**whole, "series": [line for line in whole["series"] if not arms or line["name"] in arms]}


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the mean of first minus second and its 95 % interval; equal infinities differ by 0.

    A pair without a number (a metric of a failed run) makes the mean and the interval say nothing.

    Example:
        >>> mean, (low, high) = paired([1.0, 2.0, 3.0], [0.0, 1.5, 2.0])
        >>> round(mean, 3), round(low, 3), round(high, 3)
        (0.833, 0.116, 1.55)
    """
    from weightlab.trial.statistics import PairedMean

    differences = [0.0 if a == b else a - b for a, b in zip(first, second, strict=True)]
    if any(map(math.isnan, differences)):
        return math.nan, (-math.inf, math.inf)
    estimate = PairedMean(differences)
    return estimate.mean, estimate.interval(0.95)


def variant(name: str, *, lr: tuple[float, float] | None = None, **fixed: Scalar) -> str | Arm:
    """Take a registered arm with some hyper-parameters fixed or its learning rates moved.

    What differs is no part of a run's key, so the arm's name says it.

    Args:
        name: The registered arm.
        lr: Lowest and highest learning rate to try.
        **fixed: Hyper-parameters and their values. One that is tuned otherwise is then not tuned.

    Returns:
        The arm; its mere name where nothing differs, since named arms can run in other processes.

    Raises:
        ValueError: When the arm has no such hyper-parameter.

    Example:
        >>> variant("lora")
        'lora'
        >>> arm = variant("lora", r=4, weight_decay=0.0)
        >>> arm.name, list(arm.search_space)
        ('lora (r 4, weight_decay 0)', ['lr'])
    """
    if not fixed and lr is None:
        return name
    from optuna.distributions import FloatDistribution

    from weightlab.trial import registry

    arm = registry.arm(name)
    if unknown := [key for key in fixed if key not in arm.defaults]:
        raise ValueError(f"arm {name!r} has no {', '.join(unknown)}; it has: {', '.join(arm.defaults)}")
    space = {key: found for key, found in arm.search_space.items() if key not in fixed}
    said = [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in fixed.items()
    ]
    defaults = {**arm.defaults, **fixed}
    if lr is not None:
        space["lr"] = FloatDistribution(*lr, log=True)
        defaults["lr"] = math.sqrt(lr[0] * lr[1])
        said.append(f"lr {lr[0]:g} to {lr[1]:g}")
    return replace(arm, name=f"{name} ({', '.join(said)})", search_space=space, defaults=defaults)


def adapt(
    ctx: ClaimContext,
    task: str | Task,
    arms: Mapping[str, str | Arm],
    *,
    tune: int,
    seeds: int,
    eval_points: int = 8,
    span: tuple[float, float] = (0.0, 1.0),
    **settings: Any,
) -> Adaptation:
    """Put arms on trial on an adaptation task; a second call reads the store.

    Args:
        ctx: The claim's context.
        task: As in `weightlab.trial.run_trial`.
        arms: Arms by the names that tables and figures show. The first is the trial's baseline.
        tune: Tuning points an arm.
        seeds: Report seeds.
        eval_points: Evaluations along a run; a multiple of 4, so that halves and quarters end at one. The
            number of steps must be a multiple of it, too.
        span: As in `weightlab.papers.trials.run_trial`.
        **settings: Further settings of `weightlab.trial.run_trial`, e.g. `steps`.

    Raises:
        ValueError: When `eval_points` or the number of steps is no such multiple.
    """
    from weightlab.trial import registry

    loaded = registry.task(task) if isinstance(task, str) else task
    steps = settings.get("steps") or loaded.steps
    if eval_points % 4 or steps % eval_points:
        raise ValueError(
            f"eval_points must be a multiple of 4 that divides the {steps} steps, not {eval_points}"
        )
    report = trials.run_trial(
        ctx, task, list(arms.values()), tune=tune, seeds=seeds, eval_points=eval_points, span=span, **settings
    )
    outcomes, training = {}, []
    for name, found in zip(arms, report.arms, strict=True):
        given = arms[name]
        arm = registry.arm(given) if isinstance(given, str) else given
        outcomes[name] = _outcome(found, steps, trained_parameters(loaded, arm, found.hyperparameters))
        training.append(_training_line(name, found))
    testing = trials.curves(report)
    lines = zip(arms, testing["series"], strict=True)
    return Adaptation(
        metric=report.metric,
        outcomes=outcomes,
        training={
            "title": f"{report.task}: training loss since the evaluation before",
            "x_label": "training step",
            "y_label": "training loss",
            "log_x": False,
            "log_y": True,
            "series": training,
        },
        testing={**testing, "series": [{**line, "name": name} for name, line in lines]},
        cost=report.seconds,
        seeds=report.budget.seeds,
        notes=report.notes,
    )


def mean_loss(curve: Sequence[CurvePoint], low: float, high: float) -> float:
    """Mean training loss over the steps from `low` to `high`, both of which were evaluated at.

    Returns:
        The mean; infinity for a run that ended before.

    Example:
        >>> from weightlab.trial.spec import CurvePoint
        >>> curve = [CurvePoint(0, 0.0, None, 1.0), CurvePoint(5, 0.1, 3.0, 1.0), CurvePoint(10, 0.2, 1.0, 1.0)]
        >>> mean_loss(curve, 0, 10), mean_loss(curve, 5, 10), mean_loss(curve, 10, 20)
        (2.0, 1.0, inf)
    """
    total, at = 0.0, low
    for point in curve:
        if low < point.step <= high and point.train_loss is not None:
            total += (point.step - at) * point.train_loss
            at = point.step
    return total / (high - low) if at == high else math.inf


def trained_parameters(task: Task, arm: Arm, hyperparameters: Mapping[str, Scalar], seed: int = 0) -> int:
    """Count what an arm's optimizers hold, set up as a run of that seed would.

    Example:
        >>> from weightlab import tasks
        >>> from weightlab.trial import registry
        >>> trained_parameters(tasks.get("digits-mlp"), registry.arm("adamw"), {})
        4810
    """
    import torch

    from weightlab.trial.hashing import derive_seed
    from weightlab.trial.runner import endless

    def generator(purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(seed, purpose))

    chosen = {**arm.defaults, **hyperparameters}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        model = task.build(generator("weights"))
        torch.manual_seed(derive_seed(seed, "set-up"))
        if arm.transform is not None:
            model = arm.transform(model, chosen)
        if arm.init is not None:
            arm.init(model, chosen, generator("arm"))
        if arm.prepare is not None:
            arm.prepare(model, chosen, endless(task, generator("prepare")), task.loss)
        made = arm.optimizer(model, chosen)
    optimizers = [made] if isinstance(made, torch.optim.Optimizer) else made
    held = {id(p): p for o in optimizers for group in o.param_groups for p in group["params"]}
    return sum(p.numel() for p in held.values() if p.requires_grad)


def _outcome(found: ArmReport, steps: int, trained: int) -> Outcome:
    def losses(low: float, high: float) -> list[float]:
        return [mean_loss(run.curve, low * steps, high * steps) for run in found.runs]

    names = list(dict.fromkeys(name for run in found.runs for name in run.metrics))
    return Outcome(
        scores=[run.score for run in found.runs],
        early=losses(0, 0.5),
        first=losses(0, 0.25),
        late=losses(0.5, 1),
        metrics={
            name: [
                run.metrics.get(name, math.nan) if run.curve and run.curve[-1].step == steps else math.nan
                for run in found.runs
            ]
            for name in names
        },
        trained=trained,
        hyperparameters=found.hyperparameters,
        edges=found.edges,
        failures=found.failures,
        step_ms=found.step_ms,
    )


def _training_line(name: str, found: ArmReport) -> dict[str, Any]:
    at_step = list(zip(*(run.curve[1:] for run in found.runs), strict=False))
    losses = [[point.train_loss for point in points if point.train_loss is not None] for points in at_step]
    return {
        "name": name,
        "x": [points[0].step for points in at_step],
        "y": rounded(map(statistics.fmean, losses)),
        "low": rounded(map(min, losses)),
        "high": rounded(map(max, losses)),
    }
