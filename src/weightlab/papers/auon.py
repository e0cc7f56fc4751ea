"""AuON: A Linear-time Alternative to Semi-Orthogonal Momentum Updates (arXiv 2509.24320)."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightlab.exceptions import TrialError
from weightlab.papers import trials
from weightlab.papers.figure import rounded
from weightlab.papers.schema import Claim, ClaimContext, ClaimResult, Paper, Scale, Verdict

if TYPE_CHECKING:
    from weightlab.tasks.base import Task

PAPER = Paper(
    number=9,
    slug="auon",
    title="AuON: A Linear-time Alternative to Semi-Orthogonal Momentum Updates",
    authors=("Dipan Maity",),
    author_count=1,
    date="2025-09-29",
    arxiv="2509.24320",
    code=("ryyzn9/AuON",),
    summary=(
        "Muon orthogonalises the momentum matrix with Newton-Schulz iterations, at a cost that is cubic "
        "in the side of the matrix. AuON asks whether a bounded update is enough: it divides the momentum "
        "by its Frobenius norm and by the root-mean-square of the hyperbolic cosine of its entries, a "
        "scalar meant to act as an emergency brake on heavy tails, at a cost linear in the number of "
        "entries. A hybrid first runs one or more Newton-Schulz steps. The first version reports losses "
        "behind AdamW for AuON alone and close to Muon for the hybrid; later versions claim a hybrid "
        "ahead of Muon. Two published forms differ: the first version normalises the update, the current "
        "official code divides the momentum itself and so is linear in the gradient. Worked out, the cosh "
        "scalar is 1 + O(1/N) for any tensor of N entries, so the first form is normalised SGD with "
        "momentum, the second is Nesterov SGD on an exponential average, the hybrid is Muon without its "
        "rescaling, and none of them changes the conditioning of the update."
    ),
    room="optim",
    parts=("optim.AuON", "optim.HybridAuON"),
    keywords=("optimizer", "momentum", "normalized sgd", "cosh", "one buffer", "low memory", "Newton-Schulz"),
)


@dataclass(frozen=True)
class _Size:
    """What a scale costs: how long, how often, how large."""

    seeds: int
    tune: int
    steps: dict[str, int | None]
    rates: dict[str, tuple[float, ...]]
    eval_points: int
    rounds: int
    auon_sides: tuple[int, ...]
    newton_schulz_sides: tuple[int, ...]
    draws: int
    outlier_step: int


SIZES: dict[Scale, _Size] = {
    "smoke": _Size(
        seeds=2,
        tune=1,
        steps={"digits-mlp": 20, "docs-gpt": 6},
        rates={"digits-mlp": (3e-3,), "docs-gpt": (3e-3,)},
        eval_points=2,
        rounds=3,
        auon_sides=(256, 512, 1024),
        newton_schulz_sides=(64, 128, 256),
        draws=2,
        outlier_step=20,
    ),
    "cpu": _Size(
        seeds=5,
        tune=6,
        steps={"digits-mlp": None, "docs-gpt": None},
        rates={"digits-mlp": (1e-3, 3e-3, 1e-2), "docs-gpt": (3e-3,)},
        eval_points=10,
        rounds=5,
        auon_sides=(1024, 1448, 2048, 2896, 4096),
        newton_schulz_sides=(256, 362, 512, 724, 1024),
        draws=10,
        outlier_step=100,
    ),
    "gpu": _Size(
        seeds=5,
        tune=6,
        steps={"digits-mlp": None, "docs-gpt": None},
        rates={"digits-mlp": (1e-3, 3e-3, 1e-2), "docs-gpt": (3e-3,)},
        eval_points=10,
        rounds=5,
        auon_sides=(4096, 5792, 8192, 11584, 16384),
        newton_schulz_sides=(4096, 5792, 8192, 11584),
        draws=10,
        outlier_step=100,
    ),
}
EQUAL = 0.01
COMPARABLE = 0.05
BETWEEN_SQUARE_AND_CUBE = 2.5
BRAKES, DOES_NOT_BRAKE = 0.9, 0.99
OUTLIER = 1000.0


def _by_loss(name: str) -> Task:
    """Return a built-in task judged by its test loss, which moves with changes too small for its error."""
    from weightlab import tasks

    task = copy.copy(tasks.get(name))
    task.metric, task.mode, task.name = "loss", "min", f"{name}, by loss"
    return task


def _cosh_matters(ctx: ClaimContext) -> ClaimResult:
    from weightlab.trial import registry

    size = SIZES[ctx.scale]
    with_cosh, without = registry.arm("auon"), registry.arm("normalized-sgd")
    if dict(with_cosh.defaults) != dict(without.defaults):
        raise TrialError(f"auon and normalized-sgd differ in more than the cosh factor: {with_cosh.defaults}")
    cells: dict[str, tuple[list[float], float]] = {}
    figure, cost = None, 0.0
    for index, (name, rates) in enumerate(size.rates.items()):
        arms = [
            replace(
                arm,
                name=f"{arm.name}, lr {rate:g}",
                search_space={},
                defaults={**arm.defaults, "lr": rate},
            )
            for rate in rates
            for arm in (without, with_cosh)
        ]
        report = trials.run_trial(
            ctx,
            _by_loss(name),
            arms,
            tune=0,
            seeds=size.seeds,
            steps=size.steps[name],
            eval_points=size.eval_points,
            span=(index / len(size.rates), (index + 1) / len(size.rates)),
        )
        for rate in rates:
            plain, braked = (
                [run.score for run in report.arm(f"{arm.name}, lr {rate:g}").runs]
                for arm in (without, with_cosh)
            )
            differences = [b - p for b, p in zip(braked, plain, strict=True)]
            cells[f"{name}, lr {rate:g}"] = differences, sum(plain) / len(plain)
        cost += report.seconds
        figure = trials.curves(report, f"{name}: with and without the cosh factor")
    verdict, table = judge_cosh(cells)
    worst = max(table, key=lambda row: abs(row["difference"] / row["loss without"]))
    share = worst["difference"] / worst["loss without"]
    return ClaimResult(
        verdict=verdict,
        measured=f"of {len(cells)} settings the test loss changes most on {worst['setting']}: by "
        f"{100 * share:+.2g} % ({worst['difference']:+.2g} nats, 95 % interval {worst['low']:+.2g} to {worst['high']:+.2g}).",
        value=share,
        interval=(worst["low"] / worst["loss without"], worst["high"] / worst["loss without"]),
        figure=figure,
        table=table,
        cost=cost,
        seeds=range(size.seeds),
    )


def judge_cosh(cells: Mapping[str, tuple[Sequence[float], float]]) -> tuple[Verdict, list[dict[str, Any]]]:
    """Judge paired differences of loss in several settings: setting -> (differences, loss without cosh).

    Whether any setting differs is tested at 95 % over all of them (Bonferroni); that all agree needs no
    correction, since every single one must.
    """
    from weightlab.trial.statistics import PairedMean

    table: list[dict[str, Any]] = []
    differ, agree = False, True
    for setting, (differences, loss) in cells.items():
        estimate = PairedMean(differences)
        low, high = estimate.interval(0.95)
        strict_low, strict_high = estimate.interval(1 - 0.05 / len(cells))
        margin = EQUAL * loss
        differ |= strict_low > margin or strict_high < -margin
        agree &= -margin < low and high < margin
        table.append(
            {
                "setting": setting,
                "loss without": loss,
                "difference": estimate.mean,
                "low": low,
                "high": high,
            }
        )
    return "held" if differ else "not held" if agree else "inconclusive", table


def _comparable_to_adamw(ctx: ClaimContext) -> ClaimResult:
    size = SIZES[ctx.scale]
    arms = {
        "digits-mlp": ["adamw", "auon", "auon-hybrid-1", "muon"],
        "docs-gpt": ["adamw", "auon"],
    }
    spans = {"digits-mlp": (0.0, 0.2), "docs-gpt": (0.2, 1.0)}
    table: list[dict[str, Any]] = []
    cells: dict[str, tuple[float, float, float, float]] = {}
    figure, cost = None, 0.0
    for name, names in arms.items():
        report = trials.run_trial(
            ctx,
            _by_loss(name) if name == "digits-mlp" else name,
            names,
            baseline="adamw",
            tune=size.tune,
            seeds=size.seeds,
            steps=size.steps[name],
            eval_points=size.eval_points,
            span=spans[name],
        )
        loss = report.arm("adamw").mean
        for arm in report.arms:
            low, high = arm.versus.interval if arm.versus else (0.0, 0.0)
            table.append(
                {
                    "task": name,
                    "arm": arm.name,
                    "test loss": arm.mean,
                    "ratio to adamw": arm.mean / loss,
                    "low": 1 + low / loss,
                    "high": 1 + high / loss,
                    "ms a step": arm.step_ms,
                    "tuned": ", ".join(f"{key} {value:.2g}" for key, value in arm.hyperparameters.items()),
                    "at an edge": "; ".join(arm.edges),
                }
            )
            if arm.name == "auon":
                cells[name] = loss, arm.mean - loss, low, high
        cost += report.seconds
        figure = trials.curves(report)
    ratios = {name: 1 + difference / loss for name, (loss, difference, _, _) in cells.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    loss, _, low, high = cells[worst]
    return ClaimResult(
        verdict=judge_comparable(cells.values()),
        measured="test loss over AdamW's: "
        + ", ".join(
            f"{ratios[name]:.3f} ({1 + low / loss:.3f} to {1 + high / loss:.3f}) on {name}"
            for name, (loss, _, low, high) in cells.items()
        )
        + ".",
        value=ratios[worst],
        interval=(1 + low / loss, 1 + high / loss),
        figure=figure,
        table=table,
        cost=cost,
        seeds=range(size.seeds),
    )


def judge_comparable(cells: Iterable[tuple[float, float, float, float]]) -> Verdict:
    """Judge (AdamW's loss, difference, low end, high end of its interval) of each task."""
    cells = list(cells)
    if all(high <= COMPARABLE * loss for loss, _, _, high in cells):
        return "held"
    return "not held" if any(low > COMPARABLE * loss for loss, _, low, _ in cells) else "inconclusive"


def _linear_time(ctx: ClaimContext) -> ClaimResult:
    import torch

    size = SIZES[ctx.scale]
    kinds = {"AuON": (0, size.auon_sides), "Newton-Schulz": (5, size.newton_schulz_sides)}
    # One round times every size of both once, so that a slow spell of the machine hits all alike.
    times: dict[str, list[list[float]]] = {name: [] for name in kinds}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for index in range(size.rounds):
            for name, (steps, sides) in kinds.items():
                ctx.progress(index / size.rounds, f"round {index + 1} of {size.rounds}: {name}")
                times[name].append([_step_seconds(side, steps, ctx.device) for side in sides])
    finally:
        torch.set_num_threads(threads)
    slopes = {name: slope(kinds[name][1], times[name]) for name in kinds}
    (auon, low, high), (cubic, cubic_low, cubic_high) = slopes.values()
    if high < BETWEEN_SQUARE_AND_CUBE < cubic_low:
        verdict: Verdict = "held"
    else:
        verdict = "not held" if low > BETWEEN_SQUARE_AND_CUBE else "inconclusive"
    table = [
        {"step": name, "side": side, "ms": 1000 * statistics.median(column)}
        for name, (_, sides) in kinds.items()
        for side, column in zip(sides, zip(*times[name], strict=True), strict=True)
    ]
    series = [
        {
            "name": name,
            "x": list(sides),
            "y": rounded(1000 * statistics.median(column) for column in zip(*times[name], strict=True)),
            "low": rounded(1000 * min(column) for column in zip(*times[name], strict=True)),
            "high": rounded(1000 * max(column) for column in zip(*times[name], strict=True)),
        }
        for name, (_, sides) in kinds.items()
    ]
    return ClaimResult(
        verdict=verdict,
        measured=f"step time grows with the side to the power {auon:.2f} ({low:.2f} to {high:.2f}) for AuON, "
        f"{cubic:.2f} ({cubic_low:.2f} to {cubic_high:.2f}) for Newton-Schulz.",
        value=auon,
        interval=(low, high),
        figure={
            "title": "Time of one step on a square matrix",
            "x_label": "side",
            "y_label": "ms",
            "log_x": True,
            "log_y": True,
            "series": series,
        },
        table=table,
    )


def _step_seconds(side: int, ns_steps: int, device: str) -> float:
    import torch

    from weightlab.optim import AuON

    generator = torch.Generator(device).manual_seed(side)
    weight = torch.nn.Parameter(torch.zeros(side, side, device=device))
    weight.grad = torch.randn(side, side, device=device, generator=generator)
    optimizer = AuON([weight], lr=0.02, ns_steps=ns_steps)

    def seconds(repeats: int) -> float:
        if weight.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            optimizer.step()
        if weight.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    seconds(1)
    once = seconds(1)
    repeats = max(1, min(100, round(0.05 / once)))
    return min(seconds(repeats) for _ in range(3)) if once < 0.2 else once


def slope(sides: Sequence[int], rounds: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Fit log time against log side in each round; return the mean slope and its 95 % t interval."""
    from scipy.stats import t

    fitted = [
        statistics.linear_regression(list(map(math.log, sides)), list(map(math.log, times))).slope
        for times in rounds
    ]
    mean, spread = statistics.fmean(fitted), statistics.stdev(fitted)
    half = float(t.ppf(0.975, len(fitted) - 1)) * spread / math.sqrt(len(fitted))
    return mean, mean - half, mean + half


def _emergency_brake(ctx: ClaimContext) -> ClaimResult:
    size = SIZES[ctx.scale]
    forms: dict[str, dict[str, Any]] = {
        "paper": {"lr": 3e-3, "gamma": 1.0, "normalize": True, "adjust_lr": "match_rms_adamw"},
        "code": {"lr": 0.24, "gamma": 1.5, "normalize": False},
    }
    table: list[dict[str, Any]] = []
    series: list[dict[str, Any]] = []
    verdicts = {}
    for index, (form, options) in enumerate(forms.items()):
        ratios: list[float] = []
        growths: list[float] = []
        for seed in range(size.draws):
            ctx.progress((index + seed / size.draws) / len(forms), f"{form} form, seed {seed}")
            braked, free = _norms_around_outlier(options, seed, size.outlier_step, ctx.device)
            ratios.append(braked[size.outlier_step - 1] / free[size.outlier_step - 1])
            growths.append(braked[size.outlier_step - 1] / braked[size.outlier_step - 2])
            if seed == 0:
                steps = list(range(1, len(braked) + 1))
                series.append({"name": f"{form} form", "x": steps, "y": rounded(braked)})
                series.append({"name": f"{form} form, no cosh", "x": steps, "y": rounded(free)})
        mean, low, high = _mean_interval(ratios)
        verdicts[form] = low, high
        table.append(
            {
                "form": form,
                "update norm, outlier step over step before": statistics.fmean(growths),
                "update norm, with cosh over without": mean,
                "low": low,
                "high": high,
            }
        )
    strongest = min(table, key=lambda row: row["update norm, with cosh over without"])
    reductions = {row["form"]: 1 - row["update norm, with cosh over without"] for row in table}
    growth = {row["form"]: row["update norm, outlier step over step before"] for row in table}
    return ClaimResult(
        verdict=judge_brake(verdicts.values()),
        measured="a row of the gradient times 1000 makes the update "
        + " and ".join(f"{growth[form]:.3g} times as large in the {form} form" for form in forms)
        + "; of that the cosh factor takes away "
        + " and ".join(f"{reductions[form]:.1e}" for form in forms)
        + " as a share.",
        value=strongest["update norm, with cosh over without"],
        interval=(strongest["low"], strongest["high"]),
        figure={
            "title": "Update norm around an outlier in the gradient (seed 0)",
            "x_label": "training step",
            "y_label": "norm of the update",
            "log_x": False,
            "log_y": True,
            "series": series,
        },
        table=table,
        seeds=range(size.draws),
    )


def judge_brake(intervals: Iterable[tuple[float, float]]) -> Verdict:
    """Judge the intervals of (update norm with cosh) / (without), one for each form."""
    intervals = list(intervals)
    if any(high < BRAKES for _, high in intervals):
        return "held"
    return "not held" if all(low > DOES_NOT_BRAKE for low, _ in intervals) else "inconclusive"


def _mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    from weightlab.trial.statistics import PairedMean

    estimate = PairedMean(values)
    return estimate.mean, *estimate.interval(0.95)


def _norms_around_outlier(
    options: Mapping[str, Any], seed: int, outlier_step: int, device: str
) -> tuple[list[float], list[float]]:
    """Train the digits' perceptron; return norms of its largest matrix's updates with and without cosh.

    At `outlier_step` the row with the largest gradient is multiplied by `OUTLIER`. Just before, the run
    without cosh branches off from the same weights and momentum; ten more steps follow.
    """
    import torch

    from weightlab import tasks
    from weightlab.optim import AuON

    task = tasks.get("digits-mlp")
    generator = torch.Generator().manual_seed(seed)
    model = task.build(generator).to(device)
    optimizer = AuON(model.parameters(), momentum=0.95, **options)
    runs = [(model, optimizer, [])]
    step = 0
    while step < outlier_step + 10:
        for batch in task.batches("train", generator):
            step += 1
            if step == outlier_step:
                twin = copy.deepcopy(model)
                other = AuON(twin.parameters(), momentum=0.95, **options)
                other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                for group in other.param_groups:
                    group["gamma"] = 0.0
                runs.append((twin, other, list(runs[0][2])))
            moved = tuple(part.to(device) for part in batch)
            for net, updates, norms in runs:
                updates.zero_grad()
                task.loss(net, moved).backward()
                weight = max((p for p in net.parameters() if p.ndim == 2), key=torch.numel)
                if step == outlier_step and weight.grad is not None:
                    row = weight.grad.norm(dim=1).argmax()
                    weight.grad[row] *= OUTLIER
                before = weight.detach().clone()
                updates.step()
                norms.append(float((weight.detach() - before).norm()))
            if step == outlier_step + 10:
                break
    return runs[0][2], runs[1][2]


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="cosh-matters",
        statement="The cosh factor, which sets AuON apart from normalised SGD with momentum, changes what training "
        "arrives at.",
        threshold="Paired differences of test loss at equal learning rate and seed, AuON minus the same without "
        "cosh. Held if in any setting the interval, at 95 % over all settings together (Bonferroni), lies outside "
        "±1 % of the loss without cosh; not held if in every setting the 95 % interval lies inside ±1 %; else "
        "inconclusive.",
        expected="presented as what makes bounded updates work; no figure for the factor by itself is known",
        run=_cosh_matters,
    ),
    Claim(
        name="comparable-to-adamw",
        statement="AuON without Newton-Schulz steps ends comparable to AdamW: within 5 % of its final loss.",
        threshold="Both tuned with the same budget, on digits and on text, by test loss. Held if on both tasks the "
        "95 % interval of the paired difference ends at or below +5 % of AdamW's mean loss; not held if on either "
        "it lies wholly above; else inconclusive.",
        expected="the abstract says comparable; its own table has loss 0.4305 against AdamW's 0.0686 after 6,000 "
        "steps of a 40.9 M language model, and CIFAR-10 accuracy 73.3 against 76.0 % (batch 32), 76.22 against "
        "76.32 % (batch 128)",
        run=_comparable_to_adamw,
    ),
    Claim(
        name="linear-time",
        statement="A step of AuON takes time linear in the number of entries, so with the square of a matrix's side; "
        "a Newton-Schulz step takes time with its cube.",
        threshold="Slope of log step time against log side, 95 % t interval over rounds, on sides large enough for "
        "arithmetic to outweigh the cost of calls. Held if AuON's interval lies below 2.5 and that of five "
        "Newton-Schulz steps above 2.5; not held if AuON's lies above 2.5; else inconclusive.",
        expected="as fast as AdamW in its table: 1,919 s for both, 2,304 s for Muon",
        scales=("smoke", "cpu", "gpu"),
        run=_linear_time,
    ),
    Claim(
        name="emergency-brake",
        statement="When a gradient explodes, the cosh factor brakes the update.",
        threshold="One row of a gradient is multiplied by 1,000 in mid-training; the norm of that step's update is "
        "divided by the norm without the cosh factor, from the same weights and momentum. Held if in either "
        "published form the 95 % interval of the mean ratio lies below 0.9; not held if in both it lies above "
        "0.99; else inconclusive.",
        expected="later versions claim an automatic brake on exploding attention logits; no figures are known here",
        run=_emergency_brake,
    ),
)
