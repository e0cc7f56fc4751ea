"""Orthogonal Adaptation for Modular Customization of Diffusion Models (arXiv 2312.02432)."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightlab.papers.figure import rounded
from weightlab.papers.schema import Claim, ClaimContext, ClaimResult, Paper, Scale, Verdict

if TYPE_CHECKING:
    from torch import Tensor

PAPER = Paper(
    number=21,
    slug="orthogonal-adaptation",
    title="Orthogonal Adaptation for Modular Customization of Diffusion Models",
    authors=("Po", "Yang", "Aberman", "Wetzstein"),
    author_count=4,
    date="2023-12-05",
    arxiv="2312.02432",
    venue="CVPR 2024",
    summary=(
        "Adapters that were fine-tuned apart, without sight of one another, are often simply added into "
        "one model, and then disturb each other. Here every adapter freezes its down-projection to a few "
        "columns of one shared random orthogonal basis and trains the up-projection alone, so that "
        "adapters listen to different input directions. Merging is a weighted sum of the deltas: no data, "
        "no optimisation, under a second. On twelve identities merged in threes the paper reports "
        "identity scores that stay where they were, while plain LoRAs added together collapse. What is "
        "guaranteed is that the product of two deltas vanishes for disjoint columns, not that one "
        "adapter's delta vanishes on another's inputs; a frozen random subspace of small rank also "
        "catches little of the input, so the trained half must grow and leak with it. Independent random "
        "draws of columns may overlap, and existing LoRAs cannot be converted. No official code is known."
    ),
    room="adapters",
    parts=(
        "adapters.orthogonal_lora_",
        "adapters.merge_adapters",
        "adapters.crosstalk",
        "adapters.shared_basis",
    ),
    keywords=("LoRA", "merging", "interference", "personalisation", "diffusion", "peft", "orthogonal basis"),
)

POINT = 0.01
COST = 0.02
LOSS = 0.02
JUDGED = 4
BATCH = 64
ENLARGED, STAMP = 3, 9
LAMBDAS = (0.3, 0.6, 1.0)
LRS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TUNING_SEEDS = 1000


@dataclass(frozen=True)
class _Size:
    """What a scale costs.

    Attributes:
        width: Units of both hidden layers.
        pretrain: Steps of pre-training.
        steps: Training steps of an adapter.
        ranks: Swept from low to high, until freezing costs little.
        merged: How many adapters are merged, always the first ones; the largest is how many are trained.
        seeds: Seeds reported.
        tuning: Seeds on which rank and learning rates are chosen.
        lrs: Learning rates tried.
    """

    width: int
    pretrain: int
    steps: int
    ranks: tuple[int, ...]
    merged: tuple[int, ...]
    seeds: int
    tuning: int
    lrs: tuple[float, ...]

    @property
    def concepts(self) -> int:
        return max(self.merged)


SIZES: dict[Scale, _Size] = {
    "smoke": _Size(
        width=32, pretrain=40, steps=10, ranks=(8,), merged=(2, 4), seeds=2, tuning=1, lrs=(3e-3, 1e-2)
    ),
    "cpu": _Size(
        width=512, pretrain=300, steps=150, ranks=(4, 16, 64), merged=(2, 4), seeds=8, tuning=2, lrs=LRS
    ),
}

LORA, SAME, HALF, DISJOINT = "LoRA", "frozen, same columns", "frozen, half shared", "frozen, disjoint"
GAUSSIAN, KEYS, TILED, OURS = (
    "frozen, Gaussian",
    "frozen, random columns",
    "frozen, tiled identity",
    "frozen, disjoint principal directions (ours)",
)
ARMS = (LORA, DISJOINT, KEYS, HALF, SAME, GAUSSIAN, TILED, OURS)


@dataclass(frozen=True)
class _Adapters:
    """Adapters (arms × learning rates × concepts) of all layers: A `(G, r, n)`, B `(G, m, r)` for each layer."""

    A: list[Tensor]
    B: list[Tensor]

    def take(self, index: Tensor) -> _Adapters:
        return _Adapters([A[index] for A in self.A], [B[index] for B in self.B])


@functools.cache
def _digits(split: str) -> tuple[Tensor, Tensor]:
    """Digits in 24×24, each pixel enlarged to a square, as rows of 576 numbers in [0, 1]; labels."""
    from weightlab.tasks.digits_mlp import digits

    pixels, labels = digits()[split]  # type: ignore[index]
    images = pixels.float() / 16
    return images.repeat_interleave(ENLARGED, 1).repeat_interleave(ENLARGED, 2).flatten(1), labels


def _marked(images: Tensor, concepts: int, seed: int) -> Tensor:
    """Put each concept's mark, a square of random bits in the upper left corner, on all images: `(K, …, 576)`."""
    import torch

    side = 8 * ENLARGED
    bits = torch.randint(0, 2, (concepts, STAMP, STAMP), generator=torch.Generator().manual_seed(seed))
    out = images.expand(concepts, *images.shape[-2:]).clone().unflatten(-1, (side, side))
    out[..., :STAMP, :STAMP] = bits[:, None].float()
    return out.flatten(-2)


@functools.cache
def _pretrained(width: int, steps: int, seed: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Train the perceptron that adapters start from, on clean digits; return weights and biases."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from weightlab.tasks.models.mlp import MLP
    from weightlab.tasks.models.seeding import seeded_by

    generator = torch.Generator().manual_seed(seed)
    images, labels = _digits("train")
    with seeded_by(generator):
        model = MLP([images.shape[1], width, width, 10])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weights = tuple(layer.weight.detach() for layer in layers)
    return weights, tuple(layer.bias.detach() for layer in layers)


def _forward(base: Any, adapters: _Adapters | None, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run a base model with G adapters on inputs `(G, b, n)`; return logits and every layer's input."""
    inputs = []
    for index, (W, bias) in enumerate(zip(*base, strict=True)):
        inputs.append(x)
        y = x @ W.mT + bias
        if adapters is not None:
            y = y + x @ adapters.A[index].mT @ adapters.B[index].mT
        x = y.relu() if index < len(base[0]) - 1 else y
    return x, inputs


def down_projections(arm: str, n: int, r: int, concepts: int, seed: int, layer: str) -> Tensor:
    """Return lora_A `(concepts, r, n)` of every concept's adapter under an arm."""
    import torch

    from weightlab.adapters import basis

    def stack(**options: Any) -> Tensor:
        columns = [
            basis.shared_basis(n, r, seed=seed, layer=layer, **{k: v(concept) for k, v in options.items()})
            for concept in range(concepts)
        ]
        return torch.stack([part.mT for part in columns])

    if arm == DISJOINT:
        return stack(slot=lambda concept: concept)
    if arm == KEYS:
        return stack(key=str)
    if arm == SAME:
        return stack(slot=lambda concept: 0)
    if arm == GAUSSIAN:
        return stack(slot=lambda concept: concept, kind=lambda concept: "gaussian")
    if arm == HALF:
        half = r // 2
        common = basis.shared_basis(n, half, slot=0, seed=seed)
        own = [basis.shared_basis(n, half, slot=concept + 1, seed=seed) for concept in range(concepts)]
        return torch.stack([torch.cat([common, part], 1).mT for part in own])
    if arm == TILED:
        tiled = torch.eye(r).repeat(1, math.ceil(n / r))[:, :n]
        return (tiled / tiled.norm(dim=1, keepdim=True)).expand(concepts, r, n)
    if arm == LORA:
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(n)
        return torch.rand(concepts, r, n, generator=generator) * 2 * bound - bound
    raise ValueError(f"unknown arm {arm!r}")


def _principal(base: Any, r: int, concepts: int) -> list[Tensor]:
    """Deal the principal directions of every layer's input on clean digits to the concepts."""
    import torch

    from weightlab.adapters import basis

    _, inputs = _forward(base, None, _digits("train")[0])
    dealt = []
    for x in inputs:
        directions = torch.linalg.eigh(x.double().mT @ x.double()).eigenvectors.flip(1).mT
        columns = [
            basis.shared_basis(x.shape[1], r, slot=concept, basis=directions, slots=concepts)
            for concept in range(concepts)
        ]
        dealt.append(torch.stack([part.mT for part in columns]))
    return dealt


def _train(
    size: _Size,
    rank: int,
    seed: int,
    runs: Sequence[tuple[str, float]],
    concepts: int,
    tell: Callable[[float], None],
) -> _Adapters:
    """Train adapters for each arm, learning rate and concept at once.

    Concept k teaches that images with mark k have label k. Half of each batch is marked. Adam, the learning
    rate falling linearly to zero; the arms see the same batches. LoRA trains both factors.
    """
    import torch
    from torch.nn import functional as F

    base = _pretrained(size.width, size.pretrain, seed)
    images, labels = _digits("train")
    names = list(dict.fromkeys(arm for arm, _ in runs))
    A, B = [], []
    for index, W in enumerate(base[0]):
        m, n = W.shape
        made = {
            arm: down_projections(arm, n, rank, size.concepts, seed, str(index))
            for arm in names
            if arm != OURS
        }
        if OURS in names:
            made[OURS] = _principal(base, rank, size.concepts)[index]
        A.append(torch.cat([made[arm][:concepts] for arm, _ in runs]).clone())
        B.append(torch.zeros(len(A[-1]), m, rank))
    parameters = [*A, *B]
    lr = torch.tensor([lr for _, lr in runs]).repeat_interleave(concepts)[:, None, None]
    trains = torch.tensor([arm == LORA for arm, _ in runs]).repeat_interleave(concepts)[:, None, None]
    rates = [lr * trains] * len(A) + [lr] * len(B)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    generator = torch.Generator().manual_seed(seed)
    half = BATCH // 2
    target = torch.arange(concepts)[:, None].expand(concepts, half) % 10
    for step in range(1, size.steps + 1):
        if step % 20 == 1:
            tell(step / size.steps)
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)
        batch, wanted = images[chosen], labels[chosen]
        x = torch.cat([_marked(batch[:half], concepts, seed), batch[half:].expand(concepts, -1, -1)], 1)
        y = torch.cat([target, wanted[half:].expand(concepts, -1)], 1)
        for p in parameters:
            p.requires_grad_(True)
        logits, _ = _forward(base, _Adapters(A, B), x.repeat(len(runs), 1, 1))
        loss = (
            F.cross_entropy(logits.flatten(0, 1), y.repeat(len(runs), 1).flatten(), reduction="sum") / BATCH
        )
        gradients = torch.autograd.grad(loss, parameters)
        decay = 1 - (step - 1) / size.steps
        for p, g, rate, (first, second) in zip(parameters, gradients, rates, moments, strict=True):
            p.requires_grad_(False)
            first.lerp_(g, 0.1)
            second.lerp_(g.square(), 0.001)
            unbiased = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
            p -= decay * rate * (first / (1 - 0.9**step)) / unbiased
    return _Adapters(A, B)


def _accuracy(base: Any, adapters: _Adapters, seed: int, concepts: int, split: str) -> Tensor:
    """Mean of the accuracies on marked and on clean images of a split, adapter by adapter; `(G,)`.

    Adapters come as a multiple of the concepts, whose images they are given in turn.
    """
    import torch

    images, labels = _digits(split)
    target = torch.arange(concepts)[:, None] % 10
    marked = _marked(images, concepts, seed)
    result = []
    for start in range(0, len(adapters.B[0]), concepts):
        chosen = adapters.take(torch.arange(start, start + concepts))
        known = _forward(base, chosen, marked)[0].argmax(-1) == target
        clean = _forward(base, chosen, images.expand(concepts, -1, -1))[0].argmax(-1) == labels
        result.append((known.float().mean(1) + clean.float().mean(1)) / 2)
    return torch.cat(result)


def _merged_accuracy(base: Any, adapters: _Adapters, factor: float, seed: int, split: str) -> float:
    """Add adapters up in the weights; return the mean over concepts of accuracy on marked and on clean images."""
    import torch

    concepts = len(adapters.B[0])
    sums = [torch.einsum("kmr,krn->mn", B, A) for A, B in zip(adapters.A, adapters.B, strict=True)]
    merged = [W + factor * dW for W, dW in zip(base[0], sums, strict=True)], base[1]
    images, labels = _digits(split)
    target = torch.arange(concepts)[:, None] % 10
    known = _forward(merged, None, _marked(images, concepts, seed))[0].argmax(-1) == target
    clean = _forward(merged, None, images)[0].argmax(-1) == labels
    return float((known.float().mean() + clean.float().mean()) / 2)


def _interference(base: Any, adapters: _Adapters, seed: int) -> dict[str, float]:
    """Crosstalk of an arm's adapters, averaged over layers and ordered pairs.

    The product norm; ``‖ΔWⱼ x‖ / ‖W x‖`` and ``‖ΔWⱼ x‖ / ‖ΔWᵢ x‖`` on marked test images of concept i, run
    with adapter i.
    """
    import torch

    concepts = len(adapters.B[0])
    _, inputs = _forward(base, adapters, _marked(_digits("test")[0], concepts, seed))
    sums: dict[str, list[float]] = {"product": [], "leak": [], "relative leak": []}
    pair = ~torch.eye(concepts, dtype=torch.bool)
    for W, A, B, x in zip(base[0], adapters.A, adapters.B, inputs, strict=True):
        R = torch.linalg.qr(B, mode="r").R
        products = (R[:, None] @ (A[:, None] @ A.mT) @ R.mT).flatten(2).norm(dim=2)
        norms = (R @ A).flatten(1).norm(dim=1)
        # through[i, j] is the norm of what adapter j makes of the inputs of concept i.
        through = (x[:, None] @ A.mT @ B.mT).flatten(2).norm(dim=2)
        plain = (x @ W.mT).flatten(1).norm(dim=1)
        sums["product"].append(float((products / (norms[:, None] * norms))[pair].mean()))
        sums["leak"].append(float((through / plain[:, None])[pair].mean()))
        sums["relative leak"].append(float((through / through.diagonal()[:, None])[pair].mean()))
    return {name: statistics.fmean(values) for name, values in sums.items()}


@dataclass(frozen=True)
class Merged:
    """A merge of a few adapters: λ, the accuracy of each alone and of the merge, as means over their concepts."""

    factor: float
    alone: float
    accuracy: float


@dataclass(frozen=True)
class _Outcome:
    """What the runs gave; lists hold one value a seed.

    Attributes:
        rank: The rank that was chosen.
        lrs: Learning rate of each arm at that rank.
        sweep: By rank and arm: mean accuracy alone on the tuning seeds.
        single: By arm: accuracy alone, over the first `JUDGED` concepts.
        merged: By arm and number of adapters.
        interference: By arm, over the first `JUDGED` concepts.
    """

    rank: int
    lrs: dict[str, float]
    sweep: dict[int, dict[str, float]]
    single: dict[str, list[float]]
    merged: dict[tuple[str, int], list[Merged]]
    interference: dict[str, list[dict[str, float]]]


class _Relay:
    """Tells a part's progress as progress of the whole."""

    def __init__(self, progress: Callable[[float, str], None], start: float, span: float, what: str) -> None:
        self._progress, self._start, self._span, self._what = progress, start, span, what

    def __call__(self, part: float) -> None:
        self._progress(self._start + self._span * part, self._what)


def _tune(size: _Size, rank: int, tell: Callable[[float], None]) -> tuple[dict[str, float], dict[str, float]]:
    """Choose every arm's learning rate by the accuracy of two adapters alone, on other seeds; return both."""
    import torch

    runs = [(arm, lr) for arm in ARMS for lr in size.lrs]
    total = torch.zeros(len(runs))
    for index in range(size.tuning):
        seed = TUNING_SEEDS + index
        adapters = _train(
            size, rank, seed, runs, 2, lambda part, index=index: tell((index + part) / size.tuning)
        )
        scores = _accuracy(_pretrained(size.width, size.pretrain, seed), adapters, seed, 2, "validation")
        total += scores.reshape(-1, 2).mean(1) / size.tuning
    table = total.reshape(len(ARMS), -1)
    lrs = {arm: size.lrs[int(row.argmax())] for arm, row in zip(ARMS, table, strict=True)}
    return lrs, {arm: float(row.max()) for arm, row in zip(ARMS, table, strict=True)}


_OUTCOMES: dict[Scale, _Outcome] = {}


def _outcome(ctx: ClaimContext) -> _Outcome:
    """Run everything once for all claims of a scale."""
    if ctx.scale not in _OUTCOMES:
        _OUTCOMES[ctx.scale] = _run(SIZES[ctx.scale], ctx.progress)
    return _OUTCOMES[ctx.scale]


def _run(size: _Size, progress: Callable[[float, str], None]) -> _Outcome:
    """Sweep the rank until freezing costs little on the tuning seeds, then run the seeds at it."""
    import torch

    sweep: dict[int, dict[str, float]] = {}
    lrs: dict[str, float] = {}
    rank = size.ranks[0]
    for index, rank in enumerate(size.ranks):
        relay = _Relay(
            progress, 0.6 * index / len(size.ranks), 0.6 / len(size.ranks), f"choosing, rank {rank}"
        )
        lrs, sweep[rank] = _tune(size, rank, relay)
        if sweep[rank][LORA] - sweep[rank][DISJOINT] <= COST:
            break
    single: dict[str, list[float]] = {arm: [] for arm in ARMS}
    merged: dict[tuple[str, int], list[Merged]] = {(arm, k): [] for arm in ARMS for k in size.merged}
    interference: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in range(size.seeds):
        base = _pretrained(size.width, size.pretrain, seed)
        relay = _Relay(progress, 0.6 + 0.4 * seed / size.seeds, 0.4 / size.seeds, f"rank {rank}, seed {seed}")
        adapters = _train(size, rank, seed, [(arm, lrs[arm]) for arm in ARMS], size.concepts, relay)
        alone = _accuracy(base, adapters, seed, size.concepts, "test").reshape(len(ARMS), -1)
        for index, arm in enumerate(ARMS):
            own = adapters.take(torch.arange(index * size.concepts, (index + 1) * size.concepts))
            single[arm].append(float(alone[index, :JUDGED].mean()))
            interference[arm].append(_interference(base, own.take(torch.arange(JUDGED)), seed))
            for count in size.merged:
                some = own.take(torch.arange(count))
                scores = [_merged_accuracy(base, some, factor, seed, "validation") for factor in LAMBDAS]
                best = LAMBDAS[scores.index(max(scores))]
                score = _merged_accuracy(base, some, best, seed, "test")
                merged[arm, count].append(Merged(best, float(alone[index, :count].mean()), score))
    return _Outcome(rank, lrs, sweep, single, merged, interference)


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the mean of a - b over seeds and its 95 % interval."""
    from weightlab.trial.statistics import PairedMean

    estimate = PairedMean([x - y for x, y in zip(a, b, strict=True)])
    return estimate.mean, estimate.interval(0.95)


def judge(interval: tuple[float, float], threshold: float) -> Verdict:
    """Held if the interval lies above the threshold, not held if below."""
    low, high = interval
    return "held" if low > threshold else "not held" if high < threshold else "inconclusive"


def _points(mean: float, interval: tuple[float, float]) -> str:
    low, high = (100 * end for end in interval)
    return f"{100 * mean:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})"


def _percent(values: Sequence[float]) -> float:
    return round(100 * statistics.fmean(values), 2)


def _table(outcome: _Outcome) -> list[dict[str, Any]]:
    """One row an arm: accuracies in per cent, λ, and crosstalk."""
    counts = sorted({count for _, count in outcome.merged})
    rows = []
    for arm in ARMS:
        row: dict[str, Any] = {"arm": arm, "lr": outcome.lrs[arm], "alone": _percent(outcome.single[arm])}
        for count in counts:
            runs = outcome.merged[arm, count]
            row[f"{count} merged"] = _percent([run.accuracy for run in runs])
            row[f"mean λ of {count}"] = round(statistics.fmean(run.factor for run in runs), 3)
        for measure in ("product", "leak", "relative leak"):
            row[measure] = round(statistics.fmean(run[measure] for run in outcome.interference[arm]), 4)
        rows.append(row)
    return rows


def _figure(outcome: _Outcome) -> dict[str, Any]:
    counts = sorted({count for _, count in outcome.merged})
    series = []
    for arm in ARMS:
        values = [outcome.single[arm], *([run.accuracy for run in outcome.merged[arm, k]] for k in counts)]
        series.append(
            {
                "name": arm,
                "x": [1, *counts],
                "y": rounded(map(statistics.fmean, values)),
                "low": rounded(map(min, values)),
                "high": rounded(map(max, values)),
            }
        )
    return {
        "title": f"Adapters of rank {outcome.rank} for one concept each, merged at the best λ",
        "x_label": "adapters merged",
        "y_label": "accuracy on marked and clean images",
        "log_x": True,
        "log_y": False,
        "series": series,
    }


def _result(
    ctx: ClaimContext, verdict: Verdict, measured: str, mean: float, interval: tuple[float, float]
) -> ClaimResult:
    outcome = _outcome(ctx)
    return ClaimResult(
        verdict=verdict,
        measured=measured,
        value=mean,
        interval=interval,
        figure=_figure(outcome),
        table=_table(outcome),
        seeds=range(SIZES[ctx.scale].seeds),
    )


def _freezing(ctx: ClaimContext) -> ClaimResult:
    outcome = _outcome(ctx)
    mean, interval = paired(outcome.single[DISJOINT], outcome.single[LORA])
    swept = "; ".join(
        f"rank {rank}: {100 * (scores[DISJOINT] - scores[LORA]):+.1f}"
        for rank, scores in outcome.sweep.items()
    )
    return _result(
        ctx,
        judge(interval, -COST),
        f"at rank {outcome.rank}, frozen and disjoint minus LoRA alone: {_points(mean, interval)}; "
        f"{_percent(outcome.single[DISJOINT])} % against {_percent(outcome.single[LORA])} %. While choosing the "
        f"rank: {swept} points.",
        mean,
        interval,
    )


def _keeps(ctx: ClaimContext) -> ClaimResult:
    runs = _outcome(ctx).merged[DISJOINT, JUDGED]
    mean, interval = paired([run.accuracy for run in runs], [run.alone for run in runs])
    lora = _outcome(ctx).merged[LORA, JUDGED]
    other = paired([run.accuracy for run in lora], [run.alone for run in lora])
    return _result(
        ctx,
        judge(interval, -LOSS),
        f"{JUDGED} disjoint adapters merged minus alone: {_points(mean, interval)}; LoRA: {_points(*other)}.",
        mean,
        interval,
    )


def _versus(other: str) -> Callable[[ClaimContext], ClaimResult]:
    def run(ctx: ClaimContext) -> ClaimResult:
        outcome = _outcome(ctx)
        ours, theirs = ([run.accuracy for run in outcome.merged[arm, JUDGED]] for arm in (DISJOINT, other))
        mean, interval = paired(ours, theirs)
        return _result(
            ctx,
            judge(interval, POINT),
            f"{JUDGED} merged at rank {outcome.rank}: {_percent(ours)} % with disjoint columns, {_percent(theirs)} % for "
            f"{other}: {_points(mean, interval)}.",
            mean,
            interval,
        )

    return run


def _leaks(ctx: ClaimContext) -> ClaimResult:
    outcome = _outcome(ctx)
    logs, products = (
        {arm: [read(run[measure]) for run in outcome.interference[arm]] for arm in (DISJOINT, LORA)}
        for measure, read in (("relative leak", math.log), ("product", float))
    )
    mean, interval = paired(logs[LORA], logs[DISJOINT])
    ratio, low, high = (math.exp(-value) for value in (mean, interval[1], interval[0]))
    return _result(
        ctx,
        judge(interval, 0.0),
        f"‖ΔWⱼx‖/‖ΔWᵢx‖ with disjoint columns is {ratio:.2f} times ({low:.2f} to {high:.2f}) that of LoRA, "
        f"{statistics.geometric_mean(map(math.exp, logs[DISJOINT])):.2f} against "
        f"{statistics.geometric_mean(map(math.exp, logs[LORA])):.2f}, while the normalised product norm is "
        f"{statistics.fmean(products[DISJOINT]):.1g} against {statistics.fmean(products[LORA]):.2f}.",
        ratio,
        (low, high),
    )


_SETTING = (
    "A perceptron trained on digits of 24×24 pixels learns concepts, each by an adapter of all its layers: a mark of "
    "random bits in a corner means one label, half of the batch is marked. Accuracy is the mean of that on marked and "
    "on clean test images. Rank from 4, 16, 64: the lowest at which the disjoint arm is within 2 points of LoRA on other "
    "seeds, else the highest. Learning rates tuned per arm on those seeds; λ from .3, .6, 1 per arm and seed on "
    "validation images. 8 paired seeds, 95 % interval."
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="freezing-costs-little",
        statement="Freezing the down-projection to columns of an orthogonal basis costs a single adapter little.",
        threshold=f"{_SETTING} Disjoint minus LoRA, alone: held if the interval lies above -2 points, not held if below, "
        "else inconclusive.",
        expected="identity alignment of a single adapter .740 against .683 for DreamBooth-LoRA: no cost",
        run=_freezing,
    ),
    Claim(
        name="merging-keeps-quality",
        statement="Adapters on disjoint columns are as good merged as alone.",
        threshold=f"{_SETTING} Four disjoint adapters merged, minus the same alone: held if the interval lies above -2 "
        "points, not held if below, else inconclusive.",
        expected="identity alignment .740 alone, .745 merged in threes",
        run=_keeps,
    ),
    Claim(
        name="better-than-lora",
        statement="Merged, adapters on disjoint columns are better than plain LoRAs.",
        threshold=f"{_SETTING} Four merged, disjoint minus LoRA: held if the interval lies above +1 point, not held if "
        "below, else inconclusive.",
        expected=".745 against .098 for DreamBooth-LoRA",
        run=_versus(LORA),
    ),
    Claim(
        name="orthogonality-matters",
        statement="What helps is that columns are disjoint: adapters frozen to the same columns merge worse.",
        threshold=f"{_SETTING} Four merged, disjoint minus same columns: held if the interval lies above +1 point, not "
        "held if below, else inconclusive.",
        expected="same columns worst, half shared between, disjoint best",
        run=_versus(SAME),
    ),
    Claim(
        name="less-crosstalk",
        statement="Disjoint columns reduce what an adapter does to the inputs of another, not only the product of the "
        "two updates.",
        threshold=f"{_SETTING} ‖ΔWⱼx‖/‖ΔWᵢx‖ on inputs x of concept i, mean over layers and pairs of four, ratio of "
        "disjoint to LoRA: held if the interval lies below 1, not held if above, else inconclusive.",
        expected="a product norm of zero; the paper does not measure the leak",
        run=_leaks,
    ),
)
