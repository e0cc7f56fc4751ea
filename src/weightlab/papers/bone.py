"""Bone (arXiv 2409.15371)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightlab.papers import trials
from weightlab.papers.schema import Claim, ClaimContext, ClaimResult, Paper, Scale, Verdict

if TYPE_CHECKING:
    from weightlab.trial.arm import Arm
    from weightlab.trial.result import SeedRun

PAPER = Paper(
    number=6,
    slug="bone",
    title=(
        "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large "
        "Language Models"
    ),
    authors=("Jiale Kang",),
    author_count=1,
    date="2024-09-19",
    arxiv="2409.15371",
    venue="ICLR 2026",
    code=("JL-er/Bone", "Joluck/MiSS"),
    summary=(
        "Bone fine-tunes a frozen linear layer with one trainable tensor that starts at zero. The weight "
        "is cut into square blocks, the blocks of one row share one trainable block B, and each block W "
        "is updated by WB + B, so that the frozen weight itself steers the update at every step; no SVD, "
        "no random factors and no scale are needed. With Llama-2-7B on mathematics the first versions "
        "report 49.4 on GSM8K and 8.9 on MATH, ahead of LoRA and PiSSA at a similar number of parameters. "
        "Later versions drop the product with W for speed and became DiSHA and then MiSS, under which "
        "name the additive form now lives in Hugging Face PEFT; this entry follows the block-affine form "
        "of the first versions. Such comparisons hang on the learning rate: a larger first gradient alone "
        "wins at a rate shared by all methods. An update can also be ahead early and behind at the end, "
        "so both halves of training are to be reported."
    ),
    room="adapters",
    parts=("adapters.BoneConfig", "adapters.bone_weight", "adapters.bone_linear", "adapters.BlockAffine"),
    keywords=(
        "PEFT",
        "fine-tuning",
        "LoRA",
        "DiSHA",
        "MiSS",
        "Bat",
        "block affine",
        "weight guide",
        "shard sharing",
    ),
)

TASK = "adapt-digits"
AFFINE, ADDITIVE = "bone-affine", "bone-additive"
GUIDE_ONLY, RANDOM_GUIDE = "bone-guide-only", "bone-random-guide"
LORA, PISSA = "lora", "pissa"
# Trained numbers on layers 64-256-256: r (256 + 256) for Bone,
# r (64 + 256 + 256 + 256) for LoRA and PiSSA.
RANKS = {AFFINE: 8, ADDITIVE: 8, GUIDE_ONLY: 8, RANDOM_GUIDE: 8, LORA: 5, PISSA: 5}
TRAINED = {AFFINE: 512, ADDITIVE: 512, GUIDE_ONLY: 512, RANDOM_GUIDE: 512, LORA: 832, PISSA: 832}
EARLIER = 0.05
DIFFERENCE = 0.005


@dataclass(frozen=True)
class _Size:
    """What a scale costs: training steps, tuning points and report seeds of each arm, evaluations of a run."""

    steps: int
    tune: int
    seeds: int
    eval_points: int


SIZES: dict[Scale, _Size] = {"smoke": _Size(20, 1, 2, 4), "cpu": _Size(400, 8, 10, 10)}


@dataclass(frozen=True)
class _Outcome:
    """What each arm came to, one number a seed.

    Attributes:
        early: Mean training loss over the first half of the steps.
        late: The same over the second half.
        error: Test error at the end.
        rates: Chosen learning rates, with a star where at the edge of the space.
        figure: Learning curves.
        cost: Seconds.
    """

    early: dict[str, list[float]]
    late: dict[str, list[float]]
    error: dict[str, list[float]]
    rates: dict[str, str]
    figure: dict[str, Any]
    cost: float


def _arm(name: str) -> Arm:
    """Take a registered arm at the rank it has here, without weight decay, so that only its learning rate is tuned."""
    from weightlab.trial import registry

    arm = registry.arm(name)
    return replace(
        arm,
        name=f"{name} (r {RANKS[name]}, no decay)",
        search_space={"lr": arm.search_space["lr"]},
        defaults={**arm.defaults, "r": RANKS[name], "weight_decay": 0.0},
    )


def _train(ctx: ClaimContext) -> _Outcome:
    """Put all arms on trial; a second call reads the store."""
    size = SIZES[ctx.scale]
    names = [AFFINE, ADDITIVE, LORA, PISSA, GUIDE_ONLY, RANDOM_GUIDE]
    arms = [_arm(name) for name in names]
    report = trials.run_trial(
        ctx, TASK, arms, tune=size.tune, seeds=size.seeds, steps=size.steps, eval_points=size.eval_points
    )
    found = dict(zip(names, (report.arm(arm.name) for arm in arms), strict=True))
    return _Outcome(
        early={name: [half(run, size.steps)[0] for run in arm.runs] for name, arm in found.items()},
        late={name: [half(run, size.steps)[1] for run in arm.runs] for name, arm in found.items()},
        error={name: [run.score for run in arm.runs] for name, arm in found.items()},
        rates={
            name: f"{arm.hyperparameters['lr']:.2g}{'*' if arm.edges else ''}" for name, arm in found.items()
        },
        figure=trials.curves(report, "Digits turned by 90 degrees: test error along training"),
        cost=report.seconds,
    )


def half(run: SeedRun, steps: int) -> tuple[float, float]:
    """Mean training loss of a run over each half of its steps; infinite where it did not get so far."""
    halves = []
    for low, high in ((0, steps / 2), (steps / 2, steps)):
        losses = [
            point.train_loss
            for point in run.curve
            if low < point.step <= high and point.train_loss is not None
        ]
        finite = losses and run.status == "ok" and all(map(math.isfinite, losses))
        halves.append(statistics.fmean(losses) if finite else math.inf)
    return halves[0], halves[1]


def log_ratio(a: float, b: float) -> float:
    """Logarithm of a / b, where either may be infinite; if both are, 0."""
    return 0.0 if a == b else math.log(a) - math.log(b)


def _table(outcome: _Outcome) -> list[dict[str, Any]]:
    """One row an arm, with the block-affine form's error less its own, in percentage points."""
    rows = []
    for name, errors in outcome.error.items():
        less = _paired([a - b for a, b in zip(outcome.error[AFFINE], errors, strict=True)])
        rows.append(
            {
                "arm": name,
                "trained numbers": RANKS[name] * TRAINED[name],
                "learning rate": outcome.rates[name],
                "loss, first half": statistics.fmean(outcome.early[name]),
                "loss, second half": statistics.fmean(outcome.late[name]),
                "test error, %": 100 * statistics.fmean(errors),
                "affine minus it, points": 100 * less[0],
                "low": 100 * less[1],
                "high": 100 * less[2],
            }
        )
    return rows


def _paired(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % interval."""
    from weightlab.trial.statistics import PairedMean

    estimate = PairedMean(differences)
    return (estimate.mean, *estimate.interval(0.95))


def judge(intervals: Sequence[tuple[float, float]], threshold: float) -> Verdict:
    """Judge "all differences lie below `threshold`" by their intervals."""
    if all(high < threshold for _, high in intervals):
        return "held"
    return "not held" if any(low > threshold for low, _ in intervals) else "inconclusive"


def _early_loss(ctx: ClaimContext) -> ClaimResult:
    outcome = _train(ctx)
    found = {
        name: _paired(
            [log_ratio(a, b) for a, b in zip(outcome.early[AFFINE], outcome.early[name], strict=True)]
        )
        for name in (LORA, PISSA)
    }
    late = {
        name: statistics.fmean(outcome.late[AFFINE]) / statistics.fmean(outcome.late[name]) for name in found
    }
    hardest = max(found.values(), key=lambda estimate: estimate[0])
    return ClaimResult(
        verdict=judge([estimate[1:] for estimate in found.values()], math.log(1 - EARLIER)),
        measured="mean training loss over the first half, block-affine over "
        + " and ".join(
            f"{name}: {math.exp(mean):.2f} ({math.exp(low):.2f} to {math.exp(high):.2f})"
            for name, (mean, low, high) in found.items()
        )
        + "; over the second half: "
        + ", ".join(f"{ratio:.2f} of {name}" for name, ratio in late.items())
        + ".",
        value=math.exp(hardest[0]),
        interval=(math.exp(hardest[1]), math.exp(hardest[2])),
        figure=outcome.figure,
        table=_table(outcome),
        cost=outcome.cost,
        seeds=range(SIZES[ctx.scale].seeds),
    )


def _compared(ctx: ClaimContext, others: Sequence[str]) -> ClaimResult:
    """Judge whether the block-affine form ends with a lower error than all others."""
    outcome = _train(ctx)
    found = {
        name: _paired([a - b for a, b in zip(outcome.error[AFFINE], outcome.error[name], strict=True)])
        for name in others
    }
    hardest = max(found.values(), key=lambda estimate: estimate[0])
    return ClaimResult(
        verdict=judge([estimate[1:] for estimate in found.values()], -DIFFERENCE),
        measured=f"test error {100 * statistics.fmean(outcome.error[AFFINE]):.2f} % by block-affine; minus that of "
        + ", ".join(
            f"{name} {100 * mean:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f})"
            for name, (mean, low, high) in found.items()
        )
        + ".",
        value=hardest[0],
        interval=hardest[1:],
        figure=outcome.figure,
        table=_table(outcome),
        cost=outcome.cost,
        seeds=range(SIZES[ctx.scale].seeds),
    )


def _final_error(ctx: ClaimContext) -> ClaimResult:
    return _compared(ctx, (LORA, PISSA))


def _weight_guide(ctx: ClaimContext) -> ClaimResult:
    return _compared(ctx, (ADDITIVE, RANDOM_GUIDE))


PROTOCOL = (
    "Perceptron 64-256-256-10 trained on scikit-learn's digits, both hidden layers adapted to the digits turned by "
    "90 degrees: 400 steps of 64 by AdamW, the learning rate of every arm tuned alike on validation error."
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="early-loss",
        statement="With as many trained numbers, block-affine Bone has a lower mean training loss than LoRA and PiSSA over "
        f"the first half of training. {PROTOCOL}",
        threshold="Held if for both the 95 % interval of the ratio of losses, paired by seed, lies below "
        f"{1 - EARLIER:g}; not held if for either it lies above that.",
        expected="faster convergence than LoRA and PiSSA (figures of the loss in all versions)",
        scales=("smoke", "cpu"),
        run=_early_loss,
    ),
    Claim(
        name="final-error",
        statement="With as many trained numbers, block-affine Bone ends with a lower test error than LoRA and PiSSA. "
        + PROTOCOL,
        threshold="Held if for both the 95 % interval of the difference of test errors, paired by seed, lies below "
        f"-{100 * DIFFERENCE:g} points; not held if for either it lies above that.",
        expected="GSM8K 49.36 against 38.97 by LoRA and 43.52 by PiSSA with Llama-2-7B",
        scales=("smoke", "cpu"),
        run=_final_error,
    ),
    Claim(
        name="weight-guide",
        statement="The product with the frozen weight is what helps: block-affine Bone ends with a lower test error than "
        "without it (the additive form), and than with a random matrix of the weight's norm in its place. "
        + PROTOCOL,
        threshold="Held if for both the 95 % interval of the difference of test errors, paired by seed, lies below "
        f"-{100 * DIFFERENCE:g} points; not held if for either it lies above that.",
        expected="the paper attributes the gain to this weight guide",
        scales=("smoke", "cpu"),
        run=_weight_guide,
    ),
)
