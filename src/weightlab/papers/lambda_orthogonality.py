"""λ-Orthogonality Regularization for Compatible Representation Learning (arXiv 2509.16664)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from weightlab.papers.figure import rounded
from weightlab.papers.schema import Claim, ClaimContext, ClaimResult, Paper, Verdict

if TYPE_CHECKING:
    import torch

PAPER = Paper(
    number=12,
    slug="lambda-orthogonality",
    title="λ-Orthogonality Regularization for Compatible Representation Learning",
    authors=("Ricci", "Biondi", "Pernici", "Patras", "Del Bimbo"),
    author_count=5,
    date="2025-09",
    arxiv="2509.16664",
    venue="NeurIPS 2025",
    code=("miccunifi/lambda_orthogonality",),
    summary=(
        "A retrieval system holds a gallery embedded by an old model, and computing it anew for a better "
        "model is expensive. Small maps between the two frozen spaces can make them compatible: one takes "
        "new queries to the old gallery, one lifts the old gallery. A free affine map adapts best but "
        "destroys the geometry of the new space; a strictly orthogonal one preserves all angles but "
        "cannot adapt. The paper trains an affine map whose weight may leave orthogonality only up to a "
        "tolerance λ, through a smooth gate on the penalty. Near-unchanged performance of the new model "
        "together with cross-retrieval at the level of affine maps is claimed, across architectures and "
        "data sets. The exact form of the gate, the weights of the losses and the schedule are a "
        "reconstruction here and are therefore arguments. Preserving the new model is the easier half to "
        "show; a gain in adaptation over a strictly orthogonal map needs a target that such a map cannot "
        "reach, and many seeds."
    ),
    room="nn",
    parts=("nn.OrthogonalityPenalty", "nn.relaxed_orthogonal", "merge.fit_adapter", "merge.retrieval_report"),
    keywords=(
        "lambda",
        "compatible representations",
        "backward compatibility",
        "backfilling",
        "retrieval",
        "embedding",
        "orthogonal map",
        "affine adapter",
        "model update",
    ),
)

KEYS = ("old", "cross", "self", "unseen", "gram", "deviation")
NONE, STRICT, SHIFTED, RELAXED, GATED, AFFINE = (
    "no map",
    "rotation",
    "rotation and bias",
    "λ = 1",
    "λ = 1, gated penalty",
    "affine",
)
NOTE, HARD = "5 classes", "3 classes"
# Classes that the old encoder knows, and its weight decay. The second is the harder to reach by rotations: few directions.
TARGETS = {NOTE: (5, 0.01), HARD: (3, 1.0)}
RATES = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# Encoders are drawn from these seeds on.
FIRST_SEED, FIRST_TUNING_SEED = 100, 2000
DROP = GAIN = 0.005
GRAM = 0.1
WITHIN = 0.1


@dataclass(frozen=True)
class _Size:
    """What a scale costs.

    Attributes:
        seeds: Report seeds.
        tuning: Tuning seeds.
        encoder: Training steps of encoders.
        steps: Training steps of maps.
        arriving: Seeds and steps of the regressions of the tolerance.
    """

    seeds: int
    tuning: int
    encoder: int
    steps: int
    arriving: tuple[int, int]


SIZES = {
    "smoke": _Size(seeds=2, tuning=1, encoder=15, steps=6, arriving=(2, 20)),
    "cpu": _Size(seeds=16, tuning=3, encoder=300, steps=300, arriving=(10, 1500)),
}


@dataclass(frozen=True)
class Study:
    """Measures of all arms, and what they cost.

    Attributes:
        measures: Target -> arm -> measure -> values, one for each seed.
        rates: Target -> arm -> learning rate chosen.
        seconds: Of the whole study.
    """

    measures: dict[str, dict[str, dict[str, list[float]]]]
    rates: dict[str, dict[str, float]]
    seconds: float

    def difference(self, target: str, first: tuple[str, str], second: tuple[str, str]) -> Estimate:
        """Mean of an arm's measure less another's, paired by seed, and its 95 % interval."""
        a, b = (self.measures[target][arm][key] for arm, key in (first, second))
        return estimate([x - y for x, y in zip(a, b, strict=True)])

    def table(self) -> list[dict[str, Any]]:
        """A row for each target and arm, means over seeds."""
        return [
            {
                "old encoder": target,
                "map": arm,
                "learning rate": self.rates[target].get(arm),
                **{key: statistics.fmean(found[key]) for key in KEYS},
            }
            for target, arms in self.measures.items()
            for arm, found in arms.items()
        ]


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def points(self) -> str:
        """In percentage points."""
        return f"{100 * self.mean:+.2f} points ({100 * self.low:+.2f} to {100 * self.high:+.2f})"


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate a mean over seeds."""
    from weightlab.trial.statistics import PairedMean

    found = PairedMean(values)
    return Estimate(found.mean, *found.interval(0.95))


def judge_below(estimates: Iterable[Estimate], bound: float) -> Verdict:
    """Judge "all means lie below the bound"."""
    estimates = list(estimates)
    if all(each.high < bound for each in estimates):
        return "held"
    return "not held" if any(each.low > bound for each in estimates) else "inconclusive"


def judge_gain(gain: Estimate) -> Verdict:
    """Judge "there is a gain", one worth having being refuted where the interval excludes it."""
    return "held" if gain.low > 0 else "not held" if gain.high < GAIN else "inconclusive"


_studies: dict[str, Study] = {}


def study(ctx: ClaimContext) -> Study:
    """Train all encoders and maps of a scale; a second call in one process gets the same."""
    from weightlab.papers._compatible_digits import one_thread

    if ctx.scale not in _studies:
        with one_thread():
            _studies[ctx.scale] = _study(ctx)
    return _studies[ctx.scale]


def _study(ctx: ClaimContext) -> Study:
    import torch

    from weightlab.papers import _compatible_digits as digits

    started = time.perf_counter()
    size = SIZES[ctx.scale]
    arms = {
        STRICT: digits.Arm(0.0),
        SHIFTED: digits.Arm(0.0, bias=True),
        RELAXED: digits.Arm(1.0),
        GATED: digits.Arm(penalty=1.0),
        AFFINE: digits.Arm(bias=True),
    }
    measures: dict[str, dict[str, dict[str, list[float]]]] = {}
    rates: dict[str, dict[str, float]] = {}
    for number, (name, settings) in enumerate(TARGETS.items()):
        target = digits.Target(*settings)
        ctx.progress(number / len(TARGETS), f"encoders, old one of {name}")
        report = digits.pairs(target, range(FIRST_SEED, FIRST_SEED + size.seeds), size.encoder)
        tuning = digits.pairs(target, range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + size.tuning), size.encoder)
        # All learning rates at once, as problems of one batch.
        tuning = digits.repeated(tuning, len(RATES))
        grid = torch.tensor(RATES).repeat_interleave(size.tuning)
        measures[name] = {NONE: digits.measure(None, report, "test", target.classes)}
        rates[name] = {}
        for place, (arm, kind) in enumerate(arms.items()):
            ctx.progress(
                (number + (1 + place) / (1 + len(arms))) / len(TARGETS), f"{arm}, old encoder of {name}"
            )
            tried = digits.fit(kind, tuning, lr=grid, steps=size.steps, generator=_generator(1))
            found = digits.measure(tried, tuning, "tuning", target.classes)
            merit = [a + b for a, b in zip(found["cross"], found["self"], strict=True)]
            means = [sum(merit[i * size.tuning : (i + 1) * size.tuning]) for i in range(len(RATES))]
            rate = RATES[max(range(len(RATES)), key=means.__getitem__)]
            maps = digits.fit(kind, report, lr=rate, steps=size.steps, generator=_generator(0))
            measures[name][arm] = digits.measure(maps, report, "test", target.classes)
            rates[name][arm] = rate
    return Study(measures, rates, time.perf_counter() - started)


def _generator(seed: int) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(seed)


def _result(verdict: Verdict, found: Study, measured: str, decisive: Estimate) -> ClaimResult:
    seeds = len(found.measures[NOTE][NONE]["self"])
    kinds = {arm: [found.measures[t][arm] for t in TARGETS] for arm in found.measures[NOTE]}
    return ClaimResult(
        verdict=verdict,
        measured=measured,
        value=decisive.mean,
        interval=(decisive.low, decisive.high),
        table=found.table(),
        figure={
            "title": "What a map keeps of the new space, and gains in the old one",
            "x_label": "top-1 of mapped queries in the mapped gallery",
            "y_label": "top-1 of mapped queries in the old gallery",
            "log_x": False,
            "log_y": False,
            "series": [
                {
                    "name": arm,
                    "x": rounded(statistics.fmean(each["self"]) for each in both),
                    "y": rounded(statistics.fmean(each["cross"]) for each in both),
                }
                for arm, both in kinds.items()
                if arm != NONE
            ],
        },
        cost=found.seconds,
        seeds=range(FIRST_SEED, FIRST_SEED + seeds),
    )


def _preserves(ctx: ClaimContext, arm: str) -> ClaimResult:
    """Judge whether an arm's map costs less than DROP of the searches among new embeddings."""
    found = study(ctx)
    drops = {target: found.difference(target, (NONE, "self"), (arm, "self")) for target in TARGETS}
    unseen = {target: found.difference(target, (NONE, "unseen"), (arm, "unseen")) for target in TARGETS}
    gated = {target: found.difference(target, (NONE, "self"), (GATED, "self")) for target in TARGETS}
    also = f"; with the gated penalty {_both(gated)}" if arm == RELAXED else ""
    return _result(
        judge_below(drops.values(), DROP),
        found,
        f"the map ({arm}) costs {_both(drops)} of top-1 among new embeddings, and {_both(unseen)} for classes that the old "
        f"encoder does not know{also}.",
        max(drops.values(), key=lambda each: each.mean),
    )


def _both(estimates: Mapping[str, Estimate]) -> str:
    return " and ".join(
        f"{each.points()} for an old encoder of {target}" for target, each in estimates.items()
    )


def _preservation(ctx: ClaimContext) -> ClaimResult:
    return _preserves(ctx, RELAXED)


def _affine_loses(ctx: ClaimContext) -> ClaimResult:
    found = study(ctx)
    losses = {target: found.difference(target, (AFFINE, "self"), (NONE, "self")) for target in TARGETS}
    against = {target: found.difference(target, (RELAXED, "self"), (AFFINE, "self")) for target in TARGETS}
    return _result(
        judge_below(losses.values(), -DROP),
        found,
        f"an affine map changes top-1 among new embeddings by {_both(losses)}; λ = 1 is better than it by {_both(against)}.",
        max(losses.values(), key=lambda each: each.mean),
    )


def _adaptation(ctx: ClaimContext) -> ClaimResult:
    found = study(ctx)
    gains = {target: found.difference(target, (RELAXED, "cross"), (STRICT, "cross")) for target in TARGETS}
    shifted = {target: found.difference(target, (RELAXED, "cross"), (SHIFTED, "cross")) for target in TARGETS}
    return _result(
        judge_gain(gains[HARD]),
        found,
        f"λ = 1 finds more in the old gallery than a rotation by {_both(gains)}; than a rotation with a bias by "
        f"{_both(shifted)}.",
        gains[HARD],
    )


def _level(ctx: ClaimContext) -> ClaimResult:
    found = study(ctx)
    behind = {target: found.difference(target, (AFFINE, "cross"), (RELAXED, "cross")) for target in TARGETS}
    better = {target: found.difference(target, (RELAXED, "cross"), (NONE, "old")) for target in TARGETS}
    return _result(
        judge_below(behind.values(), DROP),
        found,
        f"in the old gallery λ = 1 finds less than an affine map by {_both(behind)}; more than the old encoder itself by "
        f"{_both(better)}.",
        max(behind.values(), key=lambda each: each.mean),
    )


def _bias(ctx: ClaimContext) -> ClaimResult:
    found = study(ctx)
    changes = {target: estimate(found.measures[target][SHIFTED]["gram"]) for target in TARGETS}
    plain = max(max(found.measures[target][STRICT]["gram"]) for target in TARGETS)
    worst = min(changes.values(), key=lambda each: each.mean)
    held = all(each.low > GRAM for each in changes.values()) and plain < 1e-5
    refuted = any(each.high < GRAM for each in changes.values()) or plain > 1e-5
    parts = " and ".join(
        f"{each.mean:.3f} ({each.low:.3f} to {each.high:.3f}) of its norm for an old encoder of {target}"
        for target, each in changes.items()
    )
    return _result(
        "held" if held else "not held" if refuted else "inconclusive",
        found,
        f"a rotation with a bias changes the matrix of cosines by {parts}; one without by at most {plain:.1e}.",
        worst,
    )


def _tolerance(ctx: ClaimContext) -> ClaimResult:
    from weightlab.papers._compatible_digits import arrived, one_thread

    started = time.perf_counter()
    seeds, steps = SIZES[ctx.scale].arriving
    gates, weights = ("sigmoid", "softplus", "hinge2"), (1.0, 10.0, 100.0)
    ends: dict[str, dict[float, Estimate]] = {}
    for number, gate in enumerate(gates):
        ctx.progress(number / len(gates), f"penalty gated by {gate}")
        with one_thread():
            ends[gate] = {weight: estimate(arrived(gate, weight, seeds, steps)) for weight in weights}
    smooth = ends["sigmoid"].values()
    held = all(each.low > 1 - WITHIN and each.high < 1 + WITHIN for each in smooth)
    refuted = any(each.high < 1 - WITHIN or each.low > 1 + WITHIN for each in smooth)
    worst = min(smooth, key=lambda each: each.mean)
    listed = {
        gate: ", ".join(f"{e.mean:.2f} ({e.low:.2f} to {e.high:.2f})" for e in found.values())
        for gate, found in ends.items()
    }
    return ClaimResult(
        verdict="held" if held else "not held" if refuted else "inconclusive",
        measured="D over λ where training ends, for penalties of weight 1, 10, 100: "
        f"{listed['sigmoid']} with the smooth gate, {listed['hinge2']} with the squared hinge.",
        value=worst.mean,
        interval=(worst.low, worst.high),
        table=[
            {"gate": gate, "weight": weight, "D/λ": each.mean, "low": each.low, "high": each.high}
            for gate, found in ends.items()
            for weight, each in found.items()
        ],
        figure={
            "title": "Where training ends, over the tolerance",
            "x_label": "weight of the penalty",
            "y_label": "D / λ",
            "log_x": True,
            "log_y": False,
            "series": [
                {
                    "name": gate,
                    "x": list(found),
                    "y": rounded(each.mean for each in found.values()),
                    "low": rounded(each.low for each in found.values()),
                    "high": rounded(each.high for each in found.values()),
                }
                for gate, found in ends.items()
            ],
        },
        cost=time.perf_counter() - started,
        seeds=range(seeds),
    )


PROTOCOL = (
    "scikit-learn's digits; old encoders 64-64-32 trained on 5 classes, or on 3 with weight decay 1, new ones 64-128-32 on all "
    "10; embeddings frozen, length 1. Maps 32-32 from the Procrustes rotation: squared error and contrastive loss, Adam, the learning "
    "rate of every kind tuned alike on other seeds and images. Within λ = 1 (λ/√d = 0.18) by projection."
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="preservation",
        statement="A λ-orthogonal map costs the new model next to nothing: top-1 among mapped new embeddings is within half a "
        f"point of that among unmapped ones. {PROTOCOL}",
        threshold="Held if the 95 % interval of the loss, paired by seed, lies below 0.5 points for both old encoders; not held "
        "if it lies above for either.",
        expected="zero-shot performance of the new model is preserved (abstract)",
        run=_preservation,
    ),
    Claim(
        name="affine-loses",
        statement="An affine map does cost the new model: top-1 among mapped new embeddings is more than half a point lower "
        f"than among unmapped ones. {PROTOCOL}",
        threshold="Held if the 95 % interval of the change, paired by seed, lies below -0.5 points for both old encoders; not "
        "held if it lies above for either.",
        expected="affine transformations can significantly alter the original representation (abstract); 3 points in a pilot",
        run=_affine_loses,
    ),
    Claim(
        name="adaptation",
        statement="A λ-orthogonal map adapts better than a rotation: mapped queries find more in the old gallery, on an old space "
        f"that rotations cannot reach (3 classes, weight decay 1). {PROTOCOL}",
        threshold="Held if the 95 % interval of the difference of top-1, paired by seed, lies above 0; not held if it lies "
        "below 0.5 points.",
        expected="strictly orthogonal maps limit adaptability (abstract)",
        run=_adaptation,
    ),
    Claim(
        name="level-with-affine",
        statement="A λ-orthogonal map finds as much in the old gallery as an affine one, within half a point of top-1. "
        f"{PROTOCOL}",
        threshold="Held if the 95 % interval of how much less it finds, paired by seed, lies below 0.5 points for both old "
        "encoders; not held if it lies above for either.",
        expected="cross-retrieval at or above that of affine maps (third-party summaries)",
        run=_level,
    ),
    Claim(
        name="bias",
        statement="It takes no deviation from orthogonality to lose angles: a rotation with a bias changes the matrix of cosines "
        f"of new embeddings by more than a tenth of its norm, one without not at all. {PROTOCOL}",
        threshold="Held if the 95 % interval of the change lies above 0.1 for both old encoders, and that without bias is below "
        "1e-5 always; not held if the interval lies below 0.1 for either, or the latter is above 1e-5.",
        expected="0.44 to 0.56 in a pilot",
        run=_bias,
    ),
    Claim(
        name="tolerance",
        statement="λ is the deviation at which training under the smooth gated penalty ends, whatever the penalty's weight: "
        "D/λ within 10 % of 1 for weights 1, 10 and 100. Regression of 16 dimensions on 16 that no rotation solves, λ = 0.5, "
        "sharpness 10; the gate as inferred, beside a squared hinge.",
        threshold="Held if the 95 % intervals of D/λ over seeds lie within 0.9 and 1.1 for all three weights; not held if any lies "
        "outside.",
        expected="λ is described as a threshold (abstract); a pilot found D/λ of 0.5, 0.14 and 0.01",
        run=_tolerance,
    ),
)
