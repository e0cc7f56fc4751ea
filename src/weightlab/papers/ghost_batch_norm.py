"""Train longer, generalize better (arXiv 1705.08741)."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from weightlab.papers import trials
from weightlab.papers.figure import rounded
from weightlab.papers.schema import Claim, ClaimContext, ClaimResult, Paper, Scale, Verdict

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from weightlab.tasks.base import Split
    from weightlab.tasks.classification import Classification
    from weightlab.trial.arm import Arm

PAPER = Paper(
    number=30,
    slug="ghost-batch-norm",
    title=(
        "Train longer, generalize better: closing the generalization gap in large batch training of "
        "neural networks"
    ),
    authors=("Hoffer", "Hubara", "Soudry"),
    author_count=3,
    date="2017-05",
    arxiv="1705.08741",
    venue="NIPS 2017",
    code=("eladhoffer/bigBatch",),
    summary=(
        "Large batches trained for the same number of epochs generalise worse. The paper models the early "
        "phase as a random walk in a random potential, finds that the distance from the initial weights "
        "grows with the logarithm of time, and concludes that the gap comes from too few updates rather "
        "than from the batch itself. Its remedies add up: scale the learning rate with the square root of "
        "the batch ratio, compute batch-norm statistics over small ghost batches inside the large one, "
        "keep the number of updates by training for more epochs, and clip gradients early. With all of "
        "them the reported gap closes on several image benchmarks. The printed formula for the running "
        "statistics has an exponent that does not make its weights sum to one; the official code is "
        "right. Ghost normalisation acts as a noise regulariser whose strength depends on the ghost size, "
        "so how far it closes this particular gap is open."
    ),
    room="nn",
    parts=(
        "nn.GhostBatchNorm1d",
        "nn.GhostBatchNorm2d",
        "nn.GhostBatchNorm3d",
        "train.scale_lr",
        "train.adapt_regime",
        "train.DistanceFromInit",
    ),
    keywords=(
        "large batch",
        "generalisation gap",
        "batch normalisation",
        "learning-rate scaling",
        "random walk",
        "training regime",
    ),
)


SMALL, LARGE = 32, 512
LR, WEIGHT_DECAY = 0.1, 1e-4
NOISE = 0.2
DIFFERENCE = 0.002
WALK_BATCHES = (32, 128, 512)
WALK_FROM = 10


@dataclass(frozen=True)
class _Size:
    """What a scale costs: seeds and epochs with right and with wrong labels, seeds and steps of the walks."""

    seeds: int
    noisy_seeds: int
    epochs: int
    noisy_epochs: int
    walk_seeds: int
    walk_steps: int


SIZES: dict[Scale, _Size] = {
    "smoke": _Size(seeds=2, noisy_seeds=2, epochs=2, noisy_epochs=2, walk_seeds=2, walk_steps=60),
    "cpu": _Size(seeds=8, noisy_seeds=6, epochs=20, noisy_epochs=30, walk_seeds=5, walk_steps=500),
}


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        batch: Examples in a batch.
        rule: How the small batch's learning rate is scaled; `None`: not at all.
        ghost_size: Of ghost batch norm; `None`: statistics of the whole batch.
        longer: Whether epochs are multiplied so that there are as many updates as with the small batch.
    """

    batch: int
    rule: Literal["sqrt", "linear"] | None = None
    ghost_size: int | None = None
    longer: bool = False

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        from weightlab.train import scale_lr

        return scale_lr(LR, self.batch, SMALL, self.rule) if self.rule else LR

    def epochs(self, epochs: int) -> int:
        """Epochs where the small batch has so many."""
        from weightlab.train import adapt_regime

        return adapt_regime([], epochs, self.batch, SMALL).total if self.longer else epochs


RECIPES = {
    "SB": Recipe(SMALL),
    "LB": Recipe(LARGE),
    "LB + linear LR": Recipe(LARGE, "linear"),
    "LB + LR": Recipe(LARGE, "sqrt"),
    "LB + LR + GBN": Recipe(LARGE, "sqrt", 32),
    "LB + LR + GBN of 16": Recipe(LARGE, "sqrt", 16),
    "LB + LR + GBN of 8": Recipe(LARGE, "sqrt", 8),
    "LB + LR + RA": Recipe(LARGE, "sqrt", longer=True),
    "LB + LR + GBN + RA": Recipe(LARGE, "sqrt", 32, longer=True),
}


def _wrong(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Replace a share of the labels by one of the nine others."""
    import torch

    shift = torch.randint(1, 10, labels.shape, generator=generator)
    chosen = torch.rand(labels.shape, generator=generator) < share
    return torch.where(chosen, (labels + shift) % 10, labels)


@functools.cache
def _task(batch: int, noise: float) -> Classification:
    """Digits for three layers of 128 with batch norm; a share of the training labels is wrong for good.

    Nothing is chosen on the validation images, so they are tested on as well.
    """
    import torch
    from torch import nn

    from weightlab.tasks.classification import Classification
    from weightlab.tasks.digest import code_digest, digest
    from weightlab.tasks.digits_mlp import digits
    from weightlab.tasks.models.seeding import seeded_by

    class Digits(Classification):
        def __init__(self) -> None:
            self.hidden = (128, 128, 128)
            self.batch_size = batch
            self.noise = noise
            self.name = f"digits-bn, batch {batch}, {noise:.0%} wrong labels"

        def build(self, generator: torch.Generator) -> nn.Module:
            layers: list[nn.Module] = [nn.Flatten()]
            with seeded_by(generator):
                for inputs, outputs in pairwise((64, *self.hidden)):
                    layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
                return nn.Sequential(*layers, nn.Linear(self.hidden[-1], 10))

        def images(self, split: Split) -> tuple[Tensor, Tensor]:
            pixels, labels = digits()[split]
            if split == "train":
                return pixels, _wrong(labels, self.noise, torch.Generator().manual_seed(0))
            if split == "test":
                more_pixels, more_labels = digits()["validation"]
                return torch.cat([pixels, more_pixels]), torch.cat([labels, more_labels])
            return pixels, labels

        def prepare(self, pixels: Tensor) -> Tensor:
            return pixels.float() / 16.0

        def fingerprint(self) -> str:
            return digest(code_digest(), *self.images("train"), *self.images("test"))

    return Digits()


def _arm(name: str, recipe: Recipe) -> Arm:
    from weightlab.trial import registry

    arm = registry.arm("ghost-bn" if recipe.ghost_size else "clipped-sgd")
    fixed = {"lr": recipe.lr, "weight_decay": WEIGHT_DECAY}
    if recipe.ghost_size:
        fixed["ghost_size"] = recipe.ghost_size
    # What is fixed here is no part of a run's key, so the name says it.
    name = f"{name} ({', '.join(f'{key} {value:.3g}' for key, value in fixed.items())})"
    return replace(arm, name=name, search_space={}, defaults={**arm.defaults, **fixed})


@dataclass(frozen=True)
class _Outcome:
    """Test errors by recipe, one a seed, with the number of updates; learning curves; seconds of training."""

    errors: dict[str, list[float]]
    updates: dict[str, int]
    series: list[dict[str, Any]]
    cost: float


def _train(ctx: ClaimContext, noise: float) -> _Outcome:
    """Train by every recipe; a second call reads the store."""
    size = SIZES[ctx.scale]
    seeds, epochs = (size.noisy_seeds, size.noisy_epochs) if noise else (size.seeds, size.epochs)
    outcome = _Outcome({}, {}, [], 0.0)
    groups: dict[tuple[int, int], dict[str, Arm]] = {}
    for name, recipe in RECIPES.items():
        groups.setdefault((recipe.batch, recipe.epochs(epochs)), {})[name] = _arm(name, recipe)
    for index, ((batch, total), arms) in enumerate(groups.items()):
        task = _task(batch, noise)
        updates = total * (len(task.images("train")[1]) // batch)
        report = trials.run_trial(
            ctx,
            task,
            list(arms.values()),
            tune=0,
            seeds=seeds,
            steps=updates,
            eval_points=5,
            span=(index / len(groups), (index + 1) / len(groups)),
        )
        for (name, arm), drawn in zip(arms.items(), trials.curves(report)["series"], strict=True):
            outcome.errors[name] = [run.score for run in report.arm(arm.name).runs]
            outcome.updates[name] = updates
            outcome.series.append({**drawn, "name": name})
        outcome = replace(outcome, cost=outcome.cost + report.seconds)
    return outcome


def _rows(outcome: _Outcome) -> list[dict[str, Any]]:
    """Every recipe's error and its difference to the small batch's, in percentage points."""
    rows = []
    for name, errors in outcome.errors.items():
        low, high = _interval(outcome, "SB", name)
        rows.append(
            {
                "recipe": name,
                "updates": outcome.updates[name],
                "learning rate": RECIPES[name].lr,
                "test error, %": 100 * statistics.fmean(errors),
                "minus SB": 100 * (statistics.fmean(errors) - statistics.fmean(outcome.errors["SB"])),
                "low": 100 * low,
                "high": 100 * high,
            }
        )
    return rows


def _interval(outcome: _Outcome, first: str, second: str) -> tuple[float, float]:
    """95 % interval of the error of the second recipe minus that of the first, paired by seed."""
    from weightlab.trial.statistics import PairedMean

    pairs = zip(outcome.errors[first], outcome.errors[second], strict=True)
    return PairedMean([b - a for a, b in pairs]).interval(0.95)


def _compared(outcome: _Outcome, first: str, second: str, verdict: Verdict, more: str = "") -> ClaimResult:
    """Report on the error of the second recipe minus the first's."""
    mean = {name: statistics.fmean(outcome.errors[name]) for name in (first, second)}
    low, high = _interval(outcome, first, second)
    value = mean[second] - mean[first]
    return ClaimResult(
        verdict=verdict,
        measured=f"test error {100 * mean[second]:.2f} % by {second}, {100 * mean[first]:.2f} % by {first}: "
        f"difference {100 * value:+.2f} points (95 % interval {100 * low:+.2f} to {100 * high:+.2f}){more}.",
        value=value,
        interval=(low, high),
        figure={
            "title": "Test error along training",
            "x_label": "update",
            "y_label": "test error",
            "log_x": True,
            "log_y": True,
            "series": [line for line in outcome.series if line["name"] in ("SB", first, second)],
        },
        table=_rows(outcome),
        cost=outcome.cost,
        seeds=range(len(outcome.errors["SB"])),
    )


def judge_worse(interval: tuple[float, float]) -> Verdict:
    """Judge "the error is larger by more than `DIFFERENCE`" by the interval of the difference."""
    low, high = interval
    return "held" if low > DIFFERENCE else "not held" if high < DIFFERENCE else "inconclusive"


def judge_no_worse(interval: tuple[float, float]) -> Verdict:
    """Judge "the error is not larger by more than `DIFFERENCE`" by the interval of the difference."""
    low, high = interval
    return "held" if high < DIFFERENCE else "not held" if low > DIFFERENCE else "inconclusive"


def _gap(ctx: ClaimContext) -> ClaimResult:
    outcome = _train(ctx, 0.0)
    return _compared(outcome, "SB", "LB", judge_worse(_interval(outcome, "SB", "LB")))


def _updates_close_it(ctx: ClaimContext) -> ClaimResult:
    outcome = _train(ctx, 0.0)
    low, high = _interval(outcome, "SB", "LB + LR + RA")
    return _compared(
        outcome,
        "SB",
        "LB + LR + GBN + RA",
        judge_no_worse(_interval(outcome, "SB", "LB + LR + GBN + RA")),
        f"; without GBN {100 * low:+.2f} to {100 * high:+.2f}",
    )


def _ghosts_help(ctx: ClaimContext) -> ClaimResult:
    outcome = _train(ctx, 0.0)
    verdict = judge_worse(_interval(outcome, "LB + LR + GBN", "LB + LR"))
    return _compared(outcome, "LB + LR + GBN", "LB + LR", verdict)


def _ghosts_regularise(ctx: ClaimContext) -> ClaimResult:
    outcome = _train(ctx, NOISE)
    verdict = judge_worse(_interval(outcome, "LB + LR + GBN of 8", "LB + LR + GBN"))
    low, high = _interval(outcome, "SB", "LB")
    return _compared(
        outcome,
        "LB + LR + GBN of 8",
        "LB + LR + GBN",
        verdict,
        f"; LB minus SB {100 * low:+.2f} to {100 * high:+.2f} points",
    )


@functools.cache
def _walk(
    batch: int, lr: float, weight_decay: float, seed: int, steps: int, device: str
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Train at a constant rate; return steps and distances from the initial weights.

    A share of the labels is wrong anew in each batch, so that the training set cannot be fitted within the walk.
    """
    import torch

    from weightlab.train import DistanceFromInit
    from weightlab.trial.arms.large_batch import DEFAULTS, clipped_sgd
    from weightlab.trial.hashing import derive_seed
    from weightlab.trial.runner import endless

    task = _task(batch, 0.0)
    model = task.build(torch.Generator().manual_seed(derive_seed(seed, "weights"))).to(device).train()
    optimizer = clipped_sgd(model, {**DEFAULTS, "lr": lr, "weight_decay": weight_decay})
    tracker = DistanceFromInit(model)
    data = torch.Generator().manual_seed(derive_seed(seed, "data"))
    for _, (pixels, labels) in zip(range(steps), endless(task, data), strict=False):
        labels = _wrong(labels, NOISE, data)
        optimizer.zero_grad()
        task.loss(model, (pixels.to(device), labels.to(device))).backward()
        optimizer.step()
        tracker()
    return tuple(tracker.steps), tuple(tracker.distances)


def _walks(
    ctx: ClaimContext, settings: Sequence[Recipe], weight_decay: float, span: tuple[float, float]
) -> dict[Recipe, list[tuple[tuple[int, ...], tuple[float, ...]]]]:
    """Walk by every recipe and seed."""
    size = SIZES[ctx.scale]
    start, end = span
    walks = {}
    for index, recipe in enumerate(settings):
        ctx.progress(start + (end - start) * index / len(settings), f"walks with batch {recipe.batch}")
        walks[recipe] = [
            _walk(recipe.batch, recipe.lr, weight_decay, seed, size.walk_steps, ctx.device)
            for seed in range(size.walk_seeds)
        ]
    return walks


def _logarithmic_walk(ctx: ClaimContext) -> ClaimResult:
    from weightlab.train import fit_laws

    started = time.perf_counter()
    recipes = [Recipe(batch) for batch in WALK_BATCHES]
    cells: dict[str, dict[str, list[float]]] = {}
    series = []
    for index, weight_decay in enumerate((WEIGHT_DECAY, 0.0)):
        for recipe, walks in _walks(ctx, recipes, weight_decay, (index / 2, (index + 1) / 2)).items():
            fits = [fit_laws(*_from(WALK_FROM, *walk)) for walk in walks]
            cells[f"batch {recipe.batch}, decay {weight_decay:g}"] = {
                name: [fit[name].r2 for fit in fits] for name in ("log", "sqrt", "linear", "power")
            }
            if weight_decay:
                series.append(_drawn(f"batch {recipe.batch}", walks))
    verdict = judge_walk(cells)
    table = [
        {"setting": setting, **{f"R², {law}": statistics.fmean(r2) for law, r2 in laws.items()}}
        for setting, laws in cells.items()
    ]
    margins = {
        setting: statistics.fmean(laws["log"])
        - max(statistics.fmean(r2) for law, r2 in laws.items() if law != "log")
        for setting, laws in cells.items()
    }
    worst = min(margins, key=lambda setting: margins[setting])
    ahead = sum(margin > 0 for margin in margins.values())
    return ClaimResult(
        verdict=verdict,
        measured=f"log t has the best R² in {ahead} of {len(cells)} settings; furthest behind or least ahead at "
        f"{worst}: {margins[worst]:+.3f}.",
        value=margins[worst],
        figure=_distance_figure(series),
        table=table,
        cost=time.perf_counter() - started,
        seeds=range(SIZES[ctx.scale].walk_seeds),
    )


def judge_walk(cells: Mapping[str, Mapping[str, Sequence[float]]]) -> Verdict:
    """Judge R² of each law, one a seed, in several settings: setting -> law -> R².

    Held if the mean R² of log t is the largest in every setting; not held if in some setting a rival is
    ahead for certain, at 95 % over all comparisons together (Bonferroni).
    """
    from weightlab.trial.statistics import PairedMean

    comparisons = sum(len(laws) - 1 for laws in cells.values())
    always, beaten = True, False
    for laws in cells.values():
        for rival in set(laws) - {"log"}:
            lead = PairedMean([a - b for a, b in zip(laws["log"], laws[rival], strict=True)])
            always &= lead.mean > 0
            beaten |= lead.interval(1 - 0.05 / comparisons)[1] < 0
    return "held" if always else "not held" if beaten else "inconclusive"


def _sqrt_makes_walks_alike(ctx: ClaimContext) -> ClaimResult:
    from weightlab.trial.statistics import PairedMean

    started = time.perf_counter()
    others = WALK_BATCHES[1:]
    rules: tuple[Literal["sqrt", "linear"] | None, ...] = (None, "sqrt", "linear")
    recipes = [Recipe(batch, rule) for rule in rules for batch in others]
    walks = _walks(ctx, [Recipe(SMALL), *recipes], WEIGHT_DECAY, (0.0, 1.0))
    reference = walks[Recipe(SMALL)]
    apart = {
        recipe: [
            spread(_from(WALK_FROM, *a)[1], _from(WALK_FROM, *b)[1])
            for a, b in zip(reference, walks[recipe], strict=True)
        ]
        for recipe in recipes
    }
    means = {
        rule: [
            statistics.fmean(values)
            for values in zip(*(apart[Recipe(batch, rule)] for batch in others), strict=True)
        ]
        for rule in rules
    }
    gain = PairedMean([a - b for a, b in zip(means[None], means["sqrt"], strict=True)])
    low, high = gain.interval(0.95)
    return ClaimResult(
        verdict="held" if low > 0 else "not held" if high < 0 else "inconclusive",
        measured="mean |log ratio| of distances to batch 32's: "
        + ", ".join(f"{statistics.fmean(values):.3f} {rule or 'unscaled'}" for rule, values in means.items())
        + f"; square-root scaling takes away {gain.mean:+.3f} (95 % interval {low:+.3f} to {high:+.3f}).",
        value=gain.mean,
        interval=(low, high),
        figure=_distance_figure(
            [
                _drawn(f"batch {r.batch}{', scaled' if r.rule else ''}", walks[r])
                for r in walks
                if r.rule != "linear"
            ]
        ),
        table=[
            {
                "batch": r.batch,
                "rule": r.rule or "unscaled",
                "learning rate": r.lr,
                "mean |log ratio|": statistics.fmean(apart[r]),
            }
            for r in recipes
        ],
        cost=time.perf_counter() - started,
        seeds=range(SIZES[ctx.scale].walk_seeds),
    )


def spread(first: Sequence[float], second: Sequence[float]) -> float:
    """Mean absolute logarithm of the ratio of two curves, 0 if they coincide."""
    return statistics.fmean(abs(math.log(a / b)) for a, b in zip(first, second, strict=True))


def _from(first: int, steps: Sequence[int], distances: Sequence[float]) -> tuple[list[int], list[float]]:
    kept = [(t, d) for t, d in zip(steps, distances, strict=True) if t >= first]
    return [t for t, _ in kept], [d for _, d in kept]


def _drawn(name: str, walks: Sequence[tuple[Sequence[int], Sequence[float]]]) -> dict[str, Any]:
    at_step = list(zip(*(distances for _, distances in walks), strict=True))
    return {
        "name": name,
        "x": list(walks[0][0]),
        "y": rounded(map(statistics.fmean, at_step)),
        "low": rounded(map(min, at_step)),
        "high": rounded(map(max, at_step)),
    }


def _distance_figure(series: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "title": "Distance from the initial weights at a constant learning rate",
        "x_label": "update",
        "y_label": "distance",
        "log_x": True,
        "log_y": False,
        "series": series,
    }


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="generalisation-gap",
        statement="For the same number of epochs, a large batch generalises worse than a small one.",
        threshold="Digits, perceptron with batch norm, learning rate 0.1, batch 512 against 32, error on 712 images. "
        "95 % interval of the paired difference, large minus small: held if it lies above +0.2 points, not held if "
        "below, else inconclusive.",
        expected="about a point for a perceptron on MNIST and several for ResNet-44 on CIFAR-10, batch 4096 against 128",
        run=_gap,
    ),
    Claim(
        name="updates-close-the-gap",
        statement="With the learning rate scaled by the square root, ghost batch norm and as many updates as the small "
        "batch makes, the large batch generalises as well.",
        threshold="95 % interval of the paired difference in error, LB + LR + GBN + RA minus SB: held if it lies "
        "below +0.2 points, not held if above, else inconclusive. LB + LR + RA tells whether ghosts are needed.",
        expected="equal or slightly better than the small batch, on all networks tried",
        run=_updates_close_it,
    ),
    Claim(
        name="ghosts-help",
        statement="For equal updates and learning rate, statistics over ghosts of 32 generalise better than over the "
        "batch of 512.",
        threshold="95 % interval of the paired difference in error, LB + LR minus LB + LR + GBN: held if it lies above "
        "+0.2 points, not held if below, else inconclusive.",
        expected="next to nothing for a perceptron on MNIST, one to three points for networks on CIFAR-10",
        run=_ghosts_help,
    ),
    Claim(
        name="small-ghosts-regularise",
        statement="Ghost batch norm is a regulariser that gets stronger as ghosts get smaller: with 20 % wrong training "
        "labels, ghosts of 8 err less than ghosts of 32.",
        threshold="Same network, 20 % of the training labels wrong for good, test labels right. 95 % interval of the "
        "paired difference in error, ghosts of 32 minus ghosts of 8: held if it lies above +0.2 points, not held if "
        "below, else inconclusive. All other recipes are reported beside them.",
        expected="not in the paper; the noise of statistics over g examples goes with 1/√g",
        run=_ghosts_regularise,
    ),
    Claim(
        name="logarithmic-walk",
        statement="At a constant, high learning rate, the distance from the initial weights grows with the logarithm of "
        "the number of updates, for every batch size.",
        threshold="Batches of 32, 128 and 512, learning rate 0.1, weight decay 1e-4 and 0, 20 % of labels wrong anew in "
        "each batch; a + b log t, a + b √t, a + b t and a·t^b fitted from update 10 on. Held if log t has the largest "
        "mean R² in all six settings; not held if in any of them another law has a larger one, at 95 % confidence over "
        "all comparisons together; else inconclusive.",
        expected="log t for all batch sizes from 128 to 4096, ResNet-44 on CIFAR-10",
        run=_logarithmic_walk,
    ),
    Claim(
        name="sqrt-scaling-makes-walks-alike",
        statement="With the learning rate scaled by the square root of the batch ratio, walks with different batch sizes "
        "keep the same distance from the initial weights more nearly than at one learning rate.",
        threshold="Mean |log ratio| of the distances of batches 128 and 512 to those of batch 32, from update 10 on; "
        "unscaled minus square root, paired by seed. Held if the 95 % interval lies above 0, not held if below, else "
        "inconclusive.",
        expected="curves that all but coincide",
        run=_sqrt_makes_walks_alike,
    ),
)
