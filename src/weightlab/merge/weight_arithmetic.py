"""Arithmetic of networks of one architecture, tensor by tensor: averages, arcs, and sums of differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from weightlab.merge.weight_descent import check_same_tensors

# Below this sine of the angle between two tensors, the arc and the chord agree to float32's resolution.
_STRAIGHT = 1e-4


def average(
    models: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Weighted mean of networks.

    Args:
        models: Tensors by name, such as state dicts: the same names and shapes.
        weights: One for each, not negative; divided by their sum. Default None: equal.

    Returns:
        A new dict with the names, dtypes and devices of the first network. Sums are formed in float32, or in the dtype if that is wider, and
        rounded once. Equal tensors give themselves, bit for bit. Integers, such as counts of batches, are the first network's.

    Raises:
        ValueError: If there are no models, names or shapes differ, or weights do not fit, are negative, or are all zero.

    Complexity:
        One pass over each network.

    Reference:
        Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference
        time, arXiv 2203.05482.

    Example:
        >>> average([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], weights=[3, 1])
        {'w': tensor([0.2500, 0.2500])}
    """
    return _each(models, lambda tensors: average_tensors(tensors, weights))


def slerp(a: Mapping[str, Tensor], b: Mapping[str, Tensor], lam: float) -> dict[str, Tensor]:
    r"""Spherical interpolation of two networks, tensor by tensor.

    Each tensor, as one vector, goes along the great circle: with :math:`\omega` the angle of x and y, the result's direction
    is at :math:`\lambda\omega` from x,

    .. math:: \frac{\sin((1-\lambda)\omega)}{\sin\omega} \hat x + \frac{\sin(\lambda\omega)}{\sin\omega} \hat y

    and its norm is :math:`(1-\lambda)\|x\| + \lambda\|y\|`. An average of independent tensors is shorter than both; this
    is not. Other implementations weigh x and y themselves instead of their directions, which is the same where their norms are equal.

    Args:
        a: Tensors by name, such as a state dict.
        b: The same names and shapes.
        lam: Where on the arc: 0 is `a` and 1 is `b`.

    Returns:
        A new dict with the names, dtypes and devices of `a`. Arithmetic is done in float32, or in the dtype if that is wider. Tensors
        that are zero or (anti)parallel to within 1e-4, as all tensors of a single entry are, are interpolated
        linearly; integers are those of `a`.

    Raises:
        ValueError: If names or shapes differ, or `lam` is outside [0, 1].

    Complexity:
        A few passes over both.

    Reference:
        Animating rotation with quaternion curves, Shoemake, SIGGRAPH 1985.

    Example:
        >>> slerp({"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 4.0])}, 0.5)
        {'w': tensor([2.1213, 2.1213])}
    """
    return _each([a, b], lambda pair: slerp_tensors(pair, lam))


def task_arithmetic(
    base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], scales: Sequence[float] | float = 1.0
) -> dict[str, Tensor]:
    r"""Add what several networks learned since a common start: :math:`\theta_0 + \sum_i s_i (\theta_i - \theta_0)`.

    Args:
        base: The network :math:`\theta_0` that the others were trained from.
        models: The networks: the same names and shapes.
        scales: s of each, or one for all; negative ones take away. Default 1. The paper tunes one for all on held-out
            data, often between 0.3 and 0.5.

    Returns:
        A new dict with the names, dtypes and devices of `base`. Sums are formed in float32, or in the dtype if that is wider, and
        rounded once; integers are those of `base`.

    Raises:
        ValueError: If there are no models, names or shapes differ, or scales do not fit or are not finite.

    Complexity:
        One pass over each network.

    Reference:
        Editing models with task arithmetic, arXiv 2212.04089.

    Example:
        >>> base, a, b = ({"w": torch.tensor([x])} for x in (1.0, 3.0, 0.0))
        >>> task_arithmetic(base, [a, b], 0.5)
        {'w': tensor([1.5000])}
    """
    if not models:
        raise ValueError("there are no models to add")
    return _each([base, *models], lambda tensors: add_differences(tensors, scales))


def average_tensors(tensors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """`average` of single tensors."""
    shares = mixing_weights(len(tensors), weights)
    mean, total = wide(tensors[0]), shares[0]
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        total += share
        if share:
            # As a running mean: equal tensors stay equal, and nothing grows.
            mean = torch.lerp(mean, _like(tensor, mean), share / total)
    return _rounded(mean, tensors[0])


def slerp_tensors(pair: Sequence[Tensor], lam: float) -> Tensor:
    """`slerp` of two tensors."""
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
    x = wide(pair[0])
    y = _like(pair[1], x)
    norms = torch.linalg.vector_norm(x), torch.linalg.vector_norm(y)
    tiny = torch.finfo(x.dtype).tiny
    u, v = x / norms[0].clamp_min(tiny), y / norms[1].clamp_min(tiny)
    # Exact for small angles and for those near pi, where the cosine says nothing.
    angle = 2 * torch.atan2(torch.linalg.vector_norm(u - v), torch.linalg.vector_norm(u + v))
    if not (angle.sin() > _STRAIGHT and norms[0] and norms[1]):
        return _rounded(torch.lerp(x, y, lam), pair[0])
    length = torch.lerp(norms[0], norms[1], lam) / angle.sin()
    arc = u.mul_(((1 - lam) * angle).sin() * length).add_(v.mul_((lam * angle).sin() * length))
    return _rounded(arc, pair[0])


def add_differences(tensors: Sequence[Tensor], scales: Sequence[float] | float = 1.0) -> Tensor:
    """`task_arithmetic` of single tensors, the base first."""
    count = len(tensors) - 1
    factors = [float(scales)] * count if isinstance(scales, int | float) else [float(s) for s in scales]
    if len(factors) != count:
        raise ValueError(f"{len(factors)} scales for {count} models; give one, or one for each")
    if not all(map(math.isfinite, factors)):
        raise ValueError(f"scales must be finite, got {factors}")
    base = wide(tensors[0])
    total = base.clone()
    for tensor, factor in zip(tensors[1:], factors, strict=True):
        total.add_(_like(tensor, base) - base, alpha=factor)
    return _rounded(total, tensors[0])


def mixing_weights(count: int, weights: Sequence[float] | None) -> list[float]:
    """Weights of `count` models, which sum to 1.

    Raises:
        ValueError: If their number is another, or they are not finite, negative, or all zero.

    Example:
        >>> mixing_weights(2, [3, 1])
        [0.75, 0.25]
    """
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count:
        raise ValueError(f"{len(given)} weights for {count} models; give one for each")
    if not given or not all(math.isfinite(w) and w >= 0 for w in given) or not sum(given):
        raise ValueError(f"weights must be finite, at least 0 and not all 0, got {given}")
    return [weight / sum(given) for weight in given]


def wide(tensor: Tensor) -> Tensor:
    """A tensor in the dtype that sums are formed in: float32, or its own if that is wider."""
    return tensor.to(torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype)


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor.to(other)


def _rounded(result: Tensor, like: Tensor) -> Tensor:
    # A network in float32 that was widened by nothing may still be the input itself.
    return result.clone() if result is like else result.to(like.dtype)


def _each(
    models: Sequence[Mapping[str, Tensor]], merge: Callable[[Sequence[Tensor]], Tensor]
) -> dict[str, Tensor]:
    if not models:
        raise ValueError("there are no models to merge")
    for other in models[1:]:
        check_same_tensors(models[0], other)
    return {
        name: merge([model[name] for model in models]) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in models[0].items()
    }
