"""Parameter Efficient Fine-tuning via Explained Variance Adaptation (arXiv 2410.07170)."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightlab.papers.schema import Claim, ClaimContext, ClaimResult, Paper, Scale, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from weightlab.tasks.base import Task
    from weightlab.trial.result import SeedRun, TrialReport

PAPER = Paper(
    number=14,
    slug="eva",
    title="Parameter Efficient Fine-tuning via Explained Variance Adaptation",
    authors=(
        "Fabian Paischer",
        "Lukas Hauzenberger",
        "Thomas Schmied",
        "Benedikt Alkin",
        "Marc Peter Deisenroth",
        "Sepp Hochreiter",
    ),
    author_count=6,
    date="2024-10-09",
    arxiv="2410.07170",
    venue="NeurIPS 2025",
    code=("ml-jku/EVA", "BenediktAlkin/vtab1k-pytorch"),
    summary=(
        "EVA starts LoRA from data. Before training, mini-batches of the downstream data pass through the "
        "frozen model, and for the input of every adapted layer a principal-component basis is built "
        "incrementally until it stops turning. The down-projection starts as the leading components and "
        "the up-projection at zero, so the function is unchanged but the first gradients see the "
        "directions of largest variance. Ranks are then redistributed over the layers so that a fixed "
        "budget explains the most variance; training itself is plain LoRA. Faster convergence and the "
        "best average over language, vision and reinforcement learning are claimed, at a small cost of "
        "initialisation, and later versions prove that the choice maximises the expected gradient. The "
        "components have unit norm, which is a larger first gradient than LoRA's usual start by a factor "
        "of √3, so a random orthonormal start and a tuned learning rate for each arm are the baselines "
        "that isolate the effect of the data. The first versions were titled One Initialization to Rule "
        "them All."
    ),
    room="adapters",
    parts=("adapters.eva_init_", "adapters.ActivationPCA", "adapters.allocate_ranks"),
    keywords=(
        "PEFT",
        "LoRA",
        "initialization",
        "PCA",
        "incremental SVD",
        "rank allocation",
        "One Initialization to Rule them All",
        "fine-tuning",
    ),
)

RANK = 8
SHARE = 0.9
EARLY = 0.25
GAIN = 0.02
ARMS = {
    "LoRA": "lora",
    "unit rows": "lora-unit-rows",
    "orthonormal rows": "lora-orthonormal",
    "EVA": "eva-rho1",
    "EVA, rho 2": "eva",
    "last components": "lora-bottom",
    "PiSSA": "pissa",
}


@dataclass(frozen=True)
class _Size:
    """What a scale costs on a task.

    Attributes:
        steps: Training steps.
        tune: Learning rates and weight decays tried by each arm.
        seeds: Report seeds, and seeds of the gradients.
        batches: Batches to find components in, and as many to take gradients of.
    """

    steps: int
    tune: int
    seeds: int
    batches: int


SIZES: dict[Scale, dict[str, _Size]] = {
    "smoke": {"adapt-digits": _Size(steps=8, tune=0, seeds=2, batches=4)},
    "cpu": {
        "adapt-digits": _Size(steps=160, tune=6, seeds=8, batches=16),
        "adapt-code": _Size(steps=60, tune=4, seeds=5, batches=16),
    },
}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean over seeds."""
    from weightlab.trial.statistics import PairedMean

    return PairedMean(values).interval(0.95)


def judge_above(intervals: Sequence[tuple[float, float]], threshold: float) -> Verdict:
    """Judge "all means lie above the threshold" by their intervals."""
    if all(low > threshold for low, _ in intervals):
        return "held"
    return "not held" if any(high < threshold for _, high in intervals) else "inconclusive"


def gradient_moments(
    model: nn.Module, layers: Sequence[str], task: Task, batches: Sequence[Any]
) -> dict[str, Tensor]:
    """Sum of ‖g‖² x xᵀ over all rows of a layer's input x, g the loss's gradient by that row's output.

    With B = 0 and scaling s, a row alone gives B the gradient s·g (A x)ᵀ, so for any A the sum of their squared
    norms is s²·tr(A M Aᵀ) with this M, whatever g and x have to do with each other.
    """
    import torch

    moments: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach().flatten(0, -2).double()

            def backward(grad: Tensor) -> None:
                weights = grad.flatten(0, -2).double().square().sum(-1, keepdim=True)
                moments[name] = moments.get(name, 0) + (x * weights).T @ x

            output.register_hook(backward)

        return forward

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
    try:
        for batch in batches:
            task.loss(model, batch).backward()
            model.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
    assert all(torch.isfinite(moment).all() for moment in moments.values())
    return moments


def attained(rows: Tensor, moments: Tensor) -> float:
    """tr(A M Aᵀ) over the most that as many orthonormal rows can reach."""
    import torch

    best = torch.linalg.eigvalsh(moments)[-len(rows) :].sum()
    return float(((rows @ moments) * rows).sum() / best)


def _gradient_shares(task: Task, seed: int, batches: int) -> dict[str, dict[str, float]]:
    """Kind of A -> layer -> share attained on batches that A was not made from."""
    from itertools import islice

    import torch
    from torch import nn

    from weightlab.adapters import ActivationPCA
    from weightlab.trial.hashing import derive_seed
    from weightlab.trial.runner import endless

    model = task.build(torch.Generator().manual_seed(derive_seed(seed, "weights"))).eval()
    sizes = {name: each.in_features for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    layers = list(sizes)
    data = endless(task, torch.Generator().manual_seed(derive_seed(seed, "data")))
    seen, unseen = list(islice(data, batches)), list(islice(data, batches))
    moments = gradient_moments(model, layers, task, unseen)
    shares: dict[str, dict[str, float]] = {"EVA": {}, "not centred": {}, "random": {}, "last components": {}}
    for kind, center in (("EVA", True), ("not centred", False)):
        # All of them, so that the last ones are known too.
        pca = ActivationPCA(model, sizes, layers, center=center, progress=False)
        pca.fit(seen, forward_fn=task.loss, tau=1.0)
        for name, found in pca.components().items():
            shares[kind][name] = attained(found.directions[:RANK], moments[name])
            if center:
                shares["last components"][name] = attained(found.directions[-RANK:], moments[name])
    for name, M in moments.items():
        # The expectation over uniformly random orthonormal rows is exact: r/d of the trace.
        best = torch.linalg.eigvalsh(M)[-RANK:].sum()
        shares["random"][name] = float(RANK / len(M) * M.trace() / best)
    return shares


def _gradient_signal(ctx: ClaimContext) -> ClaimResult:
    from weightlab import tasks

    started = time.perf_counter()
    sizes = SIZES[ctx.scale]
    means: dict[str, dict[str, list[float]]] = {}
    for number, (slug, size) in enumerate(sizes.items()):
        task = tasks.get(slug)
        for seed in range(size.seeds):
            done = (number + seed / size.seeds) / len(sizes)
            ctx.progress(done, f"gradients of {slug}, seed {seed}")
            for kind, shares in _gradient_shares(task, seed, size.batches).items():
                means.setdefault(slug, {}).setdefault(kind, []).append(statistics.fmean(shares.values()))
    intervals = {slug: interval(kinds["EVA"]) for slug, kinds in means.items()}
    worst = min(intervals, key=lambda slug: statistics.fmean(means[slug]["EVA"]))
    low, high = intervals[worst]
    parts = [
        f"{statistics.fmean(kinds['EVA']):.1%} (95 % interval {intervals[slug][0]:.1%} to "
        f"{intervals[slug][1]:.1%}) on {slug}, where random rows get {statistics.fmean(kinds['random']):.1%} and "
        f"components that are not centred {statistics.fmean(kinds['not centred']):.1%}"
        for slug, kinds in means.items()
    ]
    return ClaimResult(
        verdict=judge_above(list(intervals.values()), SHARE),
        measured=f"EVA's rows get this much of the most squared gradient that rank {RANK} can: "
        f"{'; '.join(parts)}.",
        value=statistics.fmean(means[worst]["EVA"]),
        interval=(low, high),
        table=[
            {
                "task": slug,
                "rows of A": kind,
                "share": statistics.fmean(values),
                "low": bounds[0],
                "high": bounds[1],
            }
            for slug, kinds in means.items()
            for kind, values in kinds.items()
            for bounds in [interval(values)]
        ],
        cost=time.perf_counter() - started,
        seeds=range(max(size.seeds for size in sizes.values())),
    )


def early_loss(run: SeedRun) -> float:
    """Mean training loss of the first quarter of the steps: the area under its curve there; inf if it has none."""
    points = [point for point in run.curve if point.train_loss is not None]
    share = [point.train_loss for point in points if point.step <= EARLY * points[-1].step]
    return statistics.fmean(loss for loss in share if loss is not None) if share else math.inf


def judge_better(early: tuple[float, float], final: tuple[float, float]) -> Verdict:
    """Judge "the loss falls faster and ends no worse".

    Args:
        early: Interval of the relative difference of early losses.
        final: Interval of the difference of final scores, in the task's minimal effects; positive is worse.
    """
    if early[1] < -GAIN and final[1] < 1:
        return "held"
    return "not held" if early[0] > -GAIN or final[0] > 1 else "inconclusive"


def judge_cheaper(parameters: tuple[float, float], final: tuple[float, float]) -> Verdict:
    """Judge "fewer parameters, and no worse", by intervals of the relative and, as above, final differences."""
    if parameters[1] < 0 and final[1] < 1:
        return "held"
    return "not held" if parameters[0] > 0 or final[0] > 1 else "inconclusive"


def judge_all(verdicts: Sequence[Verdict]) -> Verdict:
    """Judge "on every task"."""
    if "not held" in verdicts:
        return "not held"
    return "inconclusive" if "inconclusive" in verdicts else "held"


@dataclass(frozen=True)
class _Comparison:
    """Two arms on a task: means and intervals of the differences, second minus first."""

    early: float
    early_interval: tuple[float, float]
    final: float
    final_interval: tuple[float, float]


def _train(ctx: ClaimContext) -> dict[str, TrialReport]:
    """Train every arm on every task; a second call reads the store."""
    from weightlab.papers import trials

    sizes = SIZES[ctx.scale]
    return {
        task: trials.run_trial(
            ctx,
            task,
            list(ARMS.values()),
            tune=size.tune,
            seeds=size.seeds,
            steps=size.steps,
            eval_points=4,
            span=(number / len(sizes), (number + 1) / len(sizes)),
        )
        for number, (task, size) in enumerate(sizes.items())
    }


def _compare(report: TrialReport, task: Task, first: str, second: str) -> _Comparison:
    a, b = (report.arm(ARMS[name]).runs for name in (first, second))
    early = [early_loss(y) / early_loss(x) - 1 for x, y in zip(a, b, strict=True)]
    sign = 1 if task.mode == "min" else -1
    final = [sign * (y.score - x.score) / task.minimal_effect for x, y in zip(a, b, strict=True)]
    return _Comparison(statistics.fmean(early), interval(early), statistics.fmean(final), interval(final))


def _rows(reports: dict[str, TrialReport]) -> list[dict[str, Any]]:
    """Every arm on every task."""
    return [
        {
            "task": task,
            "rows of A": name,
            "learning rate": f"{arm.hyperparameters['lr']:.2g}{' (edge)' if arm.edges else ''}",
            "early training loss": statistics.fmean(map(early_loss, arm.runs)),
            "final score": arm.mean,
        }
        for task, report in reports.items()
        for name, slug in ARMS.items()
        for arm in [report.arm(slug)]
    ]


def _figure(report: TrialReport) -> dict[str, Any]:
    """Training losses of all arms on a task."""
    from weightlab.papers.figure import rounded

    series = []
    for name, slug in ARMS.items():
        points = list(zip(*(run.curve[1:] for run in report.arm(slug).runs), strict=False))
        losses = [[point.train_loss for point in at_step if point.train_loss] for at_step in points]
        series.append(
            {
                "name": name,
                "x": [at_step[0].step for at_step in points],
                "y": rounded(map(statistics.fmean, losses)),
                "low": rounded(map(min, losses)),
                "high": rounded(map(max, losses)),
            }
        )
    return {
        "title": f"Training loss on {report.task}",
        "x_label": "training step",
        "y_label": "mean training loss since the point before",
        "log_x": False,
        "log_y": True,
        "series": series,
    }


def _percent(value: float, bounds: tuple[float, float]) -> str:
    return f"{value:+.1%} (95 % interval {bounds[0]:+.1%} to {bounds[1]:+.1%})"


def _times(value: float, bounds: tuple[float, float]) -> str:
    return f"{value:+.2f} ({bounds[0]:+.2f} to {bounds[1]:+.2f}) minimal effects"


def _beats_random(ctx: ClaimContext) -> ClaimResult:
    from weightlab import tasks

    reports = _train(ctx)
    found = {
        task: _compare(report, tasks.get(task), "orthonormal rows", "EVA") for task, report in reports.items()
    }
    verdicts: dict[str, Verdict] = {
        task: judge_better(each.early_interval, each.final_interval) for task, each in found.items()
    }
    decisive = max(found, key=lambda task: found[task].early)
    parts = [
        f"on {task} early loss {_percent(each.early, each.early_interval)}, final score worse by "
        f"{_times(each.final, each.final_interval)}: {verdicts[task]}"
        for task, each in found.items()
    ]
    return ClaimResult(
        verdict=judge_all(list(verdicts.values())),
        measured=f"EVA against random orthonormal rows, each tuned: {'; '.join(parts)}.",
        value=found[decisive].early,
        interval=found[decisive].early_interval,
        figure=_figure(reports[decisive]),
        table=_rows(reports),
        cost=sum(report.seconds for report in reports.values()),
        seeds=range(max(size.seeds for size in SIZES[ctx.scale].values())),
    )


def _parameters(task: Task, arm: str, seed: int) -> int:
    """Trained parameters of a run of an arm, set up as the run does."""
    import torch

    from weightlab.trial import registry
    from weightlab.trial.hashing import derive_seed
    from weightlab.trial.runner import endless

    chosen = registry.arm(arm)
    assert chosen.transform is not None
    assert chosen.prepare is not None
    model = task.build(torch.Generator().manual_seed(derive_seed(seed, "weights")))
    model = chosen.transform(model, chosen.defaults)
    batches = endless(task, torch.Generator().manual_seed(derive_seed(seed, "prepare")))
    chosen.prepare(model, chosen.defaults, batches, task.loss)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _cheaper(ctx: ClaimContext) -> ClaimResult:
    from weightlab import tasks

    sizes, reports = SIZES[ctx.scale], _train(ctx)
    parts: list[str] = []
    rows: list[dict[str, Any]] = []
    verdicts: list[Verdict] = []
    saved: dict[str, tuple[float, tuple[float, float]]] = {}
    for slug, report in reports.items():
        task, size = tasks.get(slug), sizes[slug]
        each = _compare(report, task, "EVA", "EVA, rho 2")
        counts = {
            name: [_parameters(task, ARMS[name], seed) for seed in range(size.seeds)]
            for name in ("EVA", "EVA, rho 2")
        }
        ratios = [two / one - 1 for one, two in zip(*counts.values(), strict=True)]
        saved[slug] = (statistics.fmean(ratios), interval(ratios))
        verdicts.append(judge_cheaper(saved[slug][1], each.final_interval))
        parts.append(
            f"on {slug} parameters {_percent(*saved[slug])}, final score worse by "
            f"{_times(each.final, each.final_interval)}: {verdicts[-1]}"
        )
        rows += [
            {"task": slug, "rho": rho, "parameters": statistics.fmean(counts[name]), "final score": mean}
            for rho, name in ((1, "EVA"), (2, "EVA, rho 2"))
            for mean in [report.arm(ARMS[name]).mean]
        ]
    decisive = max(saved, key=lambda slug: saved[slug][0])
    return ClaimResult(
        verdict=judge_all(verdicts),
        measured=f"rho 2 against rho 1 at the same sum of ranks: {'; '.join(parts)}.",
        value=saved[decisive][0],
        interval=saved[decisive][1],
        table=rows,
        cost=sum(report.seconds for report in reports.values()),
        seeds=range(max(size.seeds for size in sizes.values())),
    )


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="gradient-signal",
        statement="Of all orthonormal rows, the leading principal components of a layer's input give the "
        "up-projection close to the largest expected squared gradient at the start.",
        threshold=f"Share of the largest mean squared gradient of B that {RANK} orthonormal rows can reach, by "
        "single rows of unseen batches, averaged over all linear layers of the pre-trained model. Held if the "
        f"95 % interval over seeds lies above {SHARE:.0%} on both tasks; not held if on one it lies below.",
        expected="the largest, if gradients at the output do not depend on the input and inputs have no mean",
        run=_gradient_signal,
    ),
    Claim(
        name="beats-random-rows",
        statement="Started from the leading components, LoRA's loss falls faster than from random orthonormal rows, "
        "and it ends no worse.",
        threshold=f"Mean training loss over the first {EARLY:.0%} of steps, relative, and final score, in the task's "
        "minimal effects, EVA (rho 1) minus random orthonormal rows, paired by seed, each at the best of as many "
        f"points of learning rate and weight decay. Held if on both tasks the 95 % intervals lie below -{GAIN:.0%} and below 1; not held if on "
        f"one the first lies above -{GAIN:.0%} or the second above 1.",
        expected="faster convergence and the best average over language, vision and reinforcement learning",
        run=_beats_random,
    ),
    Claim(
        name="redistribution",
        statement="Dealing ranks anew with rho = 2 ends no worse than rho = 1 and trains fewer parameters.",
        threshold="Trained parameters, relative, and final score, in the task's minimal effects, rho 2 minus rho 1, "
        "paired by seed, each at the best of as many points of learning rate and weight decay. Held if on both tasks the "
        "95 % intervals lie below 0 and below 1; not held if on one the first lies above 0 or the second above 1.",
        expected="ranks move from wide layers to narrow ones",
        run=_cheaper,
    ),
)
