"""Perceptrons trained at many learning rates at once, and what is read from their layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from weightlab.inspect import layer_report
from weightlab.tasks.base import Split
from weightlab.tasks.digits_mlp import digits

FloatArray = NDArray[np.float64]

WIDTHS = (64, 300, 100, 10)
BATCH = 16


def train(
    rates: Sequence[float], seeds: Sequence[int], epochs: int, progress: Callable[[float], None]
) -> tuple[list[Tensor], list[Tensor], FloatArray]:
    """Train a perceptron on the digits for each seed and rate, by SGD, all at once.

    A seed has the same start (Xavier, normal) and the same order of the data at every rate. The loss is summed over a
    batch.

    Returns:
        Weights of each layer at the start and at the end, (seeds, rates, out, in), and the share of test images that are
        classified wrongly, (seeds, rates).
    """
    x, y = _images("train")
    shape = len(seeds), len(rates)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    params: list[Tensor] = []
    for inner, outer in itertools.pairwise(WIDTHS):
        std = math.sqrt(2 / (inner + outer))
        drawn = torch.stack([std * torch.randn(outer, inner, generator=g) for g in generators])
        params += [drawn.repeat_interleave(shape[1], 0), torch.zeros(math.prod(shape), 1, outer)]
    starts = [weight.clone().unflatten(0, shape) for weight in params[::2]]
    params = [param.requires_grad_() for param in params]
    steps = torch.tensor(rates).repeat(shape[0])[:, None, None]
    for epoch in range(epochs):
        progress(epoch / epochs)
        orders = torch.stack([torch.randperm(len(x), generator=g) for g in generators])
        for batch in orders[:, : len(x) // BATCH * BATCH].split(BATCH, 1):
            outputs = _logits(params, x[batch].repeat_interleave(shape[1], 0))
            labels = y[batch].repeat_interleave(shape[1], 0)
            loss = F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="sum")
            gradients = torch.autograd.grad(loss, params)
            with torch.no_grad():
                for param, gradient in zip(params, gradients, strict=True):
                    param.addcmul_(gradient, steps, value=-1)
    test_x, test_y = _images("validation", "test")
    with torch.no_grad():
        wrong = _logits(params, test_x.expand(len(steps), -1, -1)).argmax(-1) != test_y
    ends = [weight.detach().unflatten(0, shape) for weight in params[::2]]
    return starts, ends, wrong.double().mean(-1).reshape(shape).numpy()


def _images(*splits: Split) -> tuple[Tensor, Tensor]:
    pixels, labels = (torch.cat(parts) for parts in zip(*(digits()[split] for split in splits), strict=True))
    return pixels.flatten(1).float() / 16, labels


def _logits(params: Sequence[Tensor], inputs: Tensor) -> Tensor:
    for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
        inputs = torch.baddbmm(bias, inputs, weight.mT).relu()
    return torch.baddbmm(params[-1], inputs, params[-2].mT)


def measure(start: Tensor, end: Tensor) -> dict[str, FloatArray]:
    """Read a layer of every network: exponents, tails, and simpler things, each (seeds, rates).

    Args:
        start: Weights at the start, (seeds, rates, out, in).
        end: Trained weights, of the same shape.
    """
    shape = end.shape[:2]
    before, after = (
        layer_report({str(i): w for i, w in enumerate(weights.flatten(0, 1))}).rows
        for weights in (start, end)
    )

    def column(rows: Sequence[Any], name: str) -> FloatArray:
        values = [getattr(row, name) for row in rows]
        return np.array([math.nan if v is None else v for v in values], dtype=np.float64).reshape(shape)

    return {
        "alpha": column(after, "alpha"),
        "alpha at the start": column(before, "alpha"),
        "log norm": column(after, "log_norm"),
        "log spectral norm": column(after, "log_spectral_norm"),
        "distance from start": (end - start).double().norm(dim=(-2, -1)).numpy(),
        "tail": column(after, "n_tail"),
        "gap": column(after, "erg_gap"),
    }


def kendall(a: FloatArray, b: FloatArray) -> float:
    """Kendall's rank correlation τ-b; 0 if either does not vary. NaN ties with everything.

    Example:
        >>> kendall(np.array([1.0, 2.0, 3.0]), np.array([1.0, 5.0, 4.0]))
        0.3333333333333333
    """
    i, j = np.triu_indices(len(a), 1)
    orders = [(v[i] > v[j]).astype(int) - (v[i] < v[j]).astype(int) for v in (a, b)]
    pairs = math.prod(int((order**2).sum()) for order in orders)
    return float((orders[0] * orders[1]).sum() / math.sqrt(pairs)) if pairs else 0.0


def gaussian_spectrum(n: int, aspect: int, seed: int) -> FloatArray:
    """Eigenvalues of the Gram matrix of an (aspect·n, n) Gaussian matrix, ascending, without that matrix.

    By its bidiagonal form (Matrix Models for Beta Ensembles, arXiv math-ph/0206043).
    """
    from scipy.linalg import eigvalsh_tridiagonal

    rng = np.random.default_rng(seed)
    diagonal = np.sqrt(rng.chisquare(aspect * n - np.arange(n)))
    below = np.sqrt(rng.chisquare(n - 1 - np.arange(n - 1)))
    tridiagonal = diagonal**2 + np.concatenate([[0.0], below**2])
    return np.maximum(eigvalsh_tridiagonal(tridiagonal, diagonal[:-1] * below), 0.0)


def count_by_products(evals: FloatArray) -> int:
    """The ERG count as WeightWatcher 0.7.7 computes it: by a product of eigenvalues for each number of them.

    Example:
        >>> count_by_products(np.array([0.25, 0.25, 1.0, 4.0]))
        3
    """
    rescaled = evals * len(evals) / evals.sum()
    with np.errstate(over="ignore", under="ignore"):
        for index in range(len(evals) - 1, 0, -1):
            if np.prod(rescaled[index:]) < 1.0:
                return len(evals) - index
    return 0
