"""Global Convergence of Sub-gradient Method for Robust Matrix Recovery (arXiv 2202.08788)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightlab.papers.figure import rounded
from weightlab.papers.schema import Claim, ClaimContext, ClaimResult, Paper, Scale, Verdict

if TYPE_CHECKING:
    from torch import Tensor

PAPER = Paper(
    number=13,
    slug="subgm",
    title=(
        "Global Convergence of Sub-gradient Method for Robust Matrix Recovery: Small "
        "Initialization, Noisy Measurements, and Over-parameterization"
    ),
    authors=("Ma", "Fattahi"),
    author_count=2,
    date="2022-02",
    arxiv="2202.08788",
    venue="JMLR 2023",
    summary=(
        "A positive semi-definite matrix of low rank is to be recovered from linear measurements of which "
        "a fraction is grossly wrong, with the rank unknown. The paper minimises the absolute error over "
        "a factor that may be far too wide, by the plain sub-gradient method from a tiny start with "
        "geometrically decaying, normalised steps. The signal directions grow to full size exponentially "
        "while the superfluous ones stay near their start, so that the final error is a power of the "
        "initial scale, independent of the assumed rank and of the size of the outliers, even where the "
        "global minimum of the loss is not the truth. With few measurements the error shrinks more slowly "
        "with the initial scale than the theory says. Under Gaussian noise the method is no better than "
        "least squares stopped early."
    ),
    room="optim",
    parts=("optim.SubGM", "optim.robust_recover"),
    keywords=(
        "sub-gradient",
        "matrix sensing",
        "matrix recovery",
        "robust",
        "outliers",
        "l1 loss",
        "small initialization",
        "over-parameterization",
        "low rank",
    ),
)

JUDGED_SHARE = 0.2
RECOVERED, LOST = 1e-3, 0.3
FALL = 5.0
AGNOSTIC = 1.5
NEAR_TRUTH = 1e-2
OUTLIERS = 10.0
TUNING_SEEDS = 1000


@dataclass(frozen=True)
class _Size:
    """What a scale costs.

    Attributes:
        dim: Side of the matrix.
        rank: Its true rank.
        seeds: Problems.
        alpha: Small start for recovery.
        alphas: Starts from large to small.
        ranks: Over-estimated ranks.
        steps: Of least squares.
        few: Side, measurements and problems where there are fewer measurements than unknowns.
    """

    dim: int
    rank: int
    seeds: int
    alpha: float
    alphas: tuple[float, ...]
    ranks: tuple[int, ...]
    steps: int
    few: tuple[int, int, int]

    @property
    def measurements(self) -> int:
        return 10 * self.dim * self.rank


SIZES: dict[Scale, _Size] = {
    "smoke": _Size(
        dim=8, rank=2, seeds=3, alpha=1e-4, alphas=(1e-1, 1e-3), ranks=(4, 8), steps=60, few=(16, 60, 2)
    ),
    "cpu": _Size(
        dim=20,
        rank=3,
        seeds=8,
        alpha=1e-6,
        alphas=(1e-1, 1e-3, 1e-5, 1e-7),
        ranks=(5, 10, 20),
        steps=600,
        few=(60, 600, 5),
    ),
    "gpu": _Size(
        dim=96,
        rank=5,
        seeds=5,
        alpha=1e-6,
        alphas=(1e-1, 1e-3, 1e-5, 1e-7),
        ranks=(10, 48, 96),
        steps=600,
        few=(120, 1200, 5),
    ),
}


@dataclass(frozen=True)
class _Problems:
    """A batch of problems, one a seed: operators (S, m, d, d), measurements (S, m), truths (S, d, d)."""

    operators: Tensor
    y: Tensor
    truths: Tensor

    def errors(self, X: Tensor) -> Tensor:
        """Relative Frobenius errors; X may have further dimensions between the first and the last two."""
        truths = self.truths.reshape(len(self.truths), *[1] * (X.ndim - 3), *self.truths.shape[1:])
        return (X - truths).norm(dim=(-2, -1)) / truths.norm(dim=(-2, -1))


def _problems(
    dim: int,
    rank: int,
    count: int,
    seeds: Sequence[int],
    device: str,
    *,
    outliers: float = 0.0,
    size: float = OUTLIERS,
    sigma: float = 0.0,
) -> _Problems:
    """Draw problems whose outliers grow in proportion to `size` and are otherwise the same."""
    import torch

    operators, ys, truths = [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        V = torch.linalg.qr(normal(dim, rank)).Q
        X = V @ V.T
        hit = torch.rand(count, generator=generator, dtype=torch.float64) < outliers
        noise = torch.where(hit, size * normal(count), 0.0) + sigma * normal(count)
        A = normal(count, dim, dim)
        operators.append(A)
        ys.append((A * X).sum((1, 2)) + noise)
        truths.append(X)
    return _Problems(*(torch.stack(parts).to(device) for parts in (operators, ys, truths)))


def _recover(problems: _Problems, rank: int, alpha: float) -> tuple[list[float], bool]:
    """Return the error for each problem, with all defaults, and whether all escaped from the origin."""
    from weightlab.optim import robust_recover

    result = robust_recover(problems.operators, problems.y, problems.truths.shape[-1], rank, alpha=alpha)
    return problems.errors(result.X).tolist(), bool(result.escaped.all())


def _least_squares(
    problems: _Problems, rank: int, settings: Sequence[tuple[float, float]], steps: int
) -> Tensor:
    """Descend on squared residuals over a factor; return X for each setting after each step, as errors.

    Starts are the positive leading part of ``mean y_i A_i``, times a setting's second number. Learning
    rates, the first, are in units of its norm.

    Returns:
        Errors (steps + 1, S, settings); the last X is not kept.
    """
    return _descend(problems, rank, settings, steps)[0]


def _descend(
    problems: _Problems, rank: int, settings: Sequence[tuple[float, float]], steps: int
) -> tuple[Tensor, Tensor]:
    import torch

    A = (problems.operators + problems.operators.mT).flatten(-2) / 2
    count, dim = A.shape[1], problems.truths.shape[-1]
    mean = (problems.y.unsqueeze(1) @ A).reshape(-1, dim, dim) / count
    values, vectors = torch.linalg.eigh(mean)
    start = vectors[..., -rank:] * values[..., -rank:].clamp_min(0).sqrt().unsqueeze(1)
    shape = (1, len(settings), 1, 1)
    lrs, shares = (A.new_tensor(column).reshape(shape) for column in zip(*settings, strict=True))
    U = shares * start.unsqueeze(1)
    rates = lrs / values.abs().amax(-1).reshape(-1, 1, 1, 1)
    X = U @ U.mT
    errors = [problems.errors(X)]
    for _ in range(steps):
        residuals = A @ X.flatten(-2).mT - problems.y.unsqueeze(-1)
        G = (residuals.mT @ A).reshape(X.shape) / count
        U = U - rates * (G @ U)
        X = U @ U.mT
        errors.append(problems.errors(X))
    return torch.stack(errors), X


def _tuned_least_squares(tuning: _Problems, problems: _Problems, rank: int, steps: int) -> list[float]:
    """Choose rate, size of start and stopping time on other problems by their true error; then return errors."""
    settings = [(lr, share) for lr in (0.03, 0.1, 0.3) for share in (1.0, 1e-3)]
    curves = _least_squares(tuning, rank, settings, steps).log().mean(1).nan_to_num(nan=math.inf)
    stop, best = divmod(int(curves.argmin()), len(settings))
    return _least_squares(problems, rank, [settings[best]], stop)[-1, :, 0].tolist()


def _absolute_deviations(problems: _Problems, iterations: int = 60) -> list[float]:
    """Minimise the absolute residuals over all symmetric matrices, by reweighting; no low rank, no sign."""
    import torch

    dim = problems.truths.shape[-1]
    i, j = torch.triu_indices(dim, dim, device=problems.y.device)
    rows = problems.operators + problems.operators.mT
    rows = rows[..., i, j] * torch.where(i == j, 0.5, 1.0).to(rows)
    weights = torch.ones_like(problems.y)
    solution = rows.new_zeros(len(rows), len(i))
    for _ in range(iterations):
        weighted = rows * weights.unsqueeze(-1)
        solution = torch.linalg.solve(weighted.mT @ rows, (weighted.mT @ problems.y.unsqueeze(-1))).squeeze(
            -1
        )
        weights = 1 / ((rows @ solution.unsqueeze(-1)).squeeze(-1) - problems.y).abs().clamp_min(1e-8)
    X = rows.new_zeros(len(rows), dim, dim)
    X[:, i, j] = X[:, j, i] = solution
    return problems.errors(X).tolist()


def _geometric(values: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean with the 95 % t interval of the mean logarithm."""
    from weightlab.trial.statistics import PairedMean

    estimate = PairedMean([math.log(max(value, 1e-300)) for value in values])
    low, high = estimate.interval(0.95)
    return math.exp(estimate.mean), math.exp(low), math.exp(high)


def _row(setting: str, values: Sequence[float], **columns: Any) -> dict[str, Any]:
    mean, low, high = _geometric(values)
    return {"setting": setting, **columns, "relative error": mean, "low": low, "high": high}


def _bars(title: str, x_label: str, series: Mapping[str, Mapping[float, Sequence[float]]]) -> dict[str, Any]:
    lines = []
    for name, points in series.items():
        means, lows, highs = zip(*map(_geometric, points.values()), strict=True)
        bands = {"y": rounded(means), "low": rounded(lows), "high": rounded(highs)}
        lines.append({"name": name, "x": list(points), **bands})
    return {
        "title": title,
        "x_label": x_label,
        "y_label": "relative error",
        "log_x": True,
        "log_y": True,
        "series": lines,
    }


def _robust(ctx: ClaimContext) -> ClaimResult:
    size = SIZES[ctx.scale]
    shape = size.dim, size.rank, size.measurements
    shares = (0.0, 0.1, JUDGED_SHARE, 0.4)
    curves: dict[str, dict[float, list[float]]] = {"SubGM": {}, "least squares, tuned": {}}
    table, escaped, seeds, note = [], True, range(size.seeds), ""
    for index, share in enumerate(shares):
        ctx.progress(index / len(shares), f"{share:.0%} outliers")
        problems = _problems(*shape, seeds, ctx.device, outliers=share)
        tuning = _problems(*shape, range(TUNING_SEEDS, TUNING_SEEDS + size.seeds), ctx.device, outliers=share)
        errors, out = _recover(problems, size.dim, size.alpha)
        escaped &= out
        squares = _tuned_least_squares(tuning, problems, size.dim, size.steps)
        for name, values in zip(curves, (errors, squares), strict=True):
            curves[name][share] = values
            table.append(_row(name, values, outliers=share))
        if share == JUDGED_SHARE and size.measurements > size.dim * (size.dim + 1) / 2:
            free = _absolute_deviations(problems)
            table.append(_row("absolute deviations, any symmetric matrix", free, outliers=share))
            note = (
                f" Absolute deviations over all symmetric matrices, for which {size.measurements} measurements are "
                f"enough here, reach {_geometric(free)[0]:.1e}."
            )
    errors, squares = (points[JUDGED_SHARE] for points in curves.values())
    mean, low, high = _geometric(errors)
    other = _geometric(squares)
    figure = _bars(
        f"Error with the rank over-estimated to {size.dim} (truth {size.rank})", "share of outliers", curves
    )
    return ClaimResult(
        verdict=judge_robust(errors, squares, escaped),
        measured=f"with 20 % outliers, relative error {mean:.1e} ({low:.1e} to {high:.1e}) for SubGM, "
        f"{other[0]:.2f} ({other[1]:.2f} to {other[2]:.2f}) for tuned least squares.{note}",
        value=mean,
        interval=(low, high),
        figure={**figure, "log_x": False},
        table=table,
        seeds=seeds,
    )


def judge_robust(errors: Sequence[float], squares: Sequence[float], escaped: bool) -> Verdict:
    """Judge errors of SubGM and of least squares."""
    _, low, high = _geometric(errors)
    _, squares_low, squares_high = _geometric(squares)
    if escaped and high < RECOVERED and squares_low > LOST:
        return "held"
    return "not held" if not escaped or low > RECOVERED or squares_high < LOST else "inconclusive"


def _small_start(ctx: ClaimContext) -> ClaimResult:
    size = SIZES[ctx.scale]
    seeds = range(size.seeds)
    problems = _problems(size.dim, size.rank, size.measurements, seeds, ctx.device, outliers=0.2)
    curves: dict[str, dict[float, list[float]]] = {}
    for index, rank in enumerate((size.dim, size.rank)):
        points = curves[f"rank {rank}" + (" (true)" if rank == size.rank else "")] = {}
        for number, alpha in enumerate(size.alphas):
            ctx.progress(index / 2 + number / len(size.alphas) / 2, f"rank {rank}, alpha {alpha:g}")
            points[alpha] = _recover(problems, rank, alpha)[0]
    falls = falls_per_hundred(curves[f"rank {size.dim}"])
    mean, low, high = _geometric(falls)
    return ClaimResult(
        verdict="held" if low > FALL else "not held" if high < FALL else "inconclusive",
        measured=f"a start a hundred times smaller divides the error by {mean:.1f} ({low:.1f} to {high:.1f}) "
        f"with rank {size.dim}, by the slope over alpha from {size.alphas[0]:g} to {size.alphas[-1]:g}.",
        value=mean,
        interval=(low, high),
        figure=_bars("Error by size of the start, 20 % outliers", "alpha", curves),
        table=[
            _row(name, values, alpha=alpha)
            for name, points in curves.items()
            for alpha, values in points.items()
        ],
        seeds=seeds,
    )


def falls_per_hundred(errors: Mapping[float, Sequence[float]]) -> list[float]:
    """Fit log error against log alpha for each seed; return by what the error falls per factor 100."""
    import statistics

    logs = [math.log10(alpha) for alpha in errors]
    slopes = (
        statistics.linear_regression(logs, [math.log10(value) for value in seed]).slope
        for seed in zip(*errors.values(), strict=True)
    )
    return [100**slope for slope in slopes]


def _agnostic(ctx: ClaimContext) -> ClaimResult:
    size = SIZES[ctx.scale]
    seeds, alpha = range(size.seeds), 1e-4
    settings = [(rank, OUTLIERS) for rank in size.ranks] + [(size.dim, scale) for scale in (1e3, 1e6)]
    errors = {}
    for index, (rank, scale) in enumerate(settings):
        ctx.progress(index / len(settings), f"rank {rank}, outliers of size {scale:g}")
        problems = _problems(
            size.dim, size.rank, size.measurements, seeds, ctx.device, outliers=0.2, size=scale
        )
        errors[rank, scale] = _recover(problems, rank, alpha)[0]
    reference = errors[size.dim, OUTLIERS]
    table, ratios = [], []
    for (rank, scale), values in errors.items():
        if (rank, scale) == (size.dim, OUTLIERS):
            ratio = 1.0, 1.0, 1.0
        else:
            ratio = _geometric([v / r for v, r in zip(values, reference, strict=True)])
            ratios.append(ratio)
        columns = {"rank": rank, "outlier size": scale, "ratio": ratio[0], "ratio low": ratio[1]}
        table.append(_row("SubGM", values, **columns, **{"ratio high": ratio[2]}))
    farthest = max(ratios, key=lambda ratio: abs(math.log(ratio[0])))
    return ClaimResult(
        verdict=judge_agnostic(ratios),
        measured=f"against rank {size.dim} and outliers of size {OUTLIERS:g}, the error changes most by a factor "
        f"{farthest[0]:.2f} ({farthest[1]:.2f} to {farthest[2]:.2f}) over ranks {', '.join(map(str, size.ranks))} "
        f"and outlier sizes 10, 1e3, 1e6.",
        value=farthest[0],
        interval=farthest[1:],
        figure=_bars(
            "Error by assumed rank, 20 % outliers",
            "rank",
            {"alpha 1e-4": {rank: errors[rank, OUTLIERS] for rank in size.ranks}},
        ),
        table=table,
        seeds=seeds,
    )


def judge_agnostic(ratios: Sequence[tuple[float, float, float]]) -> Verdict:
    """Judge ratios of errors (mean, low, high) to those of the reference setting."""
    if all(low > 1 / AGNOSTIC and high < AGNOSTIC for _, low, high in ratios):
        return "held"
    outside = any(high < 1 / AGNOSTIC or low > AGNOSTIC for _, low, high in ratios)
    return "not held" if outside else "inconclusive"


def _gaussian(ctx: ClaimContext) -> ClaimResult:
    size = SIZES[ctx.scale]
    seeds = range(size.seeds)
    shape = size.dim, size.rank, size.measurements
    problems = _problems(*shape, seeds, ctx.device, sigma=0.5)
    tuning = _problems(*shape, range(TUNING_SEEDS, TUNING_SEEDS + size.seeds), ctx.device, sigma=0.5)
    errors: dict[str, dict[int, list[float]]] = {"SubGM": {}, "least squares, tuned": {}}
    for index, rank in enumerate((size.dim, size.rank)):
        ctx.progress(index / 2, f"rank {rank}")
        errors["SubGM"][rank] = _recover(problems, rank, 1e-4)[0]
        errors["least squares, tuned"][rank] = _tuned_least_squares(tuning, problems, rank, size.steps)
    pairs = zip(*(points[size.dim] for points in errors.values()), strict=True)
    ratio, low, high = _geometric([subgm / squares for subgm, squares in pairs])
    return ClaimResult(
        verdict="held" if high < 1 else "not held" if low > 1 else "inconclusive",
        measured=f"with rank {size.dim}, SubGM's error is {ratio:.2f} times ({low:.2f} to {high:.2f}) that of "
        f"least squares stopped early: {_geometric(errors['SubGM'][size.dim])[0]:.3f} against "
        f"{_geometric(errors['least squares, tuned'][size.dim])[0]:.3f}.",
        value=ratio,
        interval=(low, high),
        figure=_bars(
            "Error under Gaussian noise",
            "assumed rank",
            {name: dict(sorted(points.items())) for name, points in errors.items()},
        ),
        table=[
            _row(name, values, rank=rank)
            for name, points in errors.items()
            for rank, values in points.items()
        ],
        seeds=seeds,
    )


def _not_the_minimum(ctx: ClaimContext) -> ClaimResult:
    from weightlab.optim import robust_recover

    size = SIZES[ctx.scale]
    dim, count, number = size.few
    seeds = range(number)
    problems = _problems(dim, 1, count, seeds, ctx.device, outliers=0.2)
    ctx.progress(0.0, "least squares, run on")
    _, X = _descend(problems, dim, [(0.2, 1.0)], 200)

    def losses(X: Tensor) -> list[float]:
        fitted = (problems.operators * X.unsqueeze(1)).sum((-2, -1))
        return (fitted - problems.y).abs().mean(-1).tolist()

    fitted, truth = losses(X[:, 0]), losses(problems.truths)
    curves: dict[float, list[float]] = {}
    found: list[float] = []
    alphas = (1e-1, 1e-4)
    for index, alpha in enumerate(alphas):
        ctx.progress(0.1 + 0.9 * index / len(alphas), f"alpha {alpha:g}")
        result = robust_recover(problems.operators, problems.y, dim, alpha=alpha)
        curves[alpha] = problems.errors(result.X).tolist()
        found = losses(result.X)
    errors = curves[alphas[-1]]
    mean, low, high = _geometric(errors)
    return ClaimResult(
        verdict=judge_minimum(errors, fitted, truth),
        measured=f"from {count} measurements of {dim * (dim + 1) // 2} unknowns, SubGM's relative error is {mean:.1e} "
        f"({low:.1e} to {high:.1e}); the truth has a mean absolute residual of {_geometric(truth)[0]:.2f}, SubGM's "
        f"result {_geometric(found)[0]:.2f}, and another semi-definite matrix {_geometric(fitted)[0]:.2f}.",
        value=mean,
        interval=(low, high),
        figure=_bars(
            "Fewer measurements than unknowns, 20 % outliers", "alpha", {f"rank {dim} (truth 1)": curves}
        ),
        table=[
            {
                "seed": seed,
                "relative error": errors[seed],
                "loss of the truth": truth[seed],
                "loss of SubGM's result": found[seed],
                "loss of another matrix": fitted[seed],
            }
            for seed in seeds
        ],
        seeds=seeds,
    )


def judge_minimum(errors: Sequence[float], other: Sequence[float], truth: Sequence[float]) -> Verdict:
    """Judge errors of SubGM, given losses of another matrix and of the truth, seed by seed."""
    if not all(a < b for a, b in zip(other, truth, strict=True)):
        return "inconclusive"
    _, low, high = _geometric(errors)
    return "held" if high < NEAR_TRUTH else "not held" if low > NEAR_TRUTH else "inconclusive"


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="robust",
        statement="With a fifth of the measurements grossly wrong and the rank over-estimated to the full side, "
        "SubGM from a small start recovers the matrix, with no tuning, where tuned least squares does not.",
        threshold="Relative Frobenius error, geometric mean over seeds with 95 % t interval; outliers N(0, 10²), "
        "alpha 1e-6 (1e-4 at smoke scale). Least squares may choose learning rate, size of start and stopping time "
        "by the true error on other problems. Held if SubGM's interval lies below 1e-3, that of least squares above "
        "0.3, and all runs escaped from the origin; not held if SubGM's lies above 1e-3, or that of least squares "
        "below 0.3, or a run did not escape; else inconclusive.",
        expected="recovery with any share of outliers below one, given enough measurements; no table is known",
        scales=("smoke", "cpu", "gpu"),
        run=_robust,
    ),
    Claim(
        name="small-start",
        statement="With the rank over-estimated and a fifth of outliers, the error falls with the size of the start.",
        threshold="By how much the error falls when alpha falls a hundredfold, from the slope of log error over "
        "log alpha of each seed; 95 % t interval. Held if it lies above a factor 5; not held if below; else "
        "inconclusive.",
        expected="a power of alpha, up to the first: a factor 100",
        scales=("smoke", "cpu", "gpu"),
        run=_small_start,
    ),
    Claim(
        name="agnostic",
        statement="The error depends neither on how far the rank is over-estimated nor on the size of the outliers.",
        threshold="Paired ratios of error to that with full rank and outliers N(0, 10²), alpha 1e-4: other ranks "
        "above the true one, and outliers of size 1e3 and 1e6. Held if every 95 % t interval lies within a factor "
        "1.5 of one; not held if any lies wholly outside; else inconclusive.",
        expected="independent of both",
        scales=("smoke", "cpu", "gpu"),
        run=_agnostic,
    ),
    Claim(
        name="gaussian-noise",
        statement="Under Gaussian noise, too, SubGM is more accurate than least squares stopped early.",
        threshold="Paired ratio of SubGM's error to that of tuned least squares, full rank, noise of standard "
        "deviation 0.5, alpha 1e-4. Held if the 95 % t interval lies below 1; not held if it lies above; else "
        "inconclusive.",
        expected="the paper claims one method for both kinds of noise and a near-optimal order, not a win",
        run=_gaussian,
    ),
    Claim(
        name="not-the-minimum",
        statement="SubGM finds the truth even where the truth does not minimise the loss.",
        threshold="Rank 1 over-estimated to full, fewer measurements than unknowns, a fifth of outliers N(0, 10²), "
        "alpha 1e-4. Provided that for every seed a semi-definite matrix with a smaller mean absolute residual than "
        "the truth's is exhibited: held if the 95 % t interval of the geometric mean error lies below 1e-2, not "
        "held if above. Else inconclusive.",
        expected="convergence to the truth although global minima of the loss are elsewhere",
        run=_not_the_minimum,
    ),
)
