"""Perceptrons on scikit-learn's digits, trained many at once, and what lies between two of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightlab.merge import (
    Permutation,
    PermutationSpec,
    apply_permutation,
    loss_barrier,
    singular_alignment,
)
from weightlab.tasks.digits_mlp import digits

Params = dict[str, Tensor]
HIDDEN = 3
BATCH = 64
POINTS = 11
LARGE = 0.3  # singular values at least this share of their layer's largest are its large ones
SPEC = PermutationSpec(
    {
        f"{2 * layer}.{kind}": (
            f"hidden{layer}" if layer < HIDDEN else None,
            *([f"hidden{layer - 1}" if layer else None] if kind == "weight" else []),
        )
        for layer in range(HIDDEN + 1)
        for kind in ("weight", "bias")
    }
)


def network(params: Params) -> nn.Sequential:
    """A perceptron 64-width-width-width-10 with these weights."""
    sizes = [64, *[len(params["0.bias"])] * HIDDEN, 10]
    layers = [part for pair in itertools.pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    model.load_state_dict(params)
    return model


@cache
def images(*, test: bool) -> tuple[Tensor, Tensor]:
    """Pixels in [-1, 1], float32 (n, 64), and labels: 355 for test, the other 1,442 for training."""
    splits = digits()
    chosen = [splits["test"]] if test else [splits["train"], splits["validation"]]
    pixels, labels = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    return pixels.flatten(1).float() / 8 - 1, labels


@cache
def trained(
    width: int, seeds: Sequence[int], epochs: int, *, lr: float = 1e-3, weight_decay: float = 0.0
) -> list[Params]:
    """State dicts of perceptrons, one a seed, trained with Adam: stacked, so that all take each step together.

    Adam goes by entries, so that none knows of the others. Weights start as `nn.Linear` leaves them.

    Args:
        width: Of the hidden layers.
        seeds: A tuple. Each decides on a network's initial weights and its order of data.
        epochs: Passes over the training images in batches of 64.
        lr: Learning rate.
        weight_decay: Factor of the L2 penalty.
    """
    x, y = images(test=False)
    sizes = [64, *[width] * HIDDEN, 10]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    stacked: Params = {}
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        for kind, shape in (("weight", (fan_out, fan_in)), ("bias", (fan_out,))):
            drawn = torch.stack([torch.rand(shape, generator=generator) for generator in generators])
            stacked[f"{2 * layer}.{kind}"] = ((2 * drawn - 1) * fan_in**-0.5).requires_grad_()
    optimizer = torch.optim.Adam(stacked.values(), lr=lr, weight_decay=weight_decay)
    for _ in range(epochs):
        orders = torch.stack([torch.randperm(len(x), generator=generator) for generator in generators])
        for batch in orders.split(BATCH, dim=1):
            outputs = _forward(stacked, x[batch])
            # The sum over networks of their mean losses.
            loss = F.cross_entropy(outputs.flatten(0, 1), y[batch].flatten(), reduction="sum")
            optimizer.zero_grad()
            (loss / batch.shape[1]).backward()
            optimizer.step()
    return [{name: tensor.detach()[i].clone() for name, tensor in stacked.items()} for i in range(len(seeds))]


def _forward(stacked: Params, x: Tensor) -> Tensor:
    for layer in range(HIDDEN + 1):
        weight, bias = stacked[f"{2 * layer}.weight"], stacked[f"{2 * layer}.bias"]
        x = torch.baddbmm(bias[:, None], x.relu() if layer else x, weight.mT)
    return x


@dataclass(frozen=True)
class Between:
    """What lies between two networks.

    Attributes:
        barrier: Of the loss on test images, by 11 points of the line.
        distance: Euclidean, of all weights.
        large: Alignment of the singular vectors of large singular values.
        all: Alignment of all singular vectors.
        line: Losses on the line.
    """

    barrier: float
    distance: float
    large: float
    all: float
    line: tuple[float, ...]


def between(a: Params, b: Params, perm: Permutation | None = None) -> Between:
    """Measure two networks, the second permuted if `perm` is given."""
    moved = b if perm is None else apply_permutation(SPEC, perm, b)
    hill = loss_barrier(network(a), a, moved, [images(test=True)], POINTS)
    return Between(
        barrier=hill.barrier,
        distance=math.sqrt(sum(float((a[name] - moved[name]).square().sum()) for name in a)),
        large=singular_alignment(a, moved, LARGE)["total"],
        all=singular_alignment(a, moved, 0.0)["total"],
        line=hill.losses,
    )


def accuracy(params: Params) -> float:
    """Share of test images that a network classifies rightly."""
    x, y = images(test=True)
    with torch.no_grad():
        return float((network(params)(x).argmax(1) == y).float().mean())


def part(params: Params, *, large: bool) -> Params:
    """A network of whose layers only the large, or only the small, singular values are left; biases as they are."""
    found = {}
    for name, tensor in params.items():
        found[name] = tensor
        if tensor.ndim > 1:
            u, s, vh = torch.linalg.svd(tensor.double(), full_matrices=False)
            keep = (s >= LARGE * s[0]) == large
            found[name] = ((u[:, keep] * s[keep]) @ vh[keep]).to(tensor.dtype)
    return found


def large_share(params: Params) -> float:
    """Share of large ones among a network's singular values."""
    values = [torch.linalg.svdvals(tensor.double()) for tensor in params.values() if tensor.ndim > 1]
    return sum(int((s >= LARGE * s[0]).sum()) for s in values) / sum(map(len, values))
