"""Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching (arXiv 2402.04051)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from weightlab.papers.figure import rounded
from weightlab.papers.schema import Claim, ClaimContext, ClaimResult, Paper, Scale, Verdict

if TYPE_CHECKING:
    from weightlab.merge import Permutation
    from weightlab.papers._matched_digits import Between, Params

PAPER = Paper(
    number=26,
    slug="weight-matching",
    title="Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching",
    authors=("Ito", "Yamada", "Kumagai"),
    author_count=3,
    date="2024-02",
    arxiv="2402.04051",
    venue="ICLR 2025",
    summary=(
        "Two networks trained from different seeds often become linearly connected once the hidden units "
        "of one are permuted so that the weights match. The paper asks why. The distance between the "
        "weights shrinks by a modest fraction only; but a permutation, which cannot change singular "
        "values, turns the singular vectors of large singular values into agreement, and those carry the "
        "function, so the average of both networks keeps it. Matching by activations works on the same "
        "principle, whereas permutations found with a straight-through estimator lower the loss between "
        "two given models without aligning singular vectors and do not extend to three or more. The "
        "matching problem is solved by coordinate descent over assignment problems, which is not exact: "
        "it can stop at a poor local optimum even where a perfect match exists, so restarts belong to the "
        "method. Networks with batch normalisation need their statistics recomputed after averaging. No "
        "official code is known; the work builds on samuela/git-re-basin."
    ),
    room="merge",
    parts=(
        "merge.PermutationSpec",
        "merge.weight_matching",
        "merge.activation_matching",
        "merge.ste_matching",
        "merge.apply_permutation",
        "merge.interpolate",
        "merge.loss_barrier",
        "merge.singular_alignment",
        "merge.check_equivalence",
    ),
    keywords=(
        "git re-basin",
        "permutation symmetry",
        "model merging",
        "loss barrier",
        "singular vectors",
        "linear assignment",
    ),
)


@dataclass(frozen=True)
class _Size:
    """How much of the protocol is run.

    Attributes:
        widths: Of hidden layers, ascending. The narrowest is compared with the widest, and shows what learning rates
            and weight decay do.
        width: In all other claims.
        triples: Of networks: a, b and c. Pairs are a and b.
        epochs: Passes over the training images.
        steps: Of the straight-through search.
    """

    widths: tuple[int, ...]
    width: int
    triples: int
    epochs: int
    steps: int


SIZES: dict[Scale, _Size] = {
    "smoke": _Size(widths=(8, 24), width=24, triples=2, epochs=3, steps=4),
    "cpu": _Size(widths=(64, 128, 256), width=128, triples=6, epochs=40, steps=100),
}
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
WEIGHT_DECAYS = (0.0, 1e-3, 3e-3)
# Learning rates of the straight-through search that begins at A's weights, and at B's in random order: each the best of
# four on other seeds.
FROM_A, FROM_B = 0.1, 30.0

Interval = tuple[float, float]
Pairs = list[tuple["Params", "Params"]]


def judge(*conditions: tuple[Interval, float]) -> Verdict:
    """Held if every interval lies above its bound, not held if one lies below its own, else inconclusive.

    Example:
        >>> judge(((0.4, 0.6), 0.3), ((0.0, 1.0), 0.5))
        'inconclusive'
    """
    if all(low > bound for (low, _), bound in conditions):
        return "held"
    return "not held" if any(high < bound for (_, high), bound in conditions) else "inconclusive"


def below(interval: Interval, bound: float) -> tuple[Interval, float]:
    """The condition that an interval lies below a bound, for `judge`."""
    return (-interval[1], -interval[0]), -bound


def _mean(values: Sequence[float]) -> tuple[float, Interval]:
    """The mean and its 95 % interval."""
    from weightlab.trial.statistics import PairedMean

    estimate = PairedMean(values)
    return estimate.mean, estimate.interval(0.95)


def _told(mean: float, interval: Interval) -> str:
    return f"{mean:.3g} ({interval[0]:.3g} to {interval[1]:.3g})"


def _seeds(size: _Size, *, pairs: bool = False) -> tuple[int, ...]:
    return tuple(seed for seed in range(3 * size.triples) if seed % 3 < 2 or not pairs)


def _triples(ctx: ClaimContext) -> list[tuple[Params, Params, Params]]:
    from weightlab.papers._matched_digits import trained

    size = SIZES[ctx.scale]
    ctx.progress(0.05, f"training {3 * size.triples} networks of width {size.width}")
    nets = trained(size.width, _seeds(size), size.epochs)
    return list(zip(nets[::3], nets[1::3], nets[2::3], strict=True))


def _pairs(ctx: ClaimContext, width: int, *, lr: float = 1e-3, weight_decay: float = 0.0) -> Pairs:
    from weightlab.papers._matched_digits import trained

    size = SIZES[ctx.scale]
    if (width, lr, weight_decay) == (size.width, 1e-3, 0.0):
        return [(a, b) for a, b, _ in _triples(ctx)]
    ctx.progress(0.1, f"training networks: width {width}, rate {lr:g}, decay {weight_decay:g}")
    nets = trained(width, _seeds(size, pairs=True), size.epochs, lr=lr, weight_decay=weight_decay)
    return list(zip(nets[::2], nets[1::2], strict=True))


def _weights(a: Params, b: Params, seed: int) -> Permutation:
    import torch

    from weightlab.merge import weight_matching
    from weightlab.papers._matched_digits import SPEC

    return weight_matching(a, b, SPEC, generator=torch.Generator().manual_seed(seed))


def _random(a: Params, seed: int) -> Permutation:
    import torch

    from weightlab.merge import Permutation
    from weightlab.papers._matched_digits import SPEC

    return Permutation.random(SPEC.group_sizes(a), generator=torch.Generator().manual_seed(seed))


def _activations(a: Params, b: Params) -> Permutation:
    from weightlab.merge import activation_matching
    from weightlab.papers._matched_digits import SPEC, images, network

    return activation_matching(network(a), network(b), [images(test=False)], SPEC)


@cache
def _straight_through(scale: Scale, seed: int, other: int, *, from_a: bool) -> Permutation:
    """The search's permutation of network `other` of triple `seed`."""
    import torch

    from weightlab.merge import ste_matching
    from weightlab.papers._matched_digits import SPEC, images, network, trained

    size = SIZES[scale]
    nets = trained(size.width, _seeds(size), size.epochs)
    a, b = nets[3 * seed], nets[3 * seed + other]
    return ste_matching(
        network(a),
        network(b),
        [images(test=False)],
        SPEC,
        steps=size.steps,
        lr=FROM_A if from_a else FROM_B,
        init=None if from_a else _random(a, 2 * seed + other),
        generator=torch.Generator().manual_seed(seed),
    )


def _measured(pairs: Pairs, perms: Sequence[Permutation | None]) -> list[Between]:
    from weightlab.papers._matched_digits import between

    return [between(a, b, perm) for (a, b), perm in zip(pairs, perms, strict=True)]


def _by_weights(pairs: Pairs) -> tuple[list[Between], list[Between]]:
    """Before matching and after."""
    matched = [_weights(a, b, seed) for seed, (a, b) in enumerate(pairs)]
    return _measured(pairs, [None] * len(pairs)), _measured(pairs, matched)


def _cuts(before: Sequence[Between], after: Sequence[Between]) -> list[float]:
    """Shares of the barriers that are gone; of none, nothing can go."""
    return [
        1 - new.barrier / old.barrier if old.barrier else 0.0 for old, new in zip(before, after, strict=True)
    ]


def _nearer(before: Sequence[Between], after: Sequence[Between]) -> list[float]:
    """Shares of the distances that are gone."""
    return [1 - new.distance / old.distance for old, new in zip(before, after, strict=True)]


def _table(arms: Mapping[str, Sequence[Between]]) -> list[dict[str, Any]]:
    """A row of means for each arm, beside the first."""
    before = next(iter(arms.values()))
    return [
        {
            "permutation": name,
            "barrier": statistics.fmean(found.barrier for found in arm),
            "barrier gone": statistics.fmean(_cuts(before, arm)),
            "distance gone": statistics.fmean(_nearer(before, arm)),
            "alignment, large": statistics.fmean(found.large for found in arm),
            "alignment, all": statistics.fmean(found.all for found in arm),
        }
        for name, arm in arms.items()
    ]


def _lines(title: str, arms: Mapping[str, Sequence[Between]]) -> dict[str, Any]:
    """Losses between two networks, means with a band from lowest to highest."""
    series = []
    for name, arm in arms.items():
        columns = list(zip(*(found.line for found in arm), strict=True))
        series.append(
            {
                "name": name,
                "x": [i / (len(columns) - 1) for i in range(len(columns))],
                "y": rounded(map(statistics.fmean, columns)),
                "low": rounded(map(min, columns)),
                "high": rounded(map(max, columns)),
            }
        )
    return _figure(title, "share of the second network", "test loss", series)


def _figure(
    title: str, x_label: str, y_label: str, series: list[dict[str, Any]], *, log_x: bool = False
) -> dict[str, Any]:
    return {
        "title": title, "x_label": x_label, "y_label": y_label, "log_x": log_x, "log_y": False, "series": series,
    }  # fmt: skip


def _barrier_not_distance(ctx: ClaimContext) -> ClaimResult:
    size = SIZES[ctx.scale]
    pairs = _pairs(ctx, size.width)
    ctx.progress(0.6, "matching")
    before, after = _by_weights(pairs)
    random = _measured(pairs, [_random(a, seed) for seed, (a, _) in enumerate(pairs)])
    arms = {"none": before, "matched weights": after, "random": random}
    cut, cut_interval = _mean(_cuts(before, after))
    nearer, nearer_interval = _mean(_nearer(before, after))
    return ClaimResult(
        verdict=judge((cut_interval, 0.9), below(nearer_interval, 0.35)),
        measured=f"Matching takes away {_told(cut, cut_interval)} of the barrier and {_told(nearer, nearer_interval)} of the "
        f"distance, {len(pairs)} pairs of width {size.width}.",
        value=cut,
        interval=cut_interval,
        figure=_lines("Between two networks", arms),
        table=_table(arms),
        seeds=_seeds(size, pairs=True),
    )


def _singular_vectors(ctx: ClaimContext) -> ClaimResult:
    from weightlab.merge import apply_permutation, singular_alignment
    from weightlab.papers._matched_digits import SPEC

    size = SIZES[ctx.scale]
    pairs = _pairs(ctx, size.width)
    ctx.progress(0.6, "matching")
    before, after = _by_weights(pairs)
    ratio, interval = _mean([found.large / found.all for found in after])
    rise, rise_interval = _mean([new.large - old.large for old, new in zip(before, after, strict=True)])
    thresholds = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)
    a, b = pairs[0]
    moved = apply_permutation(SPEC, _weights(a, b, 0), b)
    series = [
        {
            "name": name,
            "x": list(thresholds),
            "y": rounded(singular_alignment(a, other, threshold)["total"] for threshold in thresholds),
        }
        for name, other in (("none", b), ("matched weights", moved))
    ]
    return ClaimResult(
        verdict=judge((interval, 1.5), (rise_interval, 0.1)),
        measured=f"After matching the alignment of large singular vectors is {_told(ratio, interval)} times that of all, and "
        f"{_told(rise, rise_interval)} above that before, {len(pairs)} pairs.",
        value=ratio,
        interval=interval,
        figure=_figure(
            "Alignment of singular vectors, one pair",
            "least share of the largest singular value",
            "alignment",
            series,
        ),
        table=_table({"none": before, "matched weights": after}),
        seeds=_seeds(size, pairs=True),
    )


def _which_part(ctx: ClaimContext) -> ClaimResult:
    from weightlab.papers._matched_digits import part

    size = SIZES[ctx.scale]
    pairs = _pairs(ctx, size.width)
    ctx.progress(0.6, "matching parts")
    arms = {"none": _measured(pairs, [None] * len(pairs))}
    for name, large in (("matched large part", True), ("matched small part", False)):
        perms = [
            _weights(part(a, large=large), part(b, large=large), seed) for seed, (a, b) in enumerate(pairs)
        ]
        arms[name] = _measured(pairs, perms)
    before, large_part, small_part = arms.values()
    cuts = [_cuts(before, arm) for arm in (large_part, small_part)]
    gap, interval = _mean([x - y for x, y in zip(*cuts, strict=True)])
    return ClaimResult(
        verdict=judge((interval, 0.5)),
        measured=f"Matched by large singular values alone, networks lose {statistics.fmean(cuts[0]):.2f} of their barrier; by small "
        f"ones alone {statistics.fmean(cuts[1]):.2f}: {_told(gap, interval)} less, {len(pairs)} pairs.",
        value=gap,
        interval=interval,
        figure=_lines("Matched by a part of the singular values", arms),
        table=_table(arms),
        seeds=_seeds(size, pairs=True),
    )


def _width(ctx: ClaimContext) -> ClaimResult:
    size = SIZES[ctx.scale]
    found = {width: _by_weights(_pairs(ctx, width)) for width in size.widths}
    (narrow, narrow_after), (wide, wide_after) = found[size.widths[0]], found[size.widths[-1]]
    gap, gap_interval = _mean(
        [x - y for x, y in zip(_nearer(narrow, narrow_after), _nearer(wide, wide_after), strict=True)]
    )
    fall, fall_interval = _mean(
        [x.barrier - y.barrier for x, y in zip(narrow_after, wide_after, strict=True)]
    )
    return ClaimResult(
        verdict=judge((gap_interval, 0.0), (fall_interval, 0.0)),
        measured=f"From width {size.widths[0]} to {size.widths[-1]} the share of the distance that is gone falls by "
        f"{_told(gap, gap_interval)} and the barrier after matching by {_told(fall, fall_interval)}, {size.triples} pairs each.",
        value=gap,
        interval=gap_interval,
        figure=_figure(
            "Barrier after matching",
            "width",
            "barrier",
            [_band("matched weights", size.widths, [after for _, after in found.values()])],
            log_x=True,
        ),
        table=[
            {"width": width, **row}
            for width, (before, after) in found.items()
            for row in _table({"none": before, "matched weights": after})
        ],
        seeds=_seeds(size, pairs=True),
    )


def _band(name: str, x: Sequence[float], arms: Sequence[Sequence[Between]]) -> dict[str, Any]:
    barriers = [[found.barrier for found in arm] for arm in arms]
    return {
        "name": name,
        "x": list(x),
        "y": rounded(map(statistics.fmean, barriers)),
        "low": rounded(map(min, barriers)),
        "high": rounded(map(max, barriers)),
    }


def _easier(ctx: ClaimContext, option: str, values: Sequence[float], label: str) -> ClaimResult:
    """Compare the barrier after matching at the least and the largest value of an option of training."""
    from weightlab.papers._matched_digits import accuracy, large_share

    size = SIZES[ctx.scale]
    rows, found, shares = [], [], []
    for value in values:
        pairs = _pairs(ctx, size.widths[0], **{option: value})
        before, after = _by_weights(pairs)
        found.append(after)
        shares.append([statistics.fmean(map(large_share, pair)) for pair in pairs])
        right = statistics.fmean(accuracy(net) for pair in pairs for net in pair)
        rows += [
            {label: value, **row, "large singular values": statistics.fmean(shares[-1]), "accuracy": right}
            for row in _table({"none": before, "matched weights": after})
        ]
    fall, interval = _mean([x.barrier - y.barrier for x, y in zip(found[0], found[-1], strict=True)])
    fewer, fewer_interval = _mean([x - y for x, y in zip(shares[0], shares[-1], strict=True)])
    return ClaimResult(
        verdict=judge((interval, 0.0), (fewer_interval, 0.0)),
        measured=f"From {label} {values[0]:g} to {values[-1]:g} the barrier after matching falls by {_told(fall, interval)} and the "
        f"share of large singular values by {_told(fewer, fewer_interval)}, {size.triples} pairs of width {size.widths[0]}.",
        value=fall,
        interval=interval,
        figure=_figure("Barrier after matching", label, "barrier", [_band("matched weights", values, found)]),
        table=rows,
        seeds=_seeds(size, pairs=True),
    )


def _learning_rate(ctx: ClaimContext) -> ClaimResult:
    return _easier(ctx, "lr", LEARNING_RATES, "learning rate")


def _weight_decay(ctx: ClaimContext) -> ClaimResult:
    return _easier(ctx, "weight_decay", WEIGHT_DECAYS, "weight decay")


def _activation_matching(ctx: ClaimContext) -> ClaimResult:
    size = SIZES[ctx.scale]
    pairs = _pairs(ctx, size.width)
    ctx.progress(0.6, "matching")
    before, by_weights = _by_weights(pairs)
    after = _measured(pairs, [_activations(a, b) for a, b in pairs])
    arms = {"none": before, "matched weights": by_weights, "matched activations": after}
    cut, interval = _mean(_cuts(before, after))
    rise, rise_interval = _mean([new.large - old.large for old, new in zip(before, after, strict=True)])
    return ClaimResult(
        verdict=judge((interval, 0.9), (rise_interval, 0.1)),
        measured=f"Matching activations takes away {_told(cut, interval)} of the barrier and raises the alignment of large singular "
        f"vectors by {_told(rise, rise_interval)}, {len(pairs)} pairs.",
        value=cut,
        interval=interval,
        figure=_lines("Between two networks", arms),
        table=_table(arms),
        seeds=_seeds(size, pairs=True),
    )


def _straight(ctx: ClaimContext, *, from_a: bool) -> ClaimResult:
    size = SIZES[ctx.scale]
    pairs = _pairs(ctx, size.width)
    before, by_weights = _by_weights(pairs)
    perms: list[Permutation | None] = []
    for seed in range(size.triples):
        ctx.progress(0.3 + 0.7 * seed / size.triples, f"straight-through search, pair {seed + 1}")
        perms.append(_straight_through(ctx.scale, seed, 1, from_a=from_a))
    after = _measured(pairs, perms)
    arms = {"none": before, "matched weights": by_weights, "straight through": after}
    cut, cut_interval = _mean(_cuts(before, after))
    share, interval = _mean([x.large / y.large for x, y in zip(after, by_weights, strict=True)])
    return ClaimResult(
        verdict=judge(below(interval, 0.5), (cut_interval, 0.9)),
        measured=f"The search's alignment of large singular vectors is {_told(share, interval)} times that of matched weights, and "
        f"takes away {_told(cut, cut_interval)} of the barrier, {len(pairs)} pairs.",
        value=share,
        interval=interval,
        figure=_lines("Between two networks", arms),
        table=_table(arms),
        seeds=_seeds(size, pairs=True),
    )


def _straight_from_a(ctx: ClaimContext) -> ClaimResult:
    return _straight(ctx, from_a=True)


def _straight_from_b(ctx: ClaimContext) -> ClaimResult:
    return _straight(ctx, from_a=False)


def _third_network(ctx: ClaimContext) -> ClaimResult:
    from weightlab.merge import apply_permutation
    from weightlab.papers._matched_digits import SPEC, between

    size = SIZES[ctx.scale]
    triples = _triples(ctx)
    arms: dict[str, list[Between]] = {"none": [], "matched weights": [], "straight through": []}
    for seed, (a, b, c) in enumerate(triples):
        ctx.progress(0.3 + 0.7 * seed / size.triples, f"triple {seed + 1}")
        arms["none"].append(between(b, c))
        perms = [_weights(a, other, seed) for other in (b, c)]
        searched = [_straight_through(ctx.scale, seed, i, from_a=False) for i in (1, 2)]
        for name, (left, right) in (("matched weights", perms), ("straight through", searched)):
            arms[name].append(between(apply_permutation(SPEC, left, b), c, right))
    before, by_weights, search = arms.values()
    cut, cut_interval = _mean(_cuts(before, by_weights))
    gap, interval = _mean(
        [x - y for x, y in zip(_cuts(before, by_weights), _cuts(before, search), strict=True)]
    )
    return ClaimResult(
        verdict=judge((cut_interval, 0.8), (interval, 0.2)),
        measured=f"Between two networks that were matched with a third, not with each other, matching weights takes away "
        f"{_told(cut, cut_interval)} of the barrier, {_told(gap, interval)} more than the straight-through search, {len(triples)} triples.",
        value=gap,
        interval=interval,
        figure=_lines("Between two networks matched with a third", arms),
        table=_table(arms),
        seeds=_seeds(size),
    )


_PROTOCOL = "Perceptrons 64-w-w-w-10 on scikit-learn's digits, Adam; barriers on test images. Intervals are of the mean, 95 %."

CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="barrier-not-distance",
        statement="Matching weights makes the barrier between two networks vanish although it leaves most of their distance.",
        threshold="Held if the interval of the share of the barrier that is gone lies above 0.9 and that of the share of the distance "
        f"that is gone below 0.35; not held if one lies on the other side. {_PROTOCOL}",
        expected="barriers near 0 with distances 15 to 30 % shorter",
        run=_barrier_not_distance,
    ),
    Claim(
        name="singular-vectors",
        statement="Matching weights aligns singular vectors of large singular values, those of at least 0.3 of the largest, far more "
        "than others.",
        threshold="Held if the interval of their alignment over that of all lies above 1.5 and that of its rise above 0.1; not "
        f"held if one lies below. {_PROTOCOL}",
        expected="alignment rises with the threshold, and stays small over all vectors",
        run=_singular_vectors,
    ),
    Claim(
        name="which-part",
        statement="It is the large singular values that count: networks matched by these alone lose their barrier, networks matched by "
        "the small ones alone do not.",
        threshold="Held if the interval of the difference of the shares of the barrier that are gone lies above 0.5; not held if "
        f"below. {_PROTOCOL}",
        expected="our control; the paper argues from the alignment",
        run=_which_part,
    ),
    Claim(
        name="width",
        statement="The wider the networks, the less of their distance matching takes away, and the lower the barrier that it leaves.",
        threshold="Held if the intervals of both falls, from the least width to the largest, lie above 0; not held if one lies "
        f"below. {_PROTOCOL}",
        expected="wider networks have fewer directions of large singular values to align",
        run=_width,
    ),
    Claim(
        name="learning-rate",
        statement="A larger learning rate leaves a smaller share of large singular values, and a lower barrier after matching.",
        threshold="Held if the intervals of both falls, from the least rate to the largest, lie above 0; not held if one lies "
        f"below. {_PROTOCOL}",
        expected="larger learning rates make networks easier to connect",
        run=_learning_rate,
    ),
    Claim(
        name="weight-decay",
        statement="A larger weight decay leaves a smaller share of large singular values, and a lower barrier after matching.",
        threshold="Held if the intervals of both falls, from no decay to the largest, lie above 0; not held if one lies below. "
        f"{_PROTOCOL}",
        expected="larger weight decays make networks easier to connect",
        run=_weight_decay,
    ),
    Claim(
        name="activation-matching",
        statement="Matching activations works on the same principle: it takes the barrier away and aligns large singular vectors.",
        threshold="Held if the interval of the share of the barrier that is gone lies above 0.9 and that of the rise of the "
        f"alignment above 0.1; not held if one lies below. {_PROTOCOL}",
        expected="alignments rise as with matched weights",
        run=_activation_matching,
    ),
    Claim(
        name="straight-through",
        statement="Permutations of the straight-through search take the barrier away without aligning large singular vectors.",
        threshold="Held if the interval of their alignment over that of matched weights lies below 0.5 and that of the share of the "
        "barrier that is gone above 0.9; not held if one lies on the other side. The search begins at A's weights, as in Git "
        f"Re-Basin. {_PROTOCOL}",
        expected="barriers as low as with matched weights, alignments hardly above those before",
        run=_straight_from_a,
    ),
    Claim(
        name="straight-through-alone",
        statement="So do permutations of a straight-through search that begins at a random permutation rather than at matched weights.",
        threshold=f"As of straight-through, the search beginning at B's weights in random order. {_PROTOCOL}",
        expected="barriers as low as with matched weights, alignments hardly above those before",
        run=_straight_from_b,
    ),
    Claim(
        name="third-network",
        statement="Two networks whose weights were matched with a third are connected with each other; not so after straight-through "
        "searches.",
        threshold="Held if the interval of the share of the barrier that is gone lies above 0.8 with matched weights, and that of its "
        f"lead over the search, which begins at random permutations, above 0.2; not held if one lies below. {_PROTOCOL}",
        expected="matched weights connect three networks and more, the search does not",
        run=_third_network,
    ),
)
