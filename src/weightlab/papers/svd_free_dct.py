"""SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models (arXiv 2505.17967)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightlab.papers import trials
from weightlab.papers.figure import rounded
from weightlab.papers.schema import Claim, ClaimContext, ClaimResult, Paper, Scale, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from weightlab.linalg.column_selection import Basis

Estimate = tuple[float, float, float]

PAPER = Paper(
    number=5,
    slug="svd-free-dct",
    title="SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models",
    authors=("Modoranu", "Safaryan", "Schultheis", "Ryabinin", "Chumachenko", "Alistarh"),
    author_count=6,
    date="2025-05",
    arxiv="2505.17967",
    venue="ICLR 2026",
    code=("IST-DASLab/ISTA-DASLab-Optimizers",),
    summary=(
        "Low-rank optimizers keep Adam's moments, or an orthogonalised momentum, in a small subspace of "
        "each weight matrix, and usually find it with an SVD or QR that is slow and must be stored for "
        "every layer. Here one fixed orthogonal matrix per size, the discrete cosine transform, serves "
        "all layers: at each step the basis vectors best aligned with the gradient are picked by the norm "
        "of its coefficients, and only their indices are kept. With a fast Fourier transform the cost "
        "does not depend on the rank. Two optimizers are built on this: DCT-AdamW, with moments carried "
        "over when the subspace changes, and Trion, which is Dion with column selection in place of the "
        "power iteration. Parity with SVD-based methods at lower time and up to a quarter less memory is "
        "claimed. The selection is contractive for any orthogonal basis; on matrices without smooth axes "
        "the cosine basis does no better than a random one or plain coordinates. The official code resets "
        "the moments it means to rotate, at least on the CPU, and decodes its quantised error feedback in "
        "the wrong order. From the third version on the title speaks of FFT-based dynamic subspace "
        "selection."
    ),
    room="optim",
    parts=("optim.DCTAdamW", "optim.Trion", "linalg.dct", "linalg.dct_matrix", "linalg.select_basis_columns"),
    keywords=(
        "optimizer",
        "low rank",
        "GaLore",
        "Dion",
        "discrete cosine transform",
        "FFT",
        "memory efficient",
        "Makhoul",
        "error feedback",
        "FFT-based Dynamic Subspace Selection",
    ),
)


@dataclass(frozen=True)
class _Size:
    """What a scale costs: how long, how often, how large."""

    seeds: int
    tune: int
    steps: int
    every: int
    eval_points: int
    rounds: int
    shapes: tuple[tuple[int, int], ...]
    rank: int
    ranks: tuple[int, ...]


_MATRICES = ((512, 512), (512, 512), (512, 1024), (1024, 512), (1024, 1024))
SIZES: dict[Scale, _Size] = {
    "smoke": _Size(
        seeds=2,
        tune=1,
        steps=6,
        every=3,
        eval_points=2,
        rounds=2,
        shapes=((64, 64), (64, 128)),
        rank=8,
        ranks=(4, 8, 32),
    ),
    "cpu": _Size(
        seeds=5,
        tune=4,
        steps=300,
        every=25,
        eval_points=10,
        rounds=5,
        shapes=_MATRICES,
        rank=64,
        ranks=(32, 64, 128, 256),
    ),
    "gpu": _Size(
        seeds=5,
        tune=4,
        steps=300,
        every=25,
        eval_points=10,
        rounds=5,
        shapes=((2048, 2048), (2048, 4096), (4096, 4096)),
        rank=256,
        ranks=(128, 256, 512, 1024),
    ),
}
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
BASES: tuple[Basis, ...] = ("dct2", "dct3", "random", "identity")
NEAR_SVD = 0.1
BETTER_THAN_RANDOM = 0.01
PARITY = 0.01
FLAT = 1.1
GAP = 200


def projection_errors(G: Tensor) -> dict[tuple[str, float], float]:
    """Relative error of rank-r projections of one matrix: (basis or svd, r/n) -> error."""
    import torch

    from weightlab.linalg import select_basis_columns

    n = min(G.shape)
    total = G.square().sum()
    squares = torch.linalg.svdvals(G).square()
    errors = {}
    for fraction in FRACTIONS:
        errors["svd", fraction] = squares[round(fraction * n) :].sum()
        for basis in BASES:
            low, _ = select_basis_columns(G, fraction, basis=basis, norm=2)
            errors[basis, fraction] = total - low.square().sum()
    return {key: float((error.clamp(min=0) / total).sqrt()) for key, error in errors.items()}


def _errors_of_run(
    task_name: str, seed: int, size: _Size, device: str
) -> dict[str, dict[tuple[str, float], float]]:
    """Train by AdamW; return mean errors of each weight matrix's gradient along the run."""
    import torch

    from weightlab import tasks
    from weightlab.optim import split_named_parameters
    from weightlab.trial import registry

    task, arm = tasks.get(task_name), registry.arm("adamw")
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = task.build(generator).to(device)
    optimizer = arm.optimizer(model, dict(arm.defaults))
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    positions = {name: p for name, p in model.named_parameters() if "position_embedding" in name}
    watched = {**dict(split_named_parameters(model)[0]), **positions}
    found: dict[str, list[dict[tuple[str, float], float]]] = {name: [] for name in watched}
    step = 0
    while step < size.steps:
        for batch in task.batches("train", generator):
            step += 1
            parts = batch if isinstance(batch, tuple | list) else (batch,)
            moved = tuple(part.to(device) for part in parts)
            for each in optimizers:
                each.zero_grad()
            task.loss(model, moved if isinstance(batch, tuple | list) else moved[0]).backward()
            if step % size.every == 0:
                for name, p in watched.items():
                    if p.grad is not None:
                        found[name].append(projection_errors(p.grad.detach()))
            for each in optimizers:
                each.step()
            if step == size.steps:
                break
    return {
        name: {key: statistics.fmean(errors[key] for errors in rows) for key in rows[0]}
        for name, rows in found.items()
    }


def _projection_quality(ctx: ClaimContext) -> ClaimResult:
    size = SIZES[ctx.scale]
    kinds = {
        "GPT, hidden matrices (decide)": ("docs-gpt", lambda name: "embedding" not in name),
        "GPT, position embedding": ("docs-gpt", lambda name: "embedding" in name),
        "perceptron, from 8×8 pixels": ("digits-mlp", lambda name: True),
    }
    # kind -> (basis, fraction) -> one mean a seed
    errors: dict[str, dict[tuple[str, float], list[float]]] = {kind: {} for kind in kinds}
    for seed in range(size.seeds):
        runs = {}
        for part, task in enumerate(("docs-gpt", "digits-mlp")):
            ctx.progress((seed + part / 2) / size.seeds, f"{task}, seed {seed}")
            runs[task] = _errors_of_run(task, seed, size, ctx.device)
        for kind, (task, belongs) in kinds.items():
            chosen = [means for name, means in runs[task].items() if belongs(name)]
            for key in chosen[0]:
                errors[kind].setdefault(key, []).append(statistics.fmean(means[key] for means in chosen))
    decisive = errors[next(iter(kinds))]
    names = ("svd", *BASES)
    means = {
        name: [statistics.fmean(decisive[name, f][seed] for f in FRACTIONS) for seed in range(size.seeds)]
        for name in names
    }
    gaps = {
        basis: (
            _interval(_differences(means[basis], means["svd"])),
            _interval(_differences(means[basis], means["random"])),
        )
        for basis in ("dct2", "dct3")
    }
    best = min(gaps, key=lambda basis: statistics.fmean(means[basis]))
    (to_svd, svd_low, svd_high), (to_random, low, high) = gaps[best]
    table = [
        {
            "gradients": kind,
            "r / n": fraction,
            **{name: statistics.fmean(errors[kind][name, fraction]) for name in names},
        }
        for kind in kinds
        for fraction in FRACTIONS
    ]
    return ClaimResult(
        verdict=judge_projection(list(gaps.values())),
        measured=f"relative error over all ranks: {statistics.fmean(means['svd']):.3f} for the SVD, "
        + ", ".join(f"{statistics.fmean(means[basis]):.3f} for {basis}" for basis in BASES)
        + f"; {best} minus SVD {to_svd:+.3f} ({svd_low:+.3f} to {svd_high:+.3f}), minus random "
        f"{to_random:+.4f} ({low:+.4f} to {high:+.4f}).",
        value=to_random,
        interval=(low, high),
        figure={
            "title": "Error of a rank-r projection of a GPT's gradients",
            "x_label": "r / n",
            "y_label": "relative error",
            "log_x": True,
            "log_y": False,
            "series": [
                {
                    "name": name,
                    "x": list(FRACTIONS),
                    "y": rounded(statistics.fmean(decisive[name, f]) for f in FRACTIONS),
                    "low": rounded(min(decisive[name, f]) for f in FRACTIONS),
                    "high": rounded(max(decisive[name, f]) for f in FRACTIONS),
                }
                for name in names
            ],
        },
        table=table,
        seeds=range(size.seeds),
    )


def judge_projection(gaps: Sequence[tuple[Estimate, Estimate]]) -> Verdict:
    """Judge (basis minus SVD, basis minus random) of both cosine bases: mean and interval each."""
    verdicts = [
        "held"
        if svd_high <= NEAR_SVD and random_high < 0
        else "not held"
        if svd_low > NEAR_SVD or random_low > -BETTER_THAN_RANDOM
        else "inconclusive"
        for (_, svd_low, svd_high), (_, random_low, random_high) in gaps
    ]
    if "held" in verdicts:
        return "held"
    return "not held" if all(verdict == "not held" for verdict in verdicts) else "inconclusive"


def _differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]


def _interval(values: Sequence[float]) -> Estimate:
    from weightlab.trial.statistics import PairedMean

    estimate = PairedMean(values)
    return estimate.mean, *estimate.interval(0.95)


def _loss_parity(ctx: ClaimContext) -> ClaimResult:
    size = SIZES[ctx.scale]
    rivals = ("svd-adamw", "svd-adamw-200")
    report = trials.run_trial(
        ctx,
        "docs-gpt",
        ["adamw", "dct-adamw", *rivals, "random-basis-adamw"],
        baseline="adamw",
        tune=size.tune,
        seeds=size.seeds,
        steps=size.steps,
        eval_points=size.eval_points,
    )
    scores = {arm.name: [run.score for run in report.arm(arm.name).runs] for arm in report.arms}
    shares: dict[str, Estimate] = {}
    for name, values in scores.items():
        loss = statistics.fmean(values)
        mean, low, high = _interval(_differences(scores["dct-adamw"], values))
        shares[name] = mean / loss, low / loss, high / loss
    worst = max(rivals, key=lambda name: shares[name][0])
    table = [
        {
            "arm": arm.name,
            "test loss": arm.mean,
            "dct-adamw's over it": 1 + shares[arm.name][0],
            "low": 1 + shares[arm.name][1],
            "high": 1 + shares[arm.name][2],
            "ms a step": arm.step_ms,
            "state MiB": arm.state_mb,
            "tuned": ", ".join(f"{key} {value:.2g}" for key, value in arm.hyperparameters.items()),
            "at an edge": "; ".join(arm.edges),
        }
        for arm in report.arms
    ]
    return ClaimResult(
        verdict=judge_parity([shares[name] for name in rivals]),
        measured="test loss of DCT-AdamW over that of "
        + ", ".join(
            f"{name} {1 + shares[name][0]:.4f} ({1 + shares[name][1]:.4f} to {1 + shares[name][2]:.4f})"
            for name in scores
            if name != "dct-adamw"
        )
        + ".",
        value=1 + shares[worst][0],
        interval=(1 + shares[worst][1], 1 + shares[worst][2]),
        figure=trials.curves(report),
        table=table,
        cost=report.seconds,
        seeds=range(size.seeds),
    )


def judge_parity(shares: Sequence[Estimate]) -> Verdict:
    """Judge relative excess losses over each rival: mean and interval each."""
    if all(high <= PARITY for _, _, high in shares):
        return "held"
    return "not held" if any(low > PARITY for _, low, _ in shares) else "inconclusive"


def _timed(contenders: Mapping[str, Any], rounds: int, ctx: ClaimContext) -> dict[str, list[float]]:
    """Seconds a step in each round, contenders in turns, one thread."""
    import torch

    def synchronize() -> None:
        if torch.device(ctx.device).type == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in contenders}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(-1, rounds):
            for name, optimizer in contenders.items():
                ctx.progress(max(0, turn) / rounds, f"round {turn + 1} of {rounds}: {name}")
                synchronize()
                start = time.perf_counter()
                optimizer.step()
                synchronize()
                seconds = time.perf_counter() - start
                # Slow steps need no repeats to be told from the clock's noise.
                repeats = max(1, min(20, round(0.05 / seconds))) if turn >= 0 else 1
                start = time.perf_counter()
                for _ in range(repeats):
                    optimizer.step()
                synchronize()
                if turn >= 0:
                    times[name].append((time.perf_counter() - start) / repeats)
    finally:
        torch.set_num_threads(threads)
    return times


def _parameters(shapes: Sequence[tuple[int, int]], device: str) -> list[Any]:
    import torch

    generator = torch.Generator(device).manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, device=device, generator=generator)
    return params


def _state_mib(optimizer: Any) -> float:
    import torch

    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def _faster_than_svd(ctx: ClaimContext) -> ClaimResult:
    from torch.optim import AdamW

    from weightlab.optim import DCTAdamW

    size = SIZES[ctx.scale]
    never = 2**62

    def low_rank(**settings: Any) -> Any:
        return DCTAdamW(_parameters(size.shapes, ctx.device), rank=size.rank, **settings)

    contenders = {
        "DCT-AdamW, choosing": low_rank(),
        "DCT-AdamW, between": low_rank(update_gap=never),
        "SVD-AdamW, choosing": low_rank(basis="svd"),
        "SVD-AdamW, between": low_rank(basis="svd", update_gap=never),
        "AdamW": AdamW(_parameters(size.shapes, ctx.device), foreach=True),
    }
    times = _timed(contenders, size.rounds, ctx)

    def steps(name: str, gap: int) -> list[float]:
        pairs = zip(times[f"{name}, choosing"], times[f"{name}, between"], strict=True)
        return [(choosing + (gap - 1) * between) / gap for choosing, between in pairs]

    ratios: dict[int, Estimate] = {}
    for gap in (1, GAP):
        logs = [
            math.log(svd / dct)
            for svd, dct in zip(steps("SVD-AdamW", gap), steps("DCT-AdamW", gap), strict=True)
        ]
        mean, low, high = _interval(logs)
        ratios[gap] = math.exp(mean), math.exp(low), math.exp(high)
    table = [
        {
            "optimizer": name,
            "gap": gap,
            "ms a step": 1e3 * statistics.median(steps(name, gap)),
            "state MiB": _state_mib(contenders[f"{name}, choosing"]),
        }
        for name in ("DCT-AdamW", "SVD-AdamW")
        for gap in (1, GAP)
    ]
    table.append(
        {
            "optimizer": "AdamW",
            "gap": 1,
            "ms a step": 1e3 * statistics.median(times["AdamW"]),
            "state MiB": _state_mib(contenders["AdamW"]),
        }
    )
    first, low, high = ratios[1]
    return ClaimResult(
        verdict=judge_faster(list(ratios.values())),
        measured=f"at rank {size.rank} a step of SVD-AdamW takes "
        + " and ".join(
            f"{mean:.3g} times ({low:.3g} to {high:.3g}) that of DCT-AdamW with a new subspace every "
            f"{'step' if gap == 1 else f'{gap} steps'}"
            for gap, (mean, low, high) in ratios.items()
        )
        + ".",
        value=first,
        interval=(low, high),
        figure={
            "title": f"Time of one step at rank {size.rank}",
            "x_label": "steps between new subspaces",
            "y_label": "ms",
            "log_x": True,
            "log_y": True,
            "series": [
                {
                    "name": name,
                    "x": gaps,
                    "y": rounded(1e3 * statistics.median(steps(name, gap)) for gap in gaps),
                }
                for gaps in [[1, 2, 5, 10, 20, 50, 100, 200]]
                for name in ("DCT-AdamW", "SVD-AdamW")
            ],
        },
        table=table,
    )


def judge_faster(ratios: Sequence[Estimate]) -> Verdict:
    """Judge SVD-AdamW's step time over DCT-AdamW's at each gap: mean and interval."""
    if all(low > 1 for _, low, _ in ratios):
        return "held"
    return "not held" if any(high < 1 for _, _, high in ratios) else "inconclusive"


def _rank_free(ctx: ClaimContext) -> ClaimResult:
    from weightlab.optim import DCTAdamW

    size = SIZES[ctx.scale]
    contenders = {str(rank): DCTAdamW(_parameters(size.shapes, ctx.device), rank=rank) for rank in size.ranks}
    times = _timed(contenders, size.rounds, ctx)
    least, most = str(size.ranks[0]), str(size.ranks[-1])
    logs = [math.log(b / a) for a, b in zip(times[least], times[most], strict=True)]
    mean, low, high = (math.exp(value) for value in _interval(logs))
    return ClaimResult(
        verdict="held" if high < FLAT else "not held" if low > FLAT else "inconclusive",
        measured=f"a step at rank {most} takes {mean:.3g} times ({low:.3g} to {high:.3g}) one at rank {least}.",
        value=mean,
        interval=(low, high),
        figure={
            "title": "Time of one step of DCT-AdamW",
            "x_label": "rank",
            "y_label": "ms",
            "log_x": True,
            "log_y": False,
            "series": [
                {
                    "name": "DCT-AdamW",
                    "x": list(size.ranks),
                    "y": rounded(1e3 * statistics.median(column) for column in times.values()),
                    "low": rounded(1e3 * min(column) for column in times.values()),
                    "high": rounded(1e3 * max(column) for column in times.values()),
                }
            ],
        },
        table=[
            {
                "rank": int(rank),
                "ms a step": 1e3 * statistics.median(column),
                "state MiB": _state_mib(contenders[rank]),
            }
            for rank, column in times.items()
        ],
    )


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="projection-quality",
        statement="The best columns of the cosine basis hold nearly as much of a language model's gradients as the "
        "leading singular vectors do, and more than those of any orthogonal basis would.",
        threshold="Relative error of the projection at r/n of 1/16, 1/8, 1/4 and 1/2, mean over the four ranks, the "
        "hidden matrices of a GPT and every 25th step of its training; paired over seeds, 95 % intervals; columns "
        "chosen by 2-norm. Held if for DCT-II or DCT-III the interval of the difference to the SVD ends at or below 0.1 "
        "and that to a random basis below 0; not held if for both the former begins above 0.1 or the latter above "
        "−0.01; else inconclusive.",
        expected="the transform is presented as a natural approximation of the gradient's eigenbasis; no errors are "
        "known here",
        scales=("smoke", "cpu", "gpu"),
        run=_projection_quality,
    ),
    Claim(
        name="loss-parity",
        statement="DCT-AdamW ends with the loss of AdamW projected by an SVD at equal rank.",
        threshold="All tuned with the same budget, rank a quarter of each matrix's shorter side. Held if the 95 % "
        "interval of the paired difference of test loss ends at or below +1 % against both an SVD at every step and one "
        "at every 200th; not held if against either it begins above +1 %; else inconclusive.",
        expected="matches SVD and QR projections in pre-training and fine-tuning",
        scales=("smoke", "cpu", "gpu"),
        run=_loss_parity,
    ),
    Claim(
        name="faster-than-svd",
        statement="A step of DCT-AdamW is faster than one of AdamW projected by an SVD at equal rank.",
        threshold="Ratio of step times, SVD over DCT, at one thread, 95 % interval of the mean logarithm over rounds, "
        "with a new subspace at every step and at every 200th (amortised). Held if both intervals lie above 1; not "
        "held if either lies below 1; else inconclusive.",
        expected="lower run time than SVD- and QR-based methods; no figures are known here",
        scales=("smoke", "cpu", "gpu"),
        run=_faster_than_svd,
    ),
    Claim(
        name="rank-free-time",
        statement="The time of a step does not depend on the rank.",
        threshold="Step time at the largest rank (half the shorter side of most matrices) over that at the smallest (a "
        "sixteenth), one thread, 95 % interval of the mean logarithm over rounds. Held if it lies below 1.1; not held "
        "if above 1.1; else inconclusive.",
        expected="run time independent of the rank",
        scales=("smoke", "cpu", "gpu"),
        run=_rank_free,
    ),
)
