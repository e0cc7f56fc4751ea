"""SORSA (arXiv 2409.00055)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weightlab.papers.schema import Claim, ClaimContext, ClaimResult, Paper, Verdict

if TYPE_CHECKING:
    from weightlab.papers.adaptation import Adaptation

PAPER = Paper(
    number=25,
    slug="sorsa",
    title=(
        "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language "
        "Models"
    ),
    authors=("Cao", "Song"),
    author_count=2,
    date="2024-08-21",
    arxiv="2409.00055",
    code=("Gunale0926/SORSA",),
    summary=(
        "The leading singular triples of each adapted weight become a trainable adapter in three factors "
        "(left vectors, values, right vectors) and the rest of the matrix is frozen. A regulariser with a "
        "step size of its own keeps both sets of vectors nearly orthonormal, so that scale lives in the "
        "singular values and the structure of the pre-trained matrix is disturbed little. The adapter "
        "merges into the weight. The paper reports faster convergence and higher accuracy on mathematical "
        "reasoning than LoRA, PiSSA, AdaLoRA and full fine-tuning, and later versions argue that the "
        "regulariser lowers the condition number. The comparison is doubtful: the released scripts train "
        "SORSA at a higher learning rate than the baselines, and under AdamW the regulariser's strength "
        "depends on the learning rate and on the number of adapted layers, unlike the published equation. "
        "One author up to version 5, two since version 6."
    ),
    room="adapters",
    parts=("adapters.SorsaConfig", "adapters.sorsa_regularizer", "adapters.SorsaCallback"),
    keywords=("LoRA", "PiSSA", "peft", "SVD", "orthonormality", "fine-tuning", "condition number"),
)

# Training steps, tuning points and report seeds of each arm.
SIZES = {"smoke": (16, 1, 2), "cpu": (400, 8, 8)}
SORSA, STRONGER, FREE = "SORSA", "SORSA, gamma 0.01", "SORSA, no regulariser"
PISSA, LORA = "PiSSA", "LoRA"
GAMMA = {SORSA: 1e-3, STRONGER: 1e-2}
FASTER = 0.05
CONDITION = 0.05
FORGETTING = ACCURACY = 0.01
ORTHONORMAL = 0.1


def judge(held: Sequence[bool], refuted: Sequence[bool]) -> Verdict:
    """Judge a claim of several parts: all must hold, and one that is refuted is enough to refute it."""
    return "held" if all(held) else "not held" if any(refuted) else "inconclusive"


def _train(ctx: ClaimContext) -> Adaptation:
    """Put all arms on trial; a second call reads the store."""
    from weightlab.papers._sorsa_task import DigitsAndFactors
    from weightlab.papers.adaptation import adapt, variant

    steps, tune, seeds = SIZES[ctx.scale]
    arms = {
        LORA: variant("lora", weight_decay=0.0),
        PISSA: variant("pissa", weight_decay=0.0),
        FREE: variant("sorsa-no-reg", weight_decay=0.0),
        **{name: variant("sorsa", weight_decay=0.0, gamma=gamma) for name, gamma in GAMMA.items()},
    }
    return adapt(ctx, DigitsAndFactors(), arms, tune=tune, seeds=seeds, steps=steps)


def _result(verdict: Verdict, found: Adaptation, **values: Any) -> ClaimResult:
    sentence = values.pop("measured")
    table = found.table(LORA)
    for row, outcome in zip(table, found.outcomes.values(), strict=True):
        for metric in ("condition", "deviation"):
            row[metric] = statistics.fmean(outcome.metrics[metric]) if metric in outcome.metrics else None
    return ClaimResult(
        verdict=verdict,
        measured=" ".join([sentence, *found.notes]),
        table=table,
        figure=values.pop("figure", None) or found.figure(),
        cost=found.cost,
        seeds=found.seeds,
        **values,
    )


def _early(ctx: ClaimContext, other: str) -> ClaimResult:
    """Judge whether SORSA with its regulariser has a lower early loss than another arm."""
    found = _train(ctx)
    mean, (low, high) = found.log_ratio(SORSA, other)
    stronger, bounds = found.log_ratio(STRONGER, other)
    limit = math.log(1 - FASTER)
    return _result(
        judge([high < limit], [low > limit]),
        found,
        measured=f"mean training loss over the first half, over that of {other}: {math.exp(mean):.3f} "
        f"({math.exp(low):.3f} to {math.exp(high):.3f}) with gamma {GAMMA[SORSA]:g}, {math.exp(stronger):.3f} "
        f"({math.exp(bounds[0]):.3f} to {math.exp(bounds[1]):.3f}) with gamma {GAMMA[STRONGER]:g}.",
        value=math.exp(mean),
        interval=(math.exp(low), math.exp(high)),
    )


def _convergence(ctx: ClaimContext) -> ClaimResult:
    return _early(ctx, PISSA)


def _speed_of_regularizer(ctx: ClaimContext) -> ClaimResult:
    return _early(ctx, FREE)


def _preserves(ctx: ClaimContext) -> ClaimResult:
    found = _train(ctx)
    condition, kappa = found.difference(SORSA, FREE, "condition")
    forgetting, source = found.difference(SORSA, FREE, "source_error")
    error, target = found.difference(SORSA, FREE)
    limit = math.log10(1 - CONDITION)
    return _result(
        judge(
            [kappa[1] < limit, source[1] < -FORGETTING, target[1] < ACCURACY],
            [kappa[0] > limit, source[0] > -FORGETTING, target[0] > ACCURACY],
        ),
        found,
        measured=f"against no regulariser, gamma {GAMMA[SORSA]:g} multiplies the condition number of the trained part by "
        f"{10**condition:.2f} ({10 ** kappa[0]:.2f} to {10 ** kappa[1]:.2f}), and changes the error on the unturned digits "
        f"by {100 * forgetting:+.1f} points ({100 * source[0]:+.1f} to {100 * source[1]:+.1f}), that on the turned ones by "
        f"{100 * error:+.2f} points ({100 * target[0]:+.2f} to {100 * target[1]:+.2f}).",
        value=forgetting,
        interval=source,
        figure=found.figure(testing=True),
    )


def _orthonormal(ctx: ClaimContext) -> ClaimResult:
    found = _train(ctx)
    mean, (low, high) = found.log_ratio(SORSA, FREE, "deviation")
    ends = {
        name: statistics.fmean(found.outcomes[name].values("deviation")) for name in (FREE, SORSA, STRONGER)
    }
    limit = math.log(ORTHONORMAL)
    return _result(
        judge([high < limit], [low > limit]),
        found,
        measured="mean distance of the factors' Gram matrices from the identity at the end: "
        + ", ".join(f"{value:.3g} ({name})" for name, value in ends.items())
        + f"; gamma {GAMMA[SORSA]:g} over none {math.exp(mean):.3g} ({math.exp(low):.3g} to {math.exp(high):.3g}).",
        value=math.exp(mean),
        interval=(math.exp(low), math.exp(high)),
    )


PROTOCOL = (
    "Perceptron 64-256-256-10 trained on scikit-learn's digits, both hidden layers adapted at rank 8 to the digits "
    "turned by 90 degrees: 400 steps of 64 by AdamW without weight decay, the learning rate of every arm tuned alike on "
    "validation error, the regulariser coupled, in the mean over factors."
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="convergence",
        statement=f"SORSA with its regulariser (gamma {GAMMA[SORSA]:g}) has a lower mean training loss than PiSSA over the "
        f"first half of training, each at its own learning rate. {PROTOCOL}",
        threshold="Held if the 95 % interval of the ratio of losses, paired by seed, lies below "
        f"{1 - FASTER:g}; not held if it lies above that.",
        expected="faster convergence than PiSSA and LoRA (abstract); the official scripts give SORSA a higher learning rate",
        scales=("smoke", "cpu"),
        run=_convergence,
    ),
    Claim(
        name="regularizer-speed",
        statement=f"It is the regulariser that makes SORSA faster: with gamma {GAMMA[SORSA]:g} the mean training loss over "
        f"the first half is lower than with none. {PROTOCOL}",
        threshold="Held if the 95 % interval of the ratio of losses, paired by seed, lies below "
        f"{1 - FASTER:g}; not held if it lies above that.",
        expected="the paper attributes the faster convergence to the regulariser",
        scales=("smoke", "cpu"),
        run=_speed_of_regularizer,
    ),
    Claim(
        name="preservation",
        statement="The regulariser lowers the condition number of the trained part and how much of the old domain is "
        f"forgotten, without loss of accuracy on the new. {PROTOCOL}",
        threshold="By 95 % intervals paired by seed, with the regulariser against without: held if the ratio of "
        f"condition numbers lies below {1 - CONDITION:g}, the difference of errors on the unturned digits below "
        f"-{100 * FORGETTING:g} point, and that on the turned ones below +{100 * ACCURACY:g} point; not held if any lies "
        "above.",
        expected="a lower condition number (theorem, since version 3) and less forgetting (later versions)",
        scales=("smoke", "cpu"),
        run=_preserves,
    ),
    Claim(
        name="orthonormality",
        statement="The regulariser keeps both sets of vectors nearly orthonormal, which they do not stay without it: their "
        f"Gram matrices end at less than a tenth of the distance from the identity. {PROTOCOL}",
        threshold="Held if the 95 % interval of the ratio of distances with and without the regulariser, paired by seed, "
        f"lies below {ORTHONORMAL:g}; not held if it lies above that.",
        expected="orthonormality is what the regulariser measures",
        scales=("smoke", "cpu"),
        run=_orthonormal,
    ),
)
