"""Pairs of encoders of the digits, and maps between their spaces, many seeds at a time."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from weightlab.linalg import orthogonality_deviation
from weightlab.merge import LossWeights
from weightlab.merge.embedding_maps import bias_for, pair_moments, within_tolerance
from weightlab.merge.trained_maps import Maps, apply, train
from weightlab.nn import OrthogonalityPenalty
from weightlab.tasks.digits_mlp import digits

DIMENSIONS = 32


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread inside the block: these matrices are too small to share, and numbers stay the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Part:
    """Images of one part: pixels `(n, 64)` in [0, 1], labels `(n,)`."""

    pixels: Tensor
    labels: Tensor


def parts() -> dict[str, Part]:
    """The 1,797 digits by what they are for: of each class, half for maps and galleries, a tenth for tuning, the rest for tests."""
    pixels, labels = (torch.cat([pair[i] for pair in digits().values()]) for i in (0, 1))
    place = torch.zeros_like(labels)
    for label in range(10):
        chosen = labels == label
        place[chosen] = torch.arange(int(chosen.sum())) % 10
    masks = {"gallery": place < 5, "tuning": place == 5, "test": place > 5}
    x = pixels.flatten(1).float() / 16
    return {name: Part(x[mask], labels[mask]) for name, mask in masks.items()}


def encoders(
    part: Part, classes: int, hidden: Sequence[int], seeds: Sequence[int], *, steps: int, weight_decay: float
) -> Callable[[Tensor], Tensor]:
    """Train a perceptron for each seed to tell the first classes apart; return what gives its embeddings, of length 1.

    AdamW, learning rate 3e-3 decaying to 0 along a cosine, batches of 128. An embedding is what the output layer reads.

    Args:
        part: To train on; images of further classes are left out.
        classes: How many.
        hidden: Widths of the hidden layers, ReLU between.
        seeds: Of weights and batches.
        steps: Training steps.
        weight_decay: Of AdamW.

    Returns:
        A function from `(n, 64)` to `(seeds, n, DIMENSIONS)`.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sizes = [64, *hidden, DIMENSIONS, classes]
    layers: list[tuple[Tensor, Tensor]] = []
    for inner, outer in itertools.pairwise(sizes):
        bound = inner**-0.5
        weight, bias = (
            torch.stack([torch.empty(shape).uniform_(-bound, bound, generator=g) for g in generators])
            for shape in ((inner, outer), (1, outer))
        )
        layers.append((weight.requires_grad_(), bias.requires_grad_()))
    optimizer = torch.optim.AdamW([p for layer in layers for p in layer], lr=3e-3, weight_decay=weight_decay)
    kept = part.labels < classes
    x, y = part.pixels[kept], part.labels[kept]

    def embed(batch: Tensor) -> Tensor:
        for depth, (weight, bias) in enumerate(layers[:-1]):
            batch = torch.baddbmm(bias, F.relu(batch) if depth else batch, weight)
        return batch

    for step in range(steps):
        rows = torch.stack([torch.randint(len(x), (128,), generator=g) for g in generators])
        logits = torch.baddbmm(layers[-1][1], F.relu(embed(x[rows])), layers[-1][0])
        # A sum over seeds leaves each its own gradient.
        loss = F.cross_entropy(logits.flatten(0, 1), y[rows].flatten(), reduction="sum") / 128
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 + math.cos(math.pi * (step + 1) / steps)) / 2

    @torch.no_grad()
    def embeddings(pixels: Tensor) -> Tensor:
        return F.normalize(embed(pixels.expand(len(seeds), -1, -1)), dim=-1)

    return embeddings


@dataclass(frozen=True)
class Target:
    """An old encoder to be compatible with.

    Attributes:
        classes: It was trained on the first so many.
        weight_decay: Of its training.
    """

    classes: int
    weight_decay: float


@dataclass(frozen=True)
class Pairs:
    """Embeddings by old and new encoders, `(seeds, n, DIMENSIONS)`, of the images of each part."""

    old: dict[str, Tensor]
    new: dict[str, Tensor]
    labels: dict[str, Tensor]


def pairs(target: Target, seeds: Sequence[int], steps: int) -> Pairs:
    """Train an old and a new encoder for each seed, and embed all images by both."""
    data = parts()
    old = encoders(
        data["gallery"], target.classes, (64,), seeds, steps=steps, weight_decay=target.weight_decay
    )
    return Pairs(
        {name: old(part.pixels) for name, part in data.items()},
        _new_embeddings(tuple(seeds), steps),
        {name: part.labels for name, part in data.items()},
    )


@functools.cache
def _new_embeddings(seeds: tuple[int, ...], steps: int) -> dict[str, Tensor]:
    """All images by new encoders, which are the same whatever the old ones know."""
    data = parts()
    new = encoders(
        data["gallery"], 10, (128,), [seed + 10_000 for seed in seeds], steps=steps, weight_decay=0.01
    )
    return {name: new(part.pixels) for name, part in data.items()}


def repeated(data: Pairs, times: int) -> Pairs:
    """The same pairs several times over, one block after the other."""
    old, new = ({name: x.repeat(times, 1, 1) for name, x in each.items()} for each in (data.old, data.new))
    return Pairs(old, new, data.labels)


@dataclass(frozen=True)
class Arm:
    """A kind of map.

    Attributes:
        tol: λ that W is kept within; infinity for a free map.
        bias: Whether there is a bias.
        penalty: λ of the paper's gated penalty, weight 1, in place of `tol`.
    """

    tol: float = math.inf
    bias: bool = False
    penalty: float | None = None


def fit(arm: Arm, data: Pairs, *, lr: float | Tensor, steps: int, generator: torch.Generator) -> Maps:
    """Train one map for each seed: mean squared error and contrastive loss of weight 1, batches of 128.

    All start at the Procrustes rotation.
    """
    z, h, labels = data.new["gallery"], data.old["gallery"], data.labels["gallery"]
    moments = pair_moments(z, h, center=arm.bias)
    W = within_tolerance(moments, 0.0)
    start = Maps(W.float(), bias_for(moments, W).float() if arm.bias else None)
    return train(
        z,
        h,
        start,
        labels=labels.expand(z.shape[:-1]),
        weights=LossWeights(contrastive=1.0, penalty=1.0),
        penalty=None if arm.penalty is None else OrthogonalityPenalty(arm.penalty, "sigmoid"),
        tol=arm.tol,
        steps=steps,
        lr=lr,
        batch_size=128,
        generator=generator,
    )


def measure(maps: Maps | None, data: Pairs, part: str, known: int) -> dict[str, list[float]]:
    """Search the gallery by the images of a part, for each seed.

    Args:
        maps: Of new embeddings; None leaves them as they are.
        data: Embeddings.
        part: Whose images are the queries.
        known: How many classes the old encoder knows.

    Returns:
        Top-1 shares: `old` (old queries in the old gallery), `cross` (mapped in old), `self` (mapped in mapped), and
        `unseen`, as `self` with queries of classes that the old encoder does not know; `deviation`, D; and `gram`, by
        how much of its norm the matrix of the queries' cosines changes.
    """
    query, gallery = data.new[part], data.new["gallery"]
    mapped, mapped_gallery = query, gallery
    deviation = torch.zeros(len(query))
    if maps is not None:
        mapped, mapped_gallery = apply(query, maps.W, maps.b), apply(gallery, maps.W, maps.b)
        deviation = orthogonality_deviation(maps.W)
    y, gallery_y = data.labels[part], data.labels["gallery"]

    def hits(queries: Tensor, items: Tensor) -> Tensor:
        """Whether the most similar item is of the query's class, (seeds, n)."""
        nearest = (queries @ F.normalize(items, dim=-1).mT).argmax(-1)
        return (gallery_y[nearest] == y).double()

    def cosines(x: Tensor) -> Tensor:
        x = F.normalize(x.double(), dim=-1)
        return x @ x.mT

    own = hits(mapped, mapped_gallery)
    before = cosines(query)
    change = torch.linalg.matrix_norm(cosines(mapped) - before) / torch.linalg.matrix_norm(before)
    found = {
        "old": hits(data.old[part], data.old["gallery"]).mean(1),
        "cross": hits(mapped, data.old["gallery"]).mean(1),
        "self": own.mean(1),
        "unseen": own[:, y >= known].mean(1),
        "deviation": deviation,
        "gram": change,
    }
    return {name: values.tolist() for name, values in found.items()}


def arrived(gate: str, weight: float, seeds: int, steps: int) -> list[float]:
    """Train W towards a target that is not orthogonal under a penalty with λ = 0.5; return D/λ for each seed.

    A regression of 16 dimensions on 16 from 256 examples, Adam of learning rate 1e-2 decaying to 0 along a cosine, from
    a random rotation.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    z, target, start = (
        torch.stack([torch.randn(shape, generator=g) for g in generators])
        for shape in ((256, 16), (16, 16), (16, 16))
    )
    maps = train(
        z,
        z @ target.mT / 2,
        Maps(torch.linalg.qr(start).Q),
        weights=LossWeights(penalty=weight),
        penalty=OrthogonalityPenalty(0.5, gate),  # pyright: ignore[reportArgumentType]
        steps=steps,
        lr=1e-2,
    )
    return (orthogonality_deviation(maps.W) / 0.5).tolist()
