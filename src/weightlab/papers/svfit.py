"""SVFit (arXiv 2409.05926)."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightlab.papers.schema import Claim, ClaimContext, ClaimResult, Paper, Scale, Verdict

if TYPE_CHECKING:
    from weightlab.trial.result import TrialReport

PAPER = Paper(
    number=23,
    slug="svfit",
    title="SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
    authors=("Sun", "Wei", "Wu", "Shi", "He", "Ma", "Xie", "Yang"),
    author_count=8,
    date="2024-09-09",
    arxiv="2409.05926",
    summary=(
        "Each adapted weight is decomposed once by singular value decomposition; the singular vectors "
        "stay frozen and only the largest singular values are trained, starting from their own values, so "
        "the model is unchanged at first. The trained numbers rescale the matrix's own main directions, "
        "and the result merges back into the weight at no inference cost. The paper claims better results "
        "than LoRA, and than PiSSA, with sixteen times fewer trainable parameters in language "
        "understanding, image classification and image generation. That ratio implies that nearly all "
        "singular values are trained, although the text speaks of a leading part that holds most of the "
        "information, by a measure it does not define. Learning rates must be far larger than LoRA's. A "
        "pure rescaling can be too weak when the target domain is far from the original one. No official "
        "code is known."
    ),
    room="adapters",
    parts=("adapters.SvfitConfig", "linalg.top_svd"),
    keywords=("LoRA", "peft", "singular values", "SVD", "PiSSA", "fine-tuning", "few parameters"),
)


FAR, NEAR = "adapt-digits", "adapt-digits-contrast"
WORST = 0.005
SHARE = 0.99
PART = 0.5
ARMS = {
    "SVFit": "svfit",
    "LoRA, rank 8": "lora",
    "LoRA, rank 1": "lora-rank-1",
    "PiSSA, rank 8": "pissa",
    "biases": "bitfit",
    "random vectors": "random-diagonal",
    "LoRA-XS, rank 8": "lora-xs",
}

Interval = tuple[float, float]


@dataclass(frozen=True)
class _Size:
    """What a scale costs: training steps, tuning points and report seeds of each arm."""

    steps: int
    tune: int
    seeds: int


SIZES: dict[Scale, _Size] = {
    "smoke": _Size(steps=8, tune=0, seeds=2),
    "cpu": _Size(steps=300, tune=6, seeds=8),
}


def judge_no_worse(intervals: Sequence[Interval], margin: float) -> Verdict:
    """Judge "worse by less than the margin" everywhere, by intervals of the differences, positive meaning worse."""
    if all(high < margin for _, high in intervals):
        return "held"
    return "not held" if any(low > margin for low, _ in intervals) else "inconclusive"


def judge_gain(intervals: Sequence[Interval], least: float) -> Verdict:
    """Judge "better" everywhere: all differences below 0; not held if one is above `-least` for certain."""
    if all(high < 0 for _, high in intervals):
        return "held"
    return "not held" if any(low > -least for low, _ in intervals) else "inconclusive"


def judge_part(needed: Mapping[str, Mapping[str, Interval]]) -> Verdict:
    """Judge "at most half of the values", by intervals of the part needed: layer -> measure -> interval.

    Held if it is by every measure in every layer, not held if in some layer it is by none.
    """
    if all(high < PART for layer in needed.values() for _, high in layer.values()):
        return "held"
    if any(all(low > PART for low, _ in layer.values()) for layer in needed.values()):
        return "not held"
    return "inconclusive"


def _interval(values: Sequence[float]) -> Interval:
    from weightlab.trial.statistics import PairedMean

    return PairedMean(values).interval(0.95)


def _train(ctx: ClaimContext, task: str) -> TrialReport:
    """Train every arm on a task; a second call reads the store."""
    from weightlab.papers import trials

    size = SIZES[ctx.scale]
    return trials.run_trial(
        ctx, task, list(ARMS.values()), tune=size.tune, seeds=size.seeds, steps=size.steps, eval_points=4
    )


def _difference(report: TrialReport, other: str) -> list[float]:
    """Test error of SVFit minus that of another arm, by seed."""
    return [
        mine.score - theirs.score
        for mine, theirs in zip(report.arm("svfit").runs, report.arm(ARMS[other]).runs, strict=True)
    ]


@functools.cache
def _parameters(arm: str) -> int:
    """Numbers that an arm trains on either task."""
    import torch

    from weightlab import tasks
    from weightlab.trial import registry

    chosen = registry.arm(arm)
    assert chosen.transform is not None
    model = tasks.get(FAR).build(torch.Generator().manual_seed(0))
    model = chosen.transform(model, chosen.defaults)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _table(reports: Sequence[TrialReport]) -> list[dict[str, Any]]:
    return [
        {
            "task": report.task,
            "trained": name,
            "parameters": _parameters(slug),
            "learning rate": f"{arm.hyperparameters['lr']:.2g}{' (edge)' if arm.edges else ''}",
            "test error": arm.mean,
            "ms a step": arm.step_ms,
        }
        for report in reports
        for name, slug in ARMS.items()
        for arm in [report.arm(slug)]
    ]


def _points(difference: Sequence[float]) -> str:
    low, high = _interval(difference)
    mean = statistics.fmean(difference)
    return f"{100 * mean:+.1f} points of error (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"


def _against(
    ctx: ClaimContext, pairs: Sequence[tuple[str, str]], margin: float, *, gain: bool
) -> ClaimResult:
    """Compare SVFit with other arms: pairs of a task and an arm."""
    from weightlab.papers.trials import curves

    started = time.perf_counter()
    reports = {task: _train(ctx, task) for task in dict.fromkeys(task for task, _ in pairs)}
    found = {(task, other): _difference(reports[task], other) for task, other in pairs}
    intervals = [_interval(difference) for difference in found.values()]
    verdict = judge_gain(intervals, margin) if gain else judge_no_worse(intervals, margin)
    decisive = max(found, key=lambda pair: statistics.fmean(found[pair]))
    mine = _parameters("svfit")
    parts = [
        f"on {task} {_points(difference)} against {other} with {_parameters(ARMS[other]) / mine:.3g} times its parameters"
        for (task, other), difference in found.items()
    ]
    return ClaimResult(
        verdict=verdict,
        measured=f"SVFit, {mine} parameters, differs by {'; '.join(parts)}.",
        value=statistics.fmean(found[decisive]),
        interval=_interval(found[decisive]),
        figure=curves(reports[decisive[0]]),
        table=_table(list(reports.values())),
        cost=time.perf_counter() - started,
        seeds=range(SIZES[ctx.scale].seeds),
    )


def _matches_far(ctx: ClaimContext) -> ClaimResult:
    return _against(ctx, [(FAR, "LoRA, rank 8")], WORST, gain=False)


def _matches_near(ctx: ClaimContext) -> ClaimResult:
    return _against(ctx, [(NEAR, "LoRA, rank 8")], WORST, gain=False)


def _beats_small(ctx: ClaimContext) -> ClaimResult:
    pairs = [(task, other) for task in (FAR, NEAR) for other in ("LoRA, rank 1", "biases")]
    return _against(ctx, pairs, WORST, gain=True)


def _beats_random(ctx: ClaimContext) -> ClaimResult:
    return _against(ctx, [(task, "random vectors") for task in (FAR, NEAR)], WORST, gain=True)


def _information(ctx: ClaimContext) -> ClaimResult:
    import torch
    from torch import nn

    from weightlab import tasks
    from weightlab.adapters.singular_values import energy_rank
    from weightlab.trial.hashing import derive_seed

    started = time.perf_counter()
    task, seeds = tasks.get(FAR), SIZES[ctx.scale].seeds
    parts: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds):
        ctx.progress(seed / seeds, f"spectra of model {seed}")
        model = task.build(torch.Generator().manual_seed(derive_seed(seed, "weights")))
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)][:-1]
        for layer in layers:
            values = torch.linalg.svdvals(layer.weight.detach().double())
            by_measure = parts.setdefault(f"{layer.in_features} to {layer.out_features}", {})
            by_measure.setdefault("sum of squares", []).append(energy_rank(values, SHARE) / len(values))
            by_measure.setdefault("sum", []).append(energy_rank(values, SHARE, "nuclear") / len(values))
    needed = {layer: {m: _interval(v) for m, v in measures.items()} for layer, measures in parts.items()}
    means = {
        (layer, m): statistics.fmean(v) for layer, measures in parts.items() for m, v in measures.items()
    }
    worst = max(means, key=lambda key: means[key])
    return ClaimResult(
        verdict=judge_part(needed),
        measured="part of the singular values that holds 99 %: "
        + "; ".join(f"{mean:.0%} by {measure} from {layer}" for (layer, measure), mean in means.items())
        + ".",
        value=means[worst],
        interval=needed[worst[0]][worst[1]],
        table=[
            {"layer": layer, "measure": m, "part needed": mean, "low": low, "high": high}
            for (layer, m), mean in means.items()
            for low, high in [needed[layer][m]]
        ],
        cost=time.perf_counter() - started,
        seeds=range(seeds),
    )


_SETTING = (
    "Perceptron 64-256-256-10 trained on digits, then 300 steps of adapting its hidden layers to {shift}; every arm with six "
    "tuning points over learning rate and weight decay; test error. "
)
_FAR, _NEAR = "digits turned by 90 degrees", "grey digits on a grey ground"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="matches-lora-far",
        statement="Training all singular values does as well as LoRA of rank 8 with at least sixteen times the parameters, "
        "on data far from those of pre-training.",
        threshold=_SETTING.format(shift=_FAR)
        + "95 % interval of the paired difference, SVFit minus LoRA: held if it lies "
        "below +0.5 points, not held if above, else inconclusive.",
        expected="better than LoRA with sixteen times fewer parameters; a quick run suggests a loss of some ten points here",
        run=_matches_far,
    ),
    Claim(
        name="matches-lora-near",
        statement="Training all singular values does as well as LoRA of rank 8 with at least sixteen times the parameters, "
        "on data near those of pre-training.",
        threshold=_SETTING.format(shift=_NEAR)
        + "95 % interval of the paired difference, SVFit minus LoRA: held if it lies "
        "below +0.5 points, not held if above, else inconclusive.",
        expected="better than LoRA with sixteen times fewer parameters; rescaling could suffice for a mild shift",
        run=_matches_near,
    ),
    Claim(
        name="beats-small-rivals",
        statement="At about its number of parameters SVFit beats its honest rivals, LoRA of rank 1 and the biases alone.",
        threshold=_SETTING.format(shift=f"{_FAR} and to {_NEAR}")
        + "95 % intervals of the four paired differences, SVFit "
        "minus rival: held if all lie below 0, not held if one lies above -0.5 points, else inconclusive.",
        expected="not in the paper",
        run=_beats_small,
    ),
    Claim(
        name="own-vectors-matter",
        statement="What the weights know is in their singular vectors: as many trained values between random orthonormal "
        "vectors do worse.",
        threshold=_SETTING.format(shift=f"{_FAR} and to {_NEAR}")
        + "95 % intervals of the two paired differences, SVFit minus "
        "random vectors: held if both lie below 0, not held if one lies above -0.5 points, else inconclusive.",
        expected="not in the paper, whose method rests on it",
        run=_beats_random,
    ),
    Claim(
        name="few-values-hold-most",
        statement="A leading part of the singular values, at most half, holds 99 % of the information in each pre-trained "
        "matrix.",
        threshold="The perceptron's two hidden matrices. Part of the values needed for 99 % of the sum of squares, and of the sum, "
        "95 % interval over pre-trained models: held if below 1/2 by both measures in both matrices, not held if above 1/2 "
        "by both measures in one of them, else inconclusive.",
        expected="top-r subspaces with more than 99 %, by a measure that is not defined; sixteen-fold saving needs all values",
        run=_information,
    ),
)
