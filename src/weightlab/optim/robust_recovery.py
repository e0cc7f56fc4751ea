"""Recovery of a low-rank matrix from measurements some of which are grossly wrong."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class SensingOperator(Protocol):
    """Measurements ``y_i = <A_i, X>`` given by what they do."""

    def forward(self, X: Tensor) -> Tensor:
        """Return ``<A_i, X>``, shape (m,), of a symmetric matrix (d, d)."""
        ...

    def adjoint(self, v: Tensor) -> Tensor:
        """Return ``Σ v_i A_i``, shape (d, d), of a vector (m,). It need not be symmetric."""
        ...


Operator = Tensor | SensingOperator
Step = Literal["geometric", "polyak"]
Normalize = Literal["fro", "spectral"]
Start = Literal["spectral", "random"]

TOLERANCE = 1e-9
"""Share of the first step's length at which the default number of steps ends."""

ESCAPE = 0.25
"""Share of the estimated norm of the solution that counts as having left the origin."""

DETECTION = 1.5
"""Ratio to its level under pure noise from which the start counts as evidence of a signal."""

# Rows read at a time on a CPU; larger than one core's cache, since calls cost as well.
_BLOCK_BYTES = 2**22
# Entries of an operator from which a CPU solves problems one after another: alone, they stay in its cache.
_ALONE = 2**17
_NULL_DRAWS = 8
_QUARTILE = 0.31863936396437514  # the lower one of the absolute value of a standard normal


@dataclass(frozen=True)
class RecoveryResult:
    """What `robust_recover` found. Leading dimensions `*b` are those of `y` before its last.

    Attributes:
        U: Factor, `(*b, d, rank)`. Determined up to a rotation of its columns.
        X: The matrix `U Uᵀ`, `(*b, d, d)`.
        loss_history: Mean absolute residual before every step and after the last, `(max_iter + 1, *b)`.
        escaped: Whether ``‖X‖_F`` reached a quarter of `scale`, `(*b,)`; if not, the steps shrank before the
            signal had grown, and `U` means nothing. A quarter leaves room for outliers, which raise `scale`.
        scale: Lower quartile of ``|y|`` (less the median if an offset is fitted) over that of the measurements
            of a unit matrix: about ``‖X*‖_F``, twice as much if half of y are outliers, `(*b,)`.
        detection: ``‖Q(0)‖₂`` over its mean under random signs, `(*b,)`. About 1 if y is noise without a
            signal, in which case `U` is fitted noise.
        detected: Whether `detection` is at least 1.5, `(*b,)`. Conservative: with half of the measurements
            wrong, a signal that is recovered perfectly can be below it.
        decay: Factor on the step from one to the next.
    """

    U: Tensor
    X: Tensor
    loss_history: Tensor
    escaped: Tensor
    scale: Tensor
    detection: Tensor
    detected: Tensor
    decay: float


def robust_recover(
    operator: Operator,
    y: Tensor,
    dim: int,
    rank: int | None = None,
    *,
    alpha: float = 1e-4,
    lr: float = 0.2,
    decay: float | None = None,
    max_iter: int | None = None,
    step: Step = "geometric",
    normalize: Normalize = "fro",
    init: Start = "spectral",
    center: bool | None = None,
    generator: torch.Generator | None = None,
) -> RecoveryResult:
    r"""Recover a positive semi-definite matrix of low rank from measurements with outliers.

    Minimises the mean absolute residual over a factor U that may have too many columns,

    .. math::
        f(U) = \frac1m \sum_i |y_i - \langle A_i, U U^\top\rangle|, \qquad
        Q(U) = \mathrm{sym}\Big(\frac1m \sum_i \mathrm{sign}(\langle A_i, U U^\top\rangle - y_i)\, A_i\Big)

    by sub-gradient steps from a tiny start: ``U ← U − 2 η_t Q(U) U``. Directions of the signal grow
    exponentially, the others stay near the start, so that the rank need not be known; the sign makes
    the size of outliers irrelevant. From "Global Convergence of Sub-gradient Method for Robust Matrix Recovery:
    Small Initialization, Noisy Measurements, and Over-parameterization" (arXiv 2202.08788).

    With ``step="geometric"``, ``η_t = lr · decay^t / ‖Q‖``, and scaling y scales X and nothing else. Until
    the signal has grown from `alpha` to full size, the steps must not have shrunk: growth in all is
    ``2·lr / ((1 − decay)·√r)`` in logarithms. So `decay` should be derived from `alpha`, as by default:
    ``1 − 0.5·lr / max(1, ln(1/alpha))``, enough for ranks r up to about 8. With ``normalize="spectral"`` growth
    does not depend on r.

    When not to: for errors that are Gaussian, or small, least squares stopped early is as good or
    better; with ``step="geometric"`` this method over-fits them as well.

    Args:
        operator: Dense matrices `(m, d, d)`, symmetric or not; or vectors `(m, d)` for ``A_i = a_i a_iᵀ``; or an
            object with `forward` and `adjoint`, see `SensingOperator`. With batched `y`, also `(b, m, d, d)`
            and `(b, m, d)`: one operator a problem.
        y: Measurements `(m,)`; or `(b, m)` for several problems solved together. float32 or float64,
            as the operator; float32 reaches relative errors of about 1e-6.
        dim: Side d of the matrix.
        rank: Columns r' of the factor, at least the rank of the matrix. Default None: `dim`. The true rank,
            if known, gives the smallest error.
        alpha: Size of the start, relative: ``‖U₀U₀ᵀ‖_F = alpha² · scale``, in (0, 1). Smaller leaves
            smaller errors in superfluous directions, at more steps. Default 1e-4.
        lr: First step in units of the solution, in (0, 1). Default 0.2.
        decay: Factor on the step, in (0, 1). Default None: derived from `alpha` and `lr` as above. Nearer to 1
            is slower, and less accurate where `rank` is too large.
        max_iter: Steps. Default None: until they have shrunk by 1e-9, ``ln 1e-9 / ln decay``; about 1900
            for ``alpha=1e-4``.
        step: ``"polyak"`` takes ``η = lr · (π/2) · mean|residual|`` in units of y and the operator, which
            vanishes with the error: for measurements without any noise or outliers.
        normalize: Norm of Q in the geometric step, Frobenius or spectral.
        init: ``"spectral"``: the leading part of −Q(0). ``"random"``: Gaussian.
        center: Fit a common offset of all measurements along with U: the median is taken off the residuals,
            and half of the signs are positive. Default None: for vectors only. ``<a aᵀ, X>`` has the mean
            ``tr X``, so that without an offset all signs agree near the origin and Q is blind, a multiple of
            the identity; that is an addition of ours. Centred standard normal matrices need no offset.
        generator: For the random start.

    Returns:
        See `RecoveryResult`. All tensors are on the device of `y`.

    Raises:
        TypeError: For an operator that is neither a tensor nor has `forward` and `adjoint`, and for dtypes
            that differ.
        ValueError: For shapes that do not match, matrices that are not square, values that are not finite,
            options out of range.

    Warns:
        UserWarning: If `y` is zero, or constant where an offset is fitted (then U = 0); if −Q(0) has no positive eigenvalue
            (likewise); if a result has not escaped from the origin.

    Complexity:
        A step takes ``2·m·d·(d+1)`` flops for dense operators, whose symmetric parts are copied once
        at half the size; they are read once a step, in blocks of rows that fit the cache, and vectors
        likewise: ``2·m·d·(d + rank)`` flops.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> A = torch.randn(150, 6, 6, dtype=torch.float64, generator=generator)
        >>> truth = torch.zeros(6, 6, dtype=torch.float64)
        >>> truth[0, 0] = 3.0
        >>> y = (A * truth).sum((1, 2))
        >>> y[:30] = 1000.0
        >>> result = robust_recover(A, y, dim=6)
        >>> bool((result.X - truth).norm() / truth.norm() < 1e-2)
        True
    """
    rank = dim if rank is None else rank
    _check_options(dim, rank, alpha, lr, decay, max_iter, step, normalize, init)
    if _better_alone(operator, y):
        problems = [
            robust_recover(
                one,
                values,
                dim,
                rank,
                alpha=alpha,
                lr=lr,
                decay=decay,
                max_iter=max_iter,
                step=step,
                normalize=normalize,
                init=init,
                center=center,
                generator=generator,
            )
            for one, values in zip(operator, y, strict=True)
        ]
        return _stacked(problems)
    with torch.no_grad():
        sensing = _sensing(operator, y, dim, center)
        decay = auto_decay(lr, alpha) if decay is None else decay
        steps = math.ceil(math.log(TOLERANCE) / math.log(decay)) if max_iter is None else max_iter
        correlation, _ = _sign_fit(sensing, y.new_zeros(*y.shape[:-1], dim, 1), y)
        values, vectors = torch.linalg.eigh(-correlation)
        scale, unit = _scales(sensing, y, _spectral_start(values, vectors, dim))
        B = (
            _random_start(values, rank, generator)
            if init == "random"
            else _spectral_start(values, vectors, rank)
        )
        U = alpha * scale.sqrt()[..., None, None] * B
        _warn_if_no_start(values, U)
        started = (U != 0).flatten(-2).any(-1)

        history = y.new_empty(steps + 1, *y.shape[:-1])
        for t in range(steps):
            Q, history[t] = _sign_fit(sensing, U, y)
            if step == "polyak":
                eta = lr * (math.pi / 2) * history[t] / unit
            else:
                norm = Q.norm(dim=(-2, -1)) if normalize == "fro" else torch.linalg.eigvalsh(Q).abs().amax(-1)
                eta = lr * decay**t / norm
            # A vanishing Q (or unit) leaves U where it is.
            eta = torch.nan_to_num(2 * eta, posinf=0.0)
            U = U - eta[..., None, None] * (Q @ U)
        _, history[steps] = _sign_fit(sensing, U, y)

        X = U @ U.mT
        escaped = started & (X.norm(dim=(-2, -1)) >= ESCAPE * scale)
        stuck = int((started & ~escaped).sum())
        if stuck:
            warnings.warn(
                f"{stuck} of {escaped.numel()} results did not escape the origin: steps shrank "
                f"before the signal had grown; raise decay ({decay:.6g}), alpha ({alpha:g}) or max_iter ({steps})",
                stacklevel=2,
            )
        detection = torch.linalg.matrix_norm(correlation, 2) / _null_level(sensing, y)
    return RecoveryResult(U, X, history, escaped, scale, detection, detection >= DETECTION, decay)


def sign_correlation(
    U: Tensor, operator: Operator, y: Tensor, *, center: bool | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return Q(U), the direction that `robust_recover` follows, and the mean absolute residual.

    ``Q = sym(mean_i sign(<A_i, U Uᵀ> − y_i) A_i)`` with ``sign(0) = 0``; a sub-gradient of the loss is ``2 Q U``.
    For standard normal A and ``Δ = U Uᵀ − X*`` it is close to ``φ·Δ/‖Δ‖_F`` with, for noise s,
    ``φ = √(2/π)·E exp(−s²/(2‖Δ‖_F²))``: outliers of share p leave at least ``1 − p`` of it.

    Args:
        U: Factor `(*b, d, rank)`, with leading dimensions as `y` before its last.
        operator: As in `robust_recover`.
        y: Measurements, as there.
        center: As there.

    Returns:
        Q `(*b, d, d)`, symmetric, and the loss `(*b,)`.

    Raises:
        TypeError: As `robust_recover`.
        ValueError: As `robust_recover`, and for a shape of `U` that does not fit `y`.

    Example:
        >>> Q, loss = sign_correlation(torch.zeros(2, 1), torch.eye(2).expand(3, 2, 2), torch.ones(3))
        >>> Q.diag(), loss
        (tensor([-1., -1.]), tensor(1.))
    """
    _check_factor(U, y)
    return _sign_fit(_sensing(operator, y, U.shape[-2], center), U, y)


def auto_decay(lr: float, alpha: float) -> float:
    """Return the decay of the steps that lets a start of relative size `alpha` grow to full size.

    Total growth is ``2·lr/(1 − decay)`` in logarithms for a signal of rank 1, here four times ``ln(1/alpha)``.

    Example:
        >>> round(auto_decay(0.2, 1e-4), 5)
        0.98914
    """
    return 1 - 0.5 * lr / max(1.0, math.log(1 / alpha))


def small_spectral_(
    U: Tensor, operator: Operator, y: Tensor, alpha: float = 1e-4, *, center: bool | None = None
) -> Tensor:
    """Fill a factor with the small spectral start of `robust_recover`, in place.

    Args:
        U: Factor `(d, rank)`, or `(b, d, rank)` with batched `y`.
        operator: As in `robust_recover`.
        y: Measurements, as there.
        alpha: Relative size, in (0, 1). Default 1e-4.
        center: As in `robust_recover`.

    Returns:
        `U`, with ``‖UUᵀ‖_F = alpha²·scale``.

    Raises:
        TypeError: As `robust_recover`.
        ValueError: As `robust_recover`, and for a shape of `U` that does not fit `y`.

    Example:
        >>> A = torch.eye(3).expand(5, 3, 3)
        >>> U = torch.nn.Parameter(torch.empty(3, 2))
        >>> small_spectral_(U, A, torch.ones(5), alpha=0.1).shape
        torch.Size([3, 2])
    """
    _check_factor(U, y)
    dim, rank = U.shape[-2:]
    _check_options(dim, rank, alpha, 0.2, None, None, "geometric", "fro", "spectral")
    with torch.no_grad():
        sensing = _sensing(operator, y, dim, center)
        correlation, _ = _sign_fit(sensing, y.new_zeros(*y.shape[:-1], dim, 1), y)
        values, vectors = torch.linalg.eigh(-correlation)
        scale, _ = _scales(sensing, y, _spectral_start(values, vectors, dim))
        U.copy_(alpha * scale.sqrt()[..., None, None] * _spectral_start(values, vectors, rank))
        _warn_if_no_start(values, U)
    return U


def _better_alone(operator: Operator, y: Tensor) -> TypeGuard[Tensor]:
    return (
        isinstance(operator, Tensor)
        and isinstance(y, Tensor)
        and y.ndim == 2
        and operator.device.type == "cpu"
        and operator.shape[:2] == y.shape
        and operator[0].numel() >= _ALONE
    )


def _stacked(results: Sequence[RecoveryResult]) -> RecoveryResult:
    def join(name: str, dim: int = 0) -> Tensor:
        return torch.stack([getattr(result, name) for result in results], dim)

    return RecoveryResult(
        U=join("U"),
        X=join("X"),
        loss_history=join("loss_history", 1),
        escaped=join("escaped"),
        scale=join("scale"),
        detection=join("detection"),
        detected=join("detected"),
        decay=results[0].decay,
    )


def _spectral_start(values: Tensor, vectors: Tensor, rank: int) -> Tensor:
    """Return B with ``B Bᵀ`` the `rank` leading parts of an eigendecomposition, of unit Frobenius norm."""
    leading = values[..., -rank:].clamp_min(0).flip(-1)
    leading = torch.nan_to_num(leading / leading.norm(dim=-1, keepdim=True))
    return vectors[..., -rank:].flip(-1) * leading.sqrt().unsqueeze(-2)


def _random_start(values: Tensor, rank: int, generator: torch.Generator | None) -> Tensor:
    shape = (*values.shape, rank)
    device = values.device if generator is None else generator.device
    B = torch.randn(shape, dtype=values.dtype, device=device, generator=generator)
    return B.to(values.device) / math.sqrt(values.shape[-1] * rank)


def _scales(sensing: _Sensing, y: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate the solution's norm, and the unit of the Polyak step.

    What a unit matrix measures is told from the positive part of −Q(0), so that
    neither depends on how the operator is scaled. Quartiles withstand more outliers than medians.
    """
    measured = _lower_quartile(_deviations(sensing, y))
    gain = _lower_quartile(_deviations(sensing, torch.cat(list(_measurements(sensing, direction)), -1)))
    return torch.nan_to_num(measured / gain, posinf=0.0), measured * gain / _QUARTILE**2


def _lower_quartile(values: Tensor) -> Tensor:
    """Lower quartile of those values that are not zero, along the last dimension; zero if all are."""
    counts = (values != 0).sum(-1, keepdim=True)
    ordered = values.masked_fill(values == 0, math.inf).sort(-1).values
    return torch.nan_to_num(ordered.gather(-1, counts // 4).squeeze(-1), posinf=0.0)


def _null_level(sensing: _Sensing, y: Tensor) -> Tensor:
    """Mean spectral norm of Q(0) if the signs of y were coin tosses.

    About ``√(2d/m)`` for dense standard normal measurements.
    """
    generator = torch.Generator().manual_seed(0)
    norms = []
    for _ in range(_NULL_DRAWS):
        coins = torch.randint(0, 2, y.shape, generator=generator).to(y) * 2 - 1
        parts = zip(sensing.parts, coins.split(sensing.rows, -1), strict=True)
        total: Any = sum(sensing.adjoint(part, coin) for part, coin in parts)
        Q = sensing.finish(total)
        norms.append(torch.linalg.matrix_norm(Q, 2))
    return torch.stack(norms).mean(0)


def _deviations(sensing: _Sensing, values: Tensor) -> Tensor:
    return (values - values.median(-1, keepdim=True).values if sensing.center else values).abs()


def _measurements(sensing: _Sensing, U: Tensor) -> Iterator[Tensor]:
    """Yield what each block measures of ``U Uᵀ``."""
    point = sensing.point(U)
    for part in sensing.parts:
        yield sensing.forward(part, point)


def _sign_fit(sensing: _Sensing, U: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q(U) and the mean absolute residual, less the offset.

    Without an offset each block of the operator is read once: its residuals are used while it is cached.
    """
    targets = y.split(sensing.rows, -1)
    residuals = (z - target for z, target in zip(_measurements(sensing, U), targets, strict=True))
    if sensing.center:
        whole = torch.cat(list(residuals), -1)
        residuals = (whole - whole.median(-1, keepdim=True).values).split(sensing.rows, -1)
    total: Any = 0.0
    loss: Any = 0.0
    for part, residual in zip(sensing.parts, residuals, strict=True):
        loss = loss + residual.abs().sum(-1)
        total = total + sensing.adjoint(part, residual.sign())
    return sensing.finish(total), loss / y.shape[-1]


class _Sensing(ABC):
    """Measurements in blocks of `rows`; what blocks need of U is prepared once, by `point`."""

    parts: Sequence[Any]
    rows: int
    count: int
    center: bool

    @abstractmethod
    def point(self, U: Tensor) -> Tensor:
        """Prepare U for `forward`."""

    @abstractmethod
    def forward(self, part: Any, point: Tensor) -> Tensor:
        """Return the measurements of one block."""

    @abstractmethod
    def adjoint(self, part: Any, v: Tensor) -> Tensor:
        """Return the block's share of ``Σ v_i A_i`` in the class's own form."""

    @abstractmethod
    def finish(self, total: Tensor) -> Tensor:
        """Turn the sum of shares into a symmetric matrix, divided by the number of measurements."""


class _Dense(_Sensing):
    """Symmetric parts as rows: entries of the upper triangle, those off the diagonal as ``A_ij + A_ji``."""

    def __init__(self, A: Tensor) -> None:
        self.count, d = A.shape[-3], A.shape[-1]
        i, j = torch.triu_indices(d, d, device=A.device)
        self.upper = i * d + j
        self.place = torch.empty(d, d, dtype=torch.long, device=A.device)
        self.place[i, j] = self.place[j, i] = torch.arange(len(i), device=A.device)
        self.halves = torch.where(i == j, 1.0, 0.5).to(A) / self.count
        packed = A.new_empty(*A.shape[:-2], len(i))
        self.rows = _rows(packed)
        for source, target in zip(A.split(self.rows, -3), packed.split(self.rows, -2), strict=True):
            flat = source.flatten(-2)
            target.copy_(flat[..., self.upper]).add_(flat[..., j * d + i]).mul_(
                torch.where(i == j, 0.5, 1.0).to(A)
            )
        self.parts = packed.split(self.rows, -2)

    def point(self, U: Tensor) -> Tensor:
        return (U @ U.mT).flatten(-2)[..., self.upper]

    def forward(self, part: Tensor, point: Tensor) -> Tensor:
        return point @ part.mT if part.ndim == 2 else (part @ point.unsqueeze(-1)).squeeze(-1)

    def adjoint(self, part: Tensor, v: Tensor) -> Tensor:
        return v @ part if part.ndim == 2 else (v.unsqueeze(-2) @ part).squeeze(-2)

    def finish(self, total: Tensor) -> Tensor:
        return (total * self.halves)[..., self.place]


class _RankOne(_Sensing):
    def __init__(self, a: Tensor) -> None:
        self.count = a.shape[-2]
        self.rows = _rows(a)
        self.parts = a.split(self.rows, -2)

    def point(self, U: Tensor) -> Tensor:
        return U

    def forward(self, part: Tensor, point: Tensor) -> Tensor:
        return (part @ point).square().sum(-1)

    def adjoint(self, part: Tensor, v: Tensor) -> Tensor:
        return (part * v.unsqueeze(-1)).mT @ part

    def finish(self, total: Tensor) -> Tensor:
        return total / self.count


class _Custom(_Sensing):
    def __init__(self, operator: SensingOperator, count: int, dim: int) -> None:
        self.count = self.rows = count
        self.dim = dim
        self.parts = (operator,)

    def point(self, U: Tensor) -> Tensor:
        return U @ U.mT

    def forward(self, part: SensingOperator, point: Tensor) -> Tensor:
        measured = part.forward(point)
        if measured.shape != (self.count,):
            raise ValueError(
                f"operator.forward must return one value for each of the {self.count} entries of y, "
                f"got shape {tuple(measured.shape)}"
            )
        return measured

    def adjoint(self, part: SensingOperator, v: Tensor) -> Tensor:
        return part.adjoint(v)

    def finish(self, total: Tensor) -> Tensor:
        if total.shape != (self.dim, self.dim):
            raise ValueError(
                f"operator.adjoint must return a matrix of {self.dim} by {self.dim}, got shape {tuple(total.shape)}"
            )
        return (total + total.mT) / (2 * self.count)


def _rows(rows: Tensor) -> int:
    """Rows in a block that stays in a CPU's cache between forward and adjoint; all of them elsewhere."""
    count = max(1, rows.shape[-2])
    if rows.device.type != "cpu":
        return count
    row_bytes = rows[..., :1, :].numel() * rows.element_size()
    return max(1, min(count, _BLOCK_BYTES // max(1, row_bytes)))


def _sensing(operator: Operator, y: Tensor, dim: int, center: bool | None) -> _Sensing:
    """Check operator and measurements against each other, and arrange the operator in blocks."""
    sensing = _arranged(operator, y, dim)
    sensing.center = isinstance(sensing, _RankOne) if center is None else center
    return sensing


def _arranged(operator: Operator, y: Tensor, dim: int) -> _Sensing:
    if not isinstance(y, Tensor) or y.dtype not in (torch.float32, torch.float64):
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y must be a float32 or float64 tensor, got {kind}")
    if y.ndim not in (1, 2) or y.numel() == 0:
        raise ValueError(f"y must have shape (m,) or (b, m) with m > 0, got {tuple(y.shape)}")
    if not bool(y.isfinite().all()):
        raise ValueError(
            f"y must be finite, got {int((~y.isfinite()).sum())} NaN or infinite values; drop them"
        )
    if not isinstance(operator, Tensor):
        if not isinstance(operator, SensingOperator):
            raise TypeError(
                "operator must be a tensor (m, d, d) or (m, d), or have forward and adjoint; "
                f"got {type(operator).__name__}"
            )
        if y.ndim != 1:
            raise ValueError(
                f"an operator object takes one problem at a time, got y of shape {tuple(y.shape)}"
            )
        return _Custom(operator, len(y), dim)
    if operator.dtype != y.dtype or operator.device != y.device:
        raise TypeError(
            f"operator and y must agree, got {operator.dtype} on {operator.device} and {y.dtype} on {y.device}"
        )
    shape, batch, m = tuple(operator.shape), y.shape[:-1], y.shape[-1]
    forms = {
        "vectors": [(m, dim), (*batch, m, dim)],
        "matrices": [(m, dim, dim), (*batch, m, dim, dim)],
    }
    fits = [name for name, shapes in forms.items() if shape in shapes]
    if len(fits) == 2:
        raise ValueError(f"an operator of shape {shape} can mean vectors or matrices; give (b, m, d, d)")
    if not fits:
        raise ValueError(_mismatch(shape, tuple(y.shape), dim))
    if not bool(operator.isfinite().all()):
        raise ValueError("operator must be finite, got NaN or infinite values")
    return _Dense(operator) if fits == ["matrices"] else _RankOne(operator)


def _mismatch(shape: tuple[int, ...], measurements: tuple[int, ...], dim: int) -> str:
    if len(shape) >= 3 and shape[-2] != shape[-1] and dim in shape[-2:]:
        return (
            f"operator has matrices of {shape[-2]} by {shape[-1]}; only symmetric matrices U Uᵀ are recovered, "
            "so they must be square. A product U Vᵀ is another problem: its dilation is not semi-definite"
        )
    return (
        f"operator must have shape (m, d, d) or (m, d) with m = {measurements[-1]} as y and d = dim = {dim}, "
        f"got {shape}"
    )


def _check_factor(U: Tensor, y: Tensor) -> None:
    if U.ndim < 2 or U.shape[:-2] != y.shape[:-1]:
        dims = ", ".join([*map(str, y.shape[:-1]), "d", "rank"])
        raise ValueError(
            f"U must have shape ({dims}) to fit y of shape {tuple(y.shape)}, got {tuple(U.shape)}"
        )


def _check_options(
    dim: int,
    rank: int,
    alpha: float,
    lr: float,
    decay: float | None,
    max_iter: int | None,
    step: str,
    normalize: str,
    init: str,
) -> None:
    if not 1 <= rank <= dim:
        raise ValueError(f"rank must be between 1 and dim = {dim}, got {rank}")
    for name, value in {"alpha": alpha, "lr": lr, "decay": decay}.items():
        if value is not None and not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, both excluded, got {value}")
    if max_iter is not None and max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    choices = {
        "step": (step, ("geometric", "polyak")),
        "normalize": (normalize, ("fro", "spectral")),
        "init": (init, ("spectral", "random")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")


def _warn_if_no_start(values: Tensor, U: Tensor) -> None:
    """Warn about starts of zero, given the eigenvalues of −Q(0)."""
    if not bool((values != 0).any(-1).all()):
        warnings.warn("y is zero, or constant where an offset is fitted: the result is U = 0", stacklevel=3)
    elif not bool((U != 0).flatten(-2).any(-1).all()):
        warnings.warn(
            "-Q(0) has no positive eigenvalue, so there is no semi-definite signal to start from: the result "
            "is U = 0. Check the sign of y",
            stacklevel=3,
        )
