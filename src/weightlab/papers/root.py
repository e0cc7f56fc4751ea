"""ROOT: Robust Orthogonalized Optimizer for Neural Network Training (arXiv 2511.20626)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from weightlab.exceptions import TrialError
from weightlab.papers import trials
from weightlab.papers.figure import rounded
from weightlab.papers.schema import Claim, ClaimContext, ClaimResult, Paper, Scale, Verdict

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from weightlab.tasks.base import Task
    from weightlab.trial.arm import Arm, Hyperparameters

PAPER = Paper(
    number=8,
    slug="root",
    title="ROOT: Robust Orthogonalized Optimizer for Neural Network Training",
    authors=("Wei He", "Kai Han", "Hang Zhou", "Hanting Chen", "Zhicheng Liu", "Xinghao Chen", "Yunhe Wang"),
    author_count=7,
    date="2025-11-25",
    arxiv="2511.20626",
    code=("huawei-noah/noah-research",),
    summary=(
        "Muon orthogonalises the momentum with Newton-Schulz steps whose coefficients are the same for "
        "every shape. ROOT calls this fragile in two ways: the precision depends on the shape of the "
        "matrix, and a few outlying entries bend the whole result. It therefore fits the coefficients to "
        "each shape, and soft-thresholds the momentum at a high quantile before orthogonalising; what is "
        "clipped is left out of the update but stays in the buffer. A much smaller orthogonalisation "
        "error is reported, and lower training loss than AdamW and Muon for a one-billion-parameter "
        "transformer. The published figures of the error are more modest in the repository's own plot "
        "than in summaries of the paper. Higher precision need not mean lower loss: Muon's imprecise "
        "steps are not known to hold it back, and without outliers clipping only removes signal. "
        "Robustness can only show where outliers carry a visible share of the Frobenius norm."
    ),
    room="optim",
    parts=("optim.ROOT", "linalg.clip_outliers", "linalg.newton_schulz", "linalg.fit_newton_schulz"),
    keywords=(
        "optimizer",
        "Muon",
        "AdaNewton",
        "orthogonalization",
        "soft thresholding",
        "outliers",
        "matrix sign",
    ),
)

RATIOS = (1.0, 1.5, 4.0, 8.0)
MUON, PUBLISHED, FITTED = "Muon", "ROOT's table", "one triple fitted to the shape"
OUTLIER_SHARE, OUTLIER = 1e-3, 100.0
WORTH_HAVING = 0.05
NO_GAIN = 0.01


@dataclass(frozen=True)
class _Size:
    """What a scale costs: how long, how often, how large."""

    side: int
    draws: int
    width: int
    harvests: tuple[int, ...]
    seeds: int
    tune: int
    digits_steps: int
    text_steps: int | None
    text_seeds: int
    eval_points: int


SIZES: dict[Scale, _Size] = {
    "smoke": _Size(
        side=32,
        draws=2,
        width=32,
        harvests=(1, 4),
        seeds=2,
        tune=1,
        digits_steps=15,
        text_steps=4,
        text_seeds=2,
        eval_points=2,
    ),
    "cpu": _Size(
        side=192,
        draws=5,
        width=128,
        harvests=(1, 50, 150, 300),
        seeds=5,
        tune=4,
        digits_steps=300,
        text_steps=None,
        text_seeds=4,
        eval_points=10,
    ),
}


def _precision(ctx: ClaimContext, method: str) -> ClaimResult:
    """Compare a method's error with Muon's."""
    errors = _errors(ctx)
    verdict, table = judge_precision(errors, method)
    worst = max(table, key=lambda row: row["over Muon"])
    drawn = [row for row in table if row["spectrum"] == "Gaussian"]
    return ClaimResult(
        verdict=verdict,
        measured=f"error with {method} over that with Muon's triple: "
        + ", ".join(f"{row['over Muon']:.2g} (aspect ratio {row['aspect ratio']})" for row in drawn)
        + f" on Gaussian matrices; at worst {worst['over Muon']:.2f} ({worst['low']:.2f} to "
        f"{worst['high']:.2f}), {worst['spectrum']}, aspect ratio {worst['aspect ratio']}.",
        value=worst["over Muon"],
        interval=(worst["low"], worst["high"]),
        figure={
            "title": "Error of five Newton-Schulz steps on Gaussian matrices",
            "x_label": "aspect ratio",
            "y_label": "relative error to the exact factor",
            "log_x": True,
            "log_y": True,
            "series": [
                {
                    "name": name,
                    "x": list(RATIOS),
                    "y": rounded(statistics.fmean(errors["Gaussian", f"{r:g}"][name]) for r in RATIOS),
                }
                for name in errors["Gaussian", "1"]
            ],
        },
        table=table,
        seeds=range(SIZES[ctx.scale].draws),
    )


def _errors(ctx: ClaimContext) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Relative errors by (spectrum, aspect ratio) and method, one for each matrix."""
    import torch

    from weightlab.linalg import fit_newton_schulz, newton_schulz

    size = SIZES[ctx.scale]
    cells = _drawn_cells(size)
    ctx.progress(0.1, f"harvest momenta of a text model, width {size.width}")
    for seed in range(2):
        for name, matrices in _harvested(size.width, size.harvests, seed, ctx.progress).items():
            cells.setdefault(("harvested", name), []).extend(matrices)
    errors: dict[tuple[str, str], dict[str, list[float]]] = {}
    for done, (cell, matrices) in enumerate(cells.items()):
        ctx.progress(0.6 + 0.4 * done / len(cells), f"{cell[0]}, aspect ratio {cell[1]}")
        shape = (matrices[0].size(-2), matrices[0].size(-1))
        methods: dict[str, Any] = {
            MUON: "muon",
            FITTED: fit_newton_schulz(shape, shared=True),
            PUBLISHED: "root",
            "five triples fitted to the shape": fit_newton_schulz(shape),
            "quintic": "quintic",
            "Polar Express": "polar_express",
        }
        by_method = errors.setdefault(cell, {name: [] for name in methods})
        for matrix in matrices:
            left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
            exact = left @ right
            for name, coefficients in methods.items():
                made = newton_schulz(matrix, coefficients, 5).double()
                by_method[name].append(float((made - exact).norm() / exact.norm()))
    return errors


def judge_precision(
    errors: Mapping[tuple[str, str], Mapping[str, Sequence[float]]], method: str
) -> tuple[Verdict, list[dict[str, Any]]]:
    """Judge a method against Muon by errors: (spectrum, aspect ratio) -> method -> one a matrix."""
    from weightlab.trial.statistics import PairedMean

    table: list[dict[str, Any]] = []
    for (spectrum, ratio), by_method in errors.items():
        pairs = zip(by_method[method], by_method[MUON], strict=True)
        gain = PairedMean([math.log(error / muon) for error, muon in pairs])
        low, high = (math.exp(end) for end in gain.interval(0.95))
        table.append(
            {
                "spectrum": spectrum,
                "aspect ratio": ratio,
                **{name: statistics.fmean(values) for name, values in by_method.items()},
                "over Muon": math.exp(gain.mean),
                "low": low,
                "high": high,
            }
        )
    if all(row["high"] < 1 for row in table):
        return "held", table
    return "not held" if any(row["low"] > 1 for row in table) else "inconclusive", table


def _drawn_cells(size: _Size) -> dict[tuple[str, str], list[Tensor]]:
    """Gaussian matrices, and ones with singular values i^(-1/2), of each aspect ratio."""
    import torch

    generator = torch.Generator().manual_seed(0)
    cells: dict[tuple[str, str], list[Tensor]] = {}
    for ratio in RATIOS:
        name = f"{ratio:g}"
        shape = (size.side, round(size.side * ratio))
        for _ in range(size.draws):
            gaussian = torch.randn(shape, generator=generator)
            cells.setdefault(("Gaussian", name), []).append(gaussian)
            left, _, right = torch.linalg.svd(gaussian, full_matrices=False)
            powers = torch.arange(1, size.side + 1).float().rsqrt()
            cells.setdefault(("power law", name), []).append((left * powers) @ right)
    return cells


_momenta: dict[tuple[int, tuple[int, ...], int], dict[str, list[Tensor]]] = {}


def _harvested(
    width: int, harvests: tuple[int, ...], seed: int, progress: Callable[[float, str], None]
) -> dict[str, list[Tensor]]:
    """Train a text model with Muon; return its momenta at the steps asked for, by aspect ratio."""
    import torch

    from weightlab.tasks.docs_gpt import DocsGPT
    from weightlab.trial import registry

    if (width, harvests, seed) in _momenta:
        return _momenta[width, harvests, seed]
    task = DocsGPT(width=width)
    generator = torch.Generator().manual_seed(seed)
    model = task.build(generator)
    arm = registry.arm("muon-ns")
    optimizer = arm.optimizer(model, arm.defaults)
    assert isinstance(optimizer, torch.optim.Optimizer)
    found: dict[str, list[Tensor]] = {}
    step = 0
    while step < harvests[-1]:
        for batch in task.batches("train", generator):
            step += 1
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
            if step in harvests:
                progress(0.1 + 0.25 * (seed + step / harvests[-1]), f"seed {seed}, step {step}")
                for state in optimizer.state.values():
                    buffer = state.get("momentum_buffer")
                    if buffer is not None:
                        ratio = max(buffer.shape) / min(buffer.shape)
                        found.setdefault(f"{ratio:g}", []).append(buffer.clone())
            if step == harvests[-1]:
                break
    _momenta[width, harvests, seed] = found
    return found


def _training_loss_task(steps: int) -> Task:
    from weightlab.papers._root_task import DigitsTrainingLoss

    return DigitsTrainingLoss(hidden=(128, 128), steps=steps)


def add_outliers(optimizer: Optimizer, share: float = OUTLIER_SHARE, factor: float = OUTLIER) -> Optimizer:
    """Multiply a share of the entries of its matrices' gradients by a factor before every step.

    Places are drawn independently for each entry and step, from a seed that follows torch's: the same
    for all arms of a trial that share a seed.
    """
    import torch

    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)

    def corrupt(optimizer: Optimizer, args: object, kwargs: object) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.ndim >= 2 and group.get("use_matrix_rule", True):
                    hit = torch.rand(p.shape, generator=generator) < share
                    p.grad.mul_(torch.where(hit, factor, 1.0).to(p.grad))

    optimizer.register_step_pre_hook(corrupt)
    return optimizer


def _noisy(arm: Arm, noisy: bool) -> Arm:
    """An arm with its learning rate tuned, weight decay fixed, and outliers if asked for."""

    def build(model: nn.Module, hyperparameters: Hyperparameters) -> Optimizer:
        optimizer = arm.optimizer(model, hyperparameters)
        if isinstance(optimizer, Sequence):
            raise TrialError(f"{arm.name} has several optimizers, of which it is not clear which to disturb")
        return add_outliers(optimizer) if noisy else optimizer

    return replace(
        arm,
        name=f"{arm.name}, {'outliers' if noisy else 'clean'}",
        optimizer=build,
        search_space={"lr": arm.search_space["lr"]},
    )


def _outlier_robustness(ctx: ClaimContext) -> ClaimResult:
    from weightlab.trial import registry

    size = SIZES[ctx.scale]
    names = ("muon-ns", "root-no-fit", "root")
    report = trials.run_trial(
        ctx,
        _training_loss_task(size.digits_steps),
        [_noisy(registry.arm(name), noisy) for noisy in (False, True) for name in names],
        tune=size.tune,
        seeds=size.seeds,
        eval_points=size.eval_points,
    )
    growth: dict[str, list[float]] = {}
    table: list[dict[str, Any]] = []
    for name in names:
        clean, noisy = (report.arm(f"{name}, {kind}") for kind in ("clean", "outliers"))
        growth[name] = [
            math.log(after.score / before.score) for before, after in zip(clean.runs, noisy.runs, strict=True)
        ]
        table.append(
            {
                "arm": name,
                "training loss, clean": clean.mean,
                "training loss, outliers": noisy.mean,
                "ratio": math.exp(statistics.fmean(growth[name])),
                "learning rates": f"{clean.hyperparameters['lr']:.2g}, {noisy.hyperparameters['lr']:.2g}",
                "at an edge": "; ".join([*clean.edges, *noisy.edges]),
            }
        )
    verdict, compared = judge_robustness(growth)
    for row in table:
        row.update(compared.get(row["arm"], {}))
    root = compared["root"]
    return ClaimResult(
        verdict=verdict,
        measured="outliers multiply the training loss by "
        + ", ".join(f"{row['ratio']:.3g} with {row['arm']}" for row in table)
        + f"; ROOT's factor over Muon's: {root['over Muon']:.3g} ({root['low']:.3g} to {root['high']:.3g}).",
        value=root["over Muon"],
        interval=(root["low"], root["high"]),
        figure=trials.curves(report, "Digits: training loss with and without outliers in the gradient"),
        table=table,
        cost=report.seconds,
        seeds=range(size.seeds),
    )


def judge_robustness(growth: Mapping[str, Sequence[float]]) -> tuple[Verdict, dict[str, dict[str, float]]]:
    """Judge logarithms of loss with over without outliers, arm -> one a seed; Muon's come first, ROOT's last."""
    from weightlab.trial.statistics import PairedMean

    (_, muon), *others = growth.items()
    compared = {}
    low = high = 0.0
    for name, values in others:
        estimate = PairedMean([v - m for v, m in zip(values, muon, strict=True)])
        low, high = estimate.interval(0.95)
        compared[name] = {"over Muon": math.exp(estimate.mean), "low": math.exp(low), "high": math.exp(high)}
    if high < 0:
        return "held", compared
    return "not held" if low > math.log(1 - WORTH_HAVING) else "inconclusive", compared


def _lower_loss(ctx: ClaimContext) -> ClaimResult:
    from weightlab.trial import registry

    size = SIZES[ctx.scale]
    names = ("muon-ns", "root", "root-no-clip", "root-no-fit")
    digits = trials.run_trial(
        ctx,
        _training_loss_task(size.digits_steps),
        [_noisy(registry.arm(name), False) for name in names],
        tune=size.tune,
        seeds=size.seeds,
        eval_points=size.eval_points,
        span=(0.0, 0.3),
    )
    text = trials.run_trial(
        ctx,
        "docs-gpt",
        list(names[:2]),
        baseline="muon-ns",
        tune=size.tune,
        seeds=size.text_seeds,
        steps=size.text_steps,
        eval_points=size.eval_points,
        span=(0.3, 1.0),
    )
    table: list[dict[str, Any]] = []
    cells: dict[str, tuple[float, float, float, float]] = {}
    for report, loss_name in ((digits, "training loss"), (text, "test loss")):
        muon = report.arms[0]
        for arm in report.arms:
            low, high = arm.versus.interval if arm.versus else (0.0, 0.0)
            row = {
                "task": report.task,
                "arm": arm.name.removesuffix(", clean"),
                "loss": arm.mean,
                "of": loss_name,
                "ratio to Muon": arm.mean / muon.mean,
                "low": 1 + low / muon.mean,
                "high": 1 + high / muon.mean,
                "ms a step": arm.step_ms,
                "tuned": ", ".join(f"{key} {value:.2g}" for key, value in arm.hyperparameters.items()),
                "at an edge": "; ".join(arm.edges),
            }
            table.append(row)
            if row["arm"] == "root":
                cells[report.task] = (muon.mean, arm.mean - muon.mean, low, high)
    task, (loss, difference, low, high) = max(cells.items(), key=lambda cell: cell[1][1] / cell[1][0])
    return ClaimResult(
        verdict=judge_loss(cells.values()),
        measured="ROOT's loss over Muon's: "
        + ", ".join(
            f"{1 + d / m:.3f} ({1 + a / m:.3f} to {1 + b / m:.3f}) on {name}"
            for name, (m, d, a, b) in cells.items()
        )
        + f"; worst on {task}.",
        value=1 + difference / loss,
        interval=(1 + low / loss, 1 + high / loss),
        figure=trials.curves(text),
        table=table,
        cost=digits.seconds + text.seconds,
        seeds=range(size.seeds),
    )


def judge_loss(cells: Iterable[tuple[float, float, float, float]]) -> Verdict:
    """Judge (Muon's loss, ROOT's difference, low end, high end of its interval) of each task."""
    cells = list(cells)
    if all(high < 0 for _, _, _, high in cells):
        return "held"
    return "not held" if any(low > -NO_GAIN * loss for loss, _, low, _ in cells) else "inconclusive"


_CELLS = (
    "Cells: Gaussian matrices and singular values i^(-1/2), at aspect ratios 1, 1.5, 4 and 8, and momenta of a text "
    "model in training, by aspect ratio. Held if in every cell the 95 % interval of the mean ratio (of logarithms) "
    "lies below 1; not held if in any it lies above 1; else inconclusive."
)
_PRECISION_EXPECTED = (
    "MSE from 1e-3 to 1e-5 for 2048×2048 in summaries of the paper; relative error 0.16 to 0.235 against Muon's 0.21 "
    "to 0.28 in the repository's figure"
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="fitted-precision",
        statement="Newton-Schulz coefficients fitted to the shape of a matrix orthogonalise it more precisely than "
        "Muon's, whatever the shape.",
        threshold="Relative error ‖X − UVᵀ‖/‖UVᵀ‖ after five steps in float32, against an SVD in float64, with one "
        f"triple fitted to the Gaussian spectrum of the shape, over the error with Muon's triple. {_CELLS}",
        expected=_PRECISION_EXPECTED,
        run=partial(_precision, method=FITTED),
    ),
    Claim(
        name="published-precision",
        statement="ROOT's published coefficients, those of the nearest aspect ratio in its table, orthogonalise more "
        "precisely than Muon's, whatever the shape.",
        threshold=f"As for fitted coefficients, with the published table in place of the fit. {_CELLS}",
        expected=_PRECISION_EXPECTED,
        run=partial(_precision, method=PUBLISHED),
    ),
    Claim(
        name="outlier-robustness",
        statement="Where gradients hold outliers, ROOT loses less than Muon.",
        threshold="0.1 % of the entries of the hidden matrices' gradients, drawn anew at each step, are multiplied by "
        "100. Training loss on the digits with outliers over that without, each with its learning rate tuned. "
        "Held if the 95 % interval of the paired difference of the logarithms, ROOT minus Muon, lies below 0; not "
        "held if it lies above log 0.95, so that less than 5 % is to be had; else inconclusive. Muon with ROOT's "
        "clipping alone is the control.",
        expected="the paper's motivation; no figure for injected outliers is known here",
        run=_outlier_robustness,
    ),
    Claim(
        name="lower-loss",
        statement="Without outliers put in, ROOT reaches a lower loss than Muon in as many steps.",
        threshold="Both tuned with the same budget: training loss on the digits, test loss on text. Held if on both "
        "tasks the 95 % interval of the paired difference lies below 0; not held if on either it lies above −1 % of "
        "Muon's mean loss; else inconclusive.",
        expected="slightly lower training loss than AdamW and Muon for a 1 B transformer on FineWeb-Edu",
        run=_lower_loss,
    ),
)
