"""Polynomials fitted to the singular values that a matrix of some shape is expected to have."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares, linprog
from torch import Tensor

from weightlab.linalg.coefficients import COEFFICIENTS, CoefficientSet, Triple

Objective = Literal["mse", "minimax"]
Array = NDArray[np.float64]


def fit_newton_schulz(
    shape: tuple[int, int] | None = None,
    spectrum: Tensor | None = None,
    steps: int = 5,
    shared: bool = False,
    objective: Objective = "mse",
    *,
    bound: float | None = 1.5,
) -> CoefficientSet:
    r"""Fit the coefficients of `newton_schulz` to the singular values of a shape, or to given ones.

    With :math:`p` the composition of the steps' polynomials :math:`a s + b s^3 + c s^5`, minimises the
    mean or the maximum of :math:`(p(s_i) - 1)^2` over singular values :math:`s_i` of matrices with
    Frobenius norm 1. What a wider class of spectra does under the result is another question, so
    `bound` keeps :math:`p` in check everywhere on [0, 1.02].

    A fit starts from named sets and ends with an objective at most as large as the least of theirs that
    keep the bound. Results are cached.

    Args:
        shape: `(rows, columns)` in either order: fit to a matrix of independent Gaussian entries. Its
            singular values are taken as the quantiles of the Marchenko-Pastur law, not drawn.
        spectrum: Instead of a shape: singular values, shape `(k,)` or `(..., k)` for several spectra,
            each of which is normalised. Zeros stay zero whatever is fitted.
        steps: Number of steps K. Default 5, as the optimizers take.
        shared: Fit one triple for all steps, as ROOT does, instead of one for each.
        objective: `"mse"` for the mean, `"minimax"` for the maximum.
        bound: The largest `|p(s)|` on [0, 1.02], to first order (a penalty): the rest of the range costs
            little and an outlying singular value must not blow up. `None` for no bound. Default 1.5.

    Returns:
        A `CoefficientSet` of one triple (shared) or K; `source` tells the fit and what it reached.

    Raises:
        TypeError: If `spectrum` is not a floating-point tensor.
        ValueError: Unless exactly one of shape and spectrum is given; for sides or steps below 1, a
            negative or non-finite spectrum, one that is all zero, or an unknown objective.

    Complexity:
        O(k·K) an evaluation for k distinct values (at most 2048 a shape); a fraction of a second, some
        seconds at most for `"minimax"` over many steps.

    References:
        ROOT: Robust Orthogonalized Optimizer for Neural Network Training, arXiv 2511.20626.

    Example:
        >>> fitted = fit_newton_schulz((2048, 8192), shared=True)
        >>> s = gaussian_spectrum(2048, 8192)
        >>> bool(spectrum_error(fitted, s) < spectrum_error("muon", s) / 100)
        True
    """
    if (shape is None) == (spectrum is None):
        raise ValueError("fit_newton_schulz needs a shape or a spectrum, and not both")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if objective not in ("mse", "minimax"):
        raise ValueError(f'objective must be "mse" or "minimax", got {objective!r}')
    if bound is not None and not bound > 1:
        raise ValueError(f"bound must be above 1, the value that is fitted to, got {bound}")
    if shape is not None:
        rows, columns = sorted(int(side) for side in shape)
        values = gaussian_spectrum(rows, columns).numpy()
        label = f"a Gaussian {rows}×{columns} matrix"
    else:
        values = _normalised(cast(Tensor, spectrum))
        label = f"{values.size} given singular values"
    return _fit(values.tobytes(), label, steps, shared, objective, bound)


def gaussian_spectrum(rows: int, columns: int, count: int | None = None) -> Tensor:
    """Singular values of a Gaussian matrix of Frobenius norm 1, as quantiles of their limiting law.

    Args:
        rows: Number of rows m.
        columns: Number of columns n.
        count: How many of the `min(m, n)` values, evenly spread over the quantiles. Default: all, but
            2048 at most.

    Returns:
        Shape `(count,)`, float64, ascending. The squares have mean `1/min(m, n)`.

    Raises:
        ValueError: If a side or `count` is below 1.

    Example:
        >>> s = gaussian_spectrum(100, 400)
        >>> print(f"{s.square().sum():.3f} {s[0] * 10:.2f} {s[-1] * 10:.2f}")
        1.000 0.52 1.48
    """
    m, n = sorted((rows, columns))
    if m < 1:
        raise ValueError(f"both sides must be at least 1, got {rows} and {columns}")
    count = min(m, 2048) if count is None else count
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    ratio = m / n
    # λ = 1 + ratio − 2·√ratio·cos θ makes the density smooth in θ, at the ends and for square matrices too.
    theta = (np.arange(8192) + 0.5) * (math.pi / 8192)
    eigenvalues = 1 + ratio - 2 * math.sqrt(ratio) * np.cos(theta)
    cumulative = np.cumsum(np.sin(theta) ** 2 / eigenvalues)
    levels = (np.arange(count) + 0.5) / count
    quantiles = np.interp(levels, (cumulative - cumulative[0] / 2) / cumulative[-1], eigenvalues)
    return torch.from_numpy(np.sqrt(quantiles / (quantiles.mean() * m)))


def spectrum_error(
    coefficients: CoefficientSet | str,
    spectrum: Tensor,
    steps: int | None = None,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """Mean square of `p(s) − 1` over singular values, exactly as the polynomials have it.

    Args:
        coefficients: A set, or the name of one.
        spectrum: Singular values of matrices with Frobenius norm 1.
        steps: Number of steps; `None` for the set's own.
        shape: `(rows, columns)` of the matrix, for sets that depend on it.

    Returns:
        A 0-dim float64 tensor.

    Example:
        >>> spectrum_error("classic", torch.tensor([1.0])).item()
        0.0
    """
    chosen = COEFFICIENTS[coefficients] if isinstance(coefficients, str) else coefficients
    s = spectrum.double() / chosen.safety
    for a, b, c in chosen.schedule(steps, shape):
        s = s * (a + s.square() * (b + s.square() * c))
    return (s - 1).square().mean()


def _normalised(spectrum: Tensor) -> Array:
    if not spectrum.is_floating_point():
        raise TypeError(f"spectrum must be a floating-point tensor, got {spectrum.dtype}")
    values = spectrum.detach().cpu().double()
    if values.ndim < 1 or values.numel() == 0:
        raise ValueError(f"spectrum must hold at least one singular value, got shape {tuple(spectrum.shape)}")
    if not bool(values.isfinite().all()) or bool((values < 0).any()):
        raise ValueError("singular values must be finite and at least 0; spectrum holds others")
    norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    if bool((norm == 0).any()):
        raise ValueError("spectrum is all zero, and zero stays zero under any coefficients")
    return np.sort((values / norm).flatten().numpy())


_GUARD = np.concatenate([np.geomspace(1e-4, 0.05, 64), np.linspace(0.05, 1.02, 192)])
_PENALTY = 4.0


def _condensed(values: Array) -> tuple[Array, Array]:
    """At most some 500 values and their weights; the smallest ones, hardest to map to one, are all kept."""
    if values.size <= 512:
        return values, np.full(values.size, 1 / values.size)
    edges = np.unique(np.concatenate([np.arange(128), np.linspace(128, values.size, 385).astype(np.int64)]))
    counts = np.diff(edges)
    return np.add.reduceat(values, edges[:-1]) / counts, counts / values.size


class _Problem:
    """Values and derivatives of p over the spectrum and over the range that the bound is for."""

    def __init__(self, values: Array, steps: int, shared: bool, bound: float | None) -> None:
        self.values, self.weights = _condensed(values)
        self.steps, self.shared, self.bound = steps, shared, bound

    def chain(self, parameters: Array, s: Array) -> tuple[Array, Array]:
        """Return p(s) and its Jacobian with respect to the parameters."""
        triples = parameters.reshape(-1, 3)
        jacobian = np.zeros((s.size, parameters.size))
        with np.errstate(over="ignore", invalid="ignore"):
            for step in range(self.steps):
                row = 0 if self.shared else step
                a, b, c = triples[row]
                square = s * s
                jacobian *= (a + square * (3 * b + square * 5 * c))[:, None]
                jacobian[:, 3 * row : 3 * row + 3] += (s[:, None]) * np.stack(
                    [np.ones_like(s), square, square * square], axis=1
                )
                s = s * (a + square * (b + square * c))
        # Where p blows up the derivative can overflow before p does.
        return s, np.nan_to_num(jacobian, nan=0.0, posinf=1e100, neginf=-1e100)

    def residuals(self, parameters: Array) -> tuple[Array, Array]:
        """Return p − 1 over the spectrum, and what exceeds the bound, with their Jacobians.

        Scaled such that the sum of squares is the mean square error plus a penalty.
        """
        p, jacobian = self.chain(parameters, self.values)
        scale = np.sqrt(self.weights)
        if self.bound is None:
            return (p - 1) * scale, jacobian * scale[:, None]
        q, guard = self.chain(parameters, _GUARD)
        # The logarithm keeps a step that blows up from drowning the rest of the Jacobian.
        over = np.log(np.maximum(np.abs(q) / self.bound, 1))
        weight = _PENALTY / _GUARD.size**0.5
        return (
            np.concatenate([(p - 1) * scale, over * weight]),
            np.concatenate(
                [jacobian * scale[:, None], guard * (np.where(over > 0, 1 / q, 0) * weight)[:, None]]
            ),
        )

    def objective(self, parameters: Array, objective: Objective) -> float:
        """Return the mean square or the maximum, with the penalty of the bound."""
        with np.errstate(all="ignore"):
            residuals, _ = self.residuals(parameters)
            k = self.values.size
            over = float(np.sum(residuals[k:] ** 2))
            if objective == "mse":
                value = float(np.sum(residuals[:k] ** 2)) + over
            else:
                value = float(np.max(np.abs(residuals[:k]) / np.sqrt(self.weights))) + over**0.5
        return value if math.isfinite(value) else math.inf


def _starts(steps: int, shared: bool) -> list[Array]:
    """Named sets cut, or prolonged by the Taylor polynomial, to the number of steps."""
    names = ("muon", "classic") if shared else ("muon", "quintic", "polar_express", "cans", "classic")
    starts: list[Array] = []
    for name in names:
        chosen = COEFFICIENTS[name]
        own = chosen.triples[:1] if shared else chosen.triples
        if not shared:
            own = own * steps if len(own) == 1 else own[:steps]
            own = own + COEFFICIENTS["classic"].triples * (steps - len(own))
        triples = np.array(own, dtype=np.float64)
        triples[0] /= chosen.safety ** np.array([1.0, 3.0, 5.0])
        starts.append(triples.ravel())
    if shared:
        # Named sets are made for five steps or more; fewer call for a steeper slope.
        starts += [np.array([a, -1.6 * a, 0.75 * a]) for a in (2.5, 4.5, 6.0)]
    return starts


@functools.lru_cache(maxsize=256)
def _fit(
    packed: bytes, label: str, steps: int, shared: bool, objective: Objective, bound: float | None
) -> CoefficientSet:
    problem = _Problem(np.frombuffer(packed, dtype=np.float64), steps, shared, bound)
    candidates = _starts(steps, shared)
    with np.errstate(all="ignore"):
        for start in list(candidates):
            if not math.isfinite(problem.objective(start, "mse")):
                continue
            # Scaled by the parameters themselves: by the Jacobian, one that only the bound sees would be let go
            # far off, and the fit would stall there.
            found = least_squares(
                lambda p: problem.residuals(p)[0],
                start,
                jac=cast("Any", lambda p: problem.residuals(p)[1]),
                x_scale=np.maximum(np.abs(start), 0.1),
                max_nfev=80,
                xtol=1e-12,
                ftol=1e-6,
                gtol=1e-14,
            )
            candidates.append(np.asarray(found.x))
    candidates.sort(key=lambda p: problem.objective(p, objective))
    best = candidates[0]
    if objective == "minimax":
        best = min(
            (_descend_maximum(problem, start) for start in candidates[:2]),
            key=lambda p: problem.objective(p, objective),
        )
    p, _ = problem.chain(best, problem.values)
    triples = tuple(cast("Triple", tuple(float(x) for x in triple)) for triple in best.reshape(-1, 3))
    return CoefficientSet(
        triples=triples,
        steps=steps,
        source=f"fit_newton_schulz: {'one triple' if shared else f'{steps} triples'} by {objective} for {label}; "
        f"mean square {np.mean((p - 1) ** 2):.2e}, maximum {np.max(np.abs(p - 1)):.2e} of p(s) − 1.",
    )


def _descend_maximum(problem: _Problem, start: Array) -> Array:
    """Lower the largest |p − 1| by linear programs within a trust region that grows and shrinks."""
    best, value, radius = start, problem.objective(start, "minimax"), 0.05
    for _ in range(60):
        points = _extremal_points(problem, best)
        p, jacobian = problem.chain(best, points)
        # Variables: the relative change of each parameter, and the maximum. In terms of values at the
        # points, |p − 1 + J·d| ≤ t.
        scaled = jacobian * np.maximum(np.abs(best), 0.1)
        rows = np.concatenate([scaled, -scaled])
        limits = np.concatenate([1 - p, p - 1])
        matrix = np.concatenate([rows, -np.ones((rows.shape[0], 1))], axis=1)
        if problem.bound is not None:
            q, guard = problem.chain(best, _GUARD)
            guard = guard * np.maximum(np.abs(best), 0.1)
            both = np.concatenate([guard, -guard])
            room = np.maximum(np.concatenate([problem.bound - q, problem.bound + q]), 0)
            matrix = np.concatenate([matrix, np.pad(both, ((0, 0), (0, 1)))])
            limits = np.concatenate([limits, room])
        cost = np.zeros(best.size + 1)
        cost[-1] = 1
        solved = linprog(
            cost,
            A_ub=matrix,
            b_ub=limits,
            bounds=[(-radius, radius)] * best.size + [(0, None)],
            method="highs",
        )
        if solved.x is None:
            break
        trial = best + solved.x[:-1] * np.maximum(np.abs(best), 0.1)
        reached = problem.objective(trial, "minimax")
        if reached < value:
            gain = (value - reached) / value
            best, value, radius = trial, reached, radius * 2
            if gain < 1e-7:
                break
        else:
            radius /= 4
            if radius < 1e-9:
                break
    return best


def _extremal_points(problem: _Problem, parameters: Array) -> Array:
    """The values where |p − 1| peaks, the ends, and a sample in between: enough to bind a linear program."""
    values = problem.values
    if values.size <= 192:
        return values
    p, _ = problem.chain(parameters, values)
    error = np.abs(p - 1)
    peaks = np.flatnonzero((error[1:-1] >= error[:-2]) & (error[1:-1] >= error[2:])) + 1
    if peaks.size > 64:
        peaks = peaks[np.argsort(error[peaks])[-64:]]
    sample = np.linspace(0, values.size - 1, 96).astype(np.int64)
    return values[np.unique(np.concatenate([peaks, sample]))]
