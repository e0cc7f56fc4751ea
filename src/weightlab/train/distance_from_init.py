"""How far weights have moved from where they started, and by which law."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

LawName = Literal["log", "sqrt", "linear", "power"]


@dataclass(frozen=True)
class Law:
    r"""A two-parameter law fitted to distances d(t) by least squares.

    Attributes:
        name: `"log"`: :math:`a + b \log t`; `"sqrt"`: :math:`a + b \sqrt t`; `"linear"`: :math:`a + b t`; `"power"`:
            :math:`a\,t^b`.
        a: First parameter.
        b: Second parameter.
        r2: Share of the variance of d explained. 1 for a perfect fit, also of constant distances.
        aic: Akaike's criterion, :math:`n \log(\text{SSE}/n) + 4`, smaller is better. All laws have two parameters, so
            that the order is the same as by `r2`.
    """

    name: LawName
    a: float
    b: float
    r2: float
    aic: float

    def __call__(self, t: float) -> float:
        """Return the distance that the law gives for t > 0."""
        if self.name == "power":
            return self.a * t**self.b
        return self.a + self.b * {"log": math.log, "sqrt": math.sqrt, "linear": float}[self.name](t)


def fit_laws(steps: Sequence[float], distances: Sequence[float]) -> dict[LawName, Law]:
    """Fit four laws of growth to distances, each by least squares on the distances themselves.

    Args:
        steps: t > 0, at least three different ones.
        distances: d(t), as many, finite.

    Returns:
        Law by name, the best (largest R²) first.

    Raises:
        ValueError: If there are too few points, or they cannot be fitted.

    Complexity:
        Linear in the number of points.

    Example:
        >>> laws = fit_laws([1, 10, 100, 1000], [2.0, 3.0, 4.0, 5.0])
        >>> best = next(iter(laws.values()))
        >>> best.name, round(best.a, 3), round(best.b * math.log(10), 3)
        ('log', 2.0, 1.0)
    """
    import numpy as np
    from scipy.optimize import minimize_scalar

    t, d = np.asarray(steps, dtype=np.float64), np.asarray(distances, dtype=np.float64)
    if t.ndim != 1 or t.shape != d.shape:
        raise ValueError(f"steps and distances must be lists of one length, got {t.shape} and {d.shape}")
    if len(np.unique(t)) < 3:
        raise ValueError(f"a fit needs at least 3 different steps, got {sorted(set(t.tolist()))}")
    if not (np.isfinite(t).all() and np.isfinite(d).all() and t.min() > 0):
        raise ValueError("steps must be above 0, and both steps and distances finite")

    parameters: dict[LawName, tuple[float, float]] = {}
    errors: dict[LawName, float] = {}
    growths: dict[LawName, Any] = {"log": np.log(t), "sqrt": np.sqrt(t), "linear": t}
    for name, growth in growths.items():
        design = np.stack([np.ones_like(t), growth / np.abs(growth).max()], axis=1)
        (a, b), *_ = np.linalg.lstsq(design, d, rcond=None)
        errors[name] = float(((design @ (a, b) - d) ** 2).sum())
        parameters[name] = float(a), float(b / np.abs(growth).max())

    relative = t / t.max()

    def best_factor(exponent: float) -> tuple[float, float]:
        shape = relative**exponent
        factor = float(shape @ d / (shape @ shape))
        return factor, float(((factor * shape - d) ** 2).sum())

    found: Any = minimize_scalar(
        lambda b: best_factor(b)[1], bounds=(-4, 4), method="bounded", options={"xatol": 1e-9}
    )
    exponent = float(found.x)
    factor, errors["power"] = best_factor(exponent)
    parameters["power"] = factor * float(t.max()) ** -exponent, exponent

    n, total = len(t), float(((d - d.mean()) ** 2).sum())
    laws: dict[LawName, Law] = {}
    for name in sorted(errors, key=lambda name: errors[name]):
        error = errors[name]
        r2 = 1 - error / total if total > 0 else 1.0
        laws[name] = Law(name, *parameters[name], r2, n * math.log(error / n) + 4 if error > 0 else -math.inf)
    return laws


class DistanceFromInit:
    r"""Record the distance :math:`d(t) = \lVert w_t - w_0 \rVert` of all trainable weights from where they are now.

    In the phase of a constant, high learning rate it is predicted to grow with :math:`\log t`, as that of a random walk in a random
    potential, and with :math:`\sqrt t` in a flat one. Call the tracker once after each step; it measures at steps spread evenly
    in :math:`\log t` only, so that the cost vanishes. It can be a trial's callback as it is.

    Beware when reading a fit: weight decay pulls weights back, and in front of batch normalization their norm only grows; both
    bend the curve whatever the loss looks like.

    Args:
        model: Its parameters that require gradients are followed; a copy of them is kept.
        points_per_decade: Measurements for each factor of ten in t. Default 20.

    Attributes:
        step: Steps counted so far.
        steps: Steps that were measured.
        distances: The distance at each of `steps`.

    Raises:
        ValueError: If no parameter requires gradients, or `points_per_decade` is not positive.

    Complexity:
        One pass over the weights a measurement. Memory: one copy of the weights.

    References:
        Train longer, generalize better: closing the generalization gap in large batch training of neural networks,
        arXiv 1705.08741.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> tracker = DistanceFromInit(model)
        >>> with torch.no_grad():
        ...     _ = model.bias.add_(3.0)
        >>> tracker()
        >>> tracker.steps, tracker.distances
        ([1], [3.0])
    """

    def __init__(self, model: nn.Module, points_per_decade: int = 20) -> None:
        if not points_per_decade > 0:
            raise ValueError(f"points_per_decade must be above 0, got {points_per_decade}")
        self._weights = [p for p in model.parameters() if p.requires_grad]
        if not self._weights:
            raise ValueError("model has no parameter that requires gradients, so no distance to follow")
        self._start = [p.detach().clone() for p in self._weights]
        self.points_per_decade = points_per_decade
        self.step = 0
        self.steps: list[int] = []
        self.distances: list[float] = []

    @torch.no_grad()
    def distance(self) -> Tensor:
        """Return the present distance, a 0-dim tensor on the first parameter's device."""
        norms = [
            torch.linalg.vector_norm(p - start, dtype=_wide(p))
            for p, start in zip(self._weights, self._start, strict=True)
        ]
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))

    def __call__(self, **_: object) -> None:
        """Count one step, and measure if it is due. Arguments of a trial's callbacks are accepted and ignored."""
        self.step += 1
        if self._is_due(self.step):
            self.steps.append(self.step)
            self.distances.append(float(self.distance()))

    def _is_due(self, step: int) -> bool:
        """Whether a new point of the grid 10^(i / points_per_decade) lies in (step − 1, step]."""
        if step == 1:
            return True
        scale = self.points_per_decade
        return math.floor(scale * math.log10(step)) > math.floor(scale * math.log10(step - 1))

    def fit(self, first: int = 10, last: int | None = None) -> dict[LawName, Law]:
        """Fit `fit_laws` to the measurements.

        Args:
            first: First step to use: the very first ones are ballistic. Default 10.
            last: Last step to use, e.g. the one before the learning rate drops. Default None: all.

        Returns:
            Law by name, the best first.

        Raises:
            ValueError: If fewer than three measurements are left.
        """
        points = [
            (t, d)
            for t, d in zip(self.steps, self.distances, strict=True)
            if t >= first and (last is None or t <= last)
        ]
        if len(points) < 3:
            raise ValueError(
                f"{len(points)} measurements between steps {first} and {last or self.step}, at least 3 are needed: "
                "train longer, or raise points_per_decade"
            )
        return fit_laws(*zip(*points, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on later: tensors and plain values only."""
        return {
            "start": [start.clone() for start in self._start],
            "step": self.step,
            "steps": list(self.steps),
            "distances": list(self.distances),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: If it belongs to a model of other shapes.
        """
        here, there = ([tuple(t.shape) for t in tensors] for tensors in (self._start, state["start"]))
        if here != there:
            raise ValueError(f"state is of a model with parameters of shapes {there}, this one has {here}")
        for start, saved in zip(self._start, state["start"], strict=True):
            start.copy_(saved)
        self.step = state["step"]
        self.steps = list(state["steps"])
        self.distances = list(state["distances"])


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
