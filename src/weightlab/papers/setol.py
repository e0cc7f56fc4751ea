"""SETOL: A Semi-Empirical Theory of (Deep) Learning (arXiv 2507.17912)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightlab.papers.figure import rounded
from weightlab.papers.schema import Claim, ClaimContext, ClaimResult, Paper, Scale, Verdict

if TYPE_CHECKING:
    from weightlab.papers._setol_task import FloatArray

PAPER = Paper(
    number=28,
    slug="setol",
    title="SETOL: A Semi-Empirical Theory of (Deep) Learning",
    authors=("C. H. Martin", "C. Hinrichs"),
    author_count=2,
    date="2025-07",
    arxiv="2507.17912",
    code=(
        "CalculatedContent/setol_paper",
        "charlesmartin14/SETOL_experiments",
        "CalculatedContent/WeightWatcher",
    ),
    summary=(
        "Each weight matrix of a trained network is read through the eigenvalues of its correlation "
        "matrix. Well-trained layers show a power-law tail, whose exponent, alone or scaled by the "
        "largest eigenvalue, is claimed to predict quality without any data. SETOL derives both measures "
        "from a matrix student-teacher model and adds a condition without a fit: the eigenvalues of the "
        "tail that carries generalisation multiply to one. An ideal layer has exponent two, and both "
        "tails coincide there. The derivation is semi-empirical: its formulas are formal, and simpler "
        "measures such as the norm can rank models as well, so they belong beside it in any test; across "
        "networks of different depth the plain exponent need not follow test error. The reference tool "
        "multiplies eigenvalues directly and under- or overflows for wide layers, which a computation "
        "with logarithms avoids."
    ),
    room="inspect",
    parts=("inspect.esd", "inspect.fit_power_law", "inspect.erg_count", "inspect.layer_report"),
    keywords=(
        "power law",
        "heavy tails",
        "spectral density",
        "weightwatcher",
        "alpha",
        "random matrix",
        "layer quality",
    ),
)

# The paper's factors 1 to 32 on its rate, and how far the rate is pushed beyond.
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
PUSHED = (2.3e-2, 3.2e-2, 4.5e-2, 6.4e-2)
LAYERS = ("FC1", "FC2")
RIVALS = ("log norm", "log spectral norm", "distance from start")
TRACKS = 0.5
AS_GOOD = 0.1
TELLS = 0.3
JUMP = 0.005
FAILED = 0.5
MISCOUNT = 0.01
# Test errors in percent, as published with the checkpoints.
RESNETS = {"resnet20": 8.27, "resnet32": 7.37, "resnet56": 6.61}


@dataclass(frozen=True)
class _Size:
    """What a scale costs.

    Attributes:
        rates: Learning rates to judge by.
        pushed: Larger ones.
        seeds: Networks at each.
        epochs: Of training.
        widths: Eigenvalues of random layers, and how many times longer their other side is.
    """

    rates: tuple[float, ...]
    pushed: tuple[float, ...]
    seeds: int
    epochs: int
    widths: tuple[tuple[int, int], ...]


SIZES: dict[Scale, _Size] = {
    "smoke": _Size(RATES[1::2], PUSHED[1::2], seeds=2, epochs=1, widths=((256, 1), (4096, 1))),
    "cpu": _Size(
        RATES,
        PUSHED,
        seeds=12,
        epochs=40,
        widths=((512, 1), (1024, 1), (2048, 1), (4096, 1), (8192, 1), (4096, 4), (8192, 4)),
    ),
}


@dataclass(frozen=True)
class _Networks:
    """Networks for every seed and learning rate.

    Attributes:
        rates: Learning rates, those beyond the ones to judge by at the end.
        errors: Share of test images that are classified wrongly, (seeds, rates).
        measures: Layer -> measure -> numbers, (seeds, rates).
    """

    rates: tuple[float, ...]
    errors: FloatArray
    measures: Mapping[str, Mapping[str, FloatArray]]


# Five claims are judged by the same networks, trained once a process.
_networks: dict[Scale, _Networks] = {}


def _trained(ctx: ClaimContext) -> _Networks:
    if ctx.scale not in _networks:
        from weightlab.papers._setol_task import measure, train

        size = SIZES[ctx.scale]
        rates = size.rates + size.pushed
        count = len(rates) * size.seeds
        starts, ends, errors = train(
            rates,
            range(size.seeds),
            size.epochs,
            lambda done: ctx.progress(0.9 * done, f"training {count} networks"),
        )
        ctx.progress(0.9, "reading their layers")
        pairs = zip(LAYERS, starts, ends, strict=False)
        measures = {layer: measure(start, end) for layer, start, end in pairs}
        _networks[ctx.scale] = _Networks(rates, errors, measures)
    return _networks[ctx.scale]


def _mean(values: Sequence[float] | FloatArray) -> tuple[float, float, float]:
    """Mean over seeds with its 95 % interval."""
    from weightlab.trial.statistics import PairedMean

    estimate = PairedMean([float(value) for value in values])
    return estimate.mean, *estimate.interval(0.95)


def _ranked(a: FloatArray, b: FloatArray) -> list[float]:
    """Kendall's τ over the rates, for each seed."""
    from weightlab.papers._setol_task import kendall

    return [kendall(x, y) for x, y in zip(a, b, strict=True)]


def _both(verdicts: Sequence[Verdict]) -> Verdict:
    if "not held" in verdicts:
        return "not held"
    return "held" if all(verdict == "held" for verdict in verdicts) else "inconclusive"


def judge_above(values: Sequence[float], threshold: float) -> Verdict:
    """Judge by the 95 % interval of the mean over seeds."""
    _, low, high = _mean(values)
    return "held" if low > threshold else "not held" if high < threshold else "inconclusive"


def judge_rivals(alpha: Sequence[float], rivals: Mapping[str, Sequence[float]]) -> Verdict:
    """Judge α's τ against the size of each rival's, by seed."""
    leads = [
        _mean([mine - abs(other) for mine, other in zip(alpha, others, strict=True)])
        for others in rivals.values()
    ]
    if all(low > 0 for _, low, _ in leads):
        return "held"
    return "not held" if any(high < AS_GOOD for _, _, high in leads) else "inconclusive"


def judge_at_one_rate(taus: Sequence[float]) -> Verdict:
    """Judge τ over the networks of one rate, by rate."""
    _, low, high = _mean(taus)
    return "held" if low > 0 else "not held" if high < TELLS else "inconclusive"


def crossing(alphas: FloatArray, errors: FloatArray) -> int | None:
    """Return the first rate at which the mean α is under 2, among those at which all networks learned.

    None if there is none, or if it is the very first rate.
    """
    for rate in range(alphas.shape[1]):
        if (errors[:, rate] > FAILED).any():
            return None
        if float(alphas[:, rate].mean()) < 2:
            return rate or None
    return None


def _tracks(ctx: ClaimContext) -> ClaimResult:
    from weightlab.papers._setol_task import kendall

    networks = _trained(ctx)
    judged = slice(0, len(SIZES[ctx.scale].rates))
    errors = networks.errors[:, judged]
    table, taus = [], {}
    for layer, measures in networks.measures.items():
        for name in ("alpha", *RIVALS, "tail", "gap", "alpha at the start"):
            found = measures[name][:, judged]
            values = _ranked(found, errors)
            if name == "alpha":
                taus[layer] = values
            mean, low, high = _mean(values)
            pooled = kendall(found.ravel(), errors.ravel())
            table.append(
                {"layer": layer, "measure": name, "tau": mean, "low": low, "high": high, "pooled": pooled}
            )
    means = {layer: _mean(values) for layer, values in taus.items()}
    first = means[LAYERS[0]]
    series = [
        _band(f"α of {layer}", networks.rates[judged], measures["alpha"][:, judged])
        for layer, measures in networks.measures.items()
    ]
    return ClaimResult(
        verdict=_both([judge_above(values, TRACKS) for values in taus.values()]),
        measured="Kendall's τ between α and test error over learning rates is "
        + " and ".join(
            f"{mean:.2f} ({low:.2f} to {high:.2f}) for {layer}" for layer, (mean, low, high) in means.items()
        )
        + f"; the error falls from {100 * errors[:, 0].mean():.1f} % to {100 * errors[:, -1].mean():.1f} %.",
        value=first[0],
        interval=first[1:],
        figure={
            "title": "Exponents and test error by learning rate",
            "x_label": "learning rate",
            "y_label": "α; error in %",
            "log_x": True,
            "log_y": False,
            "series": [*series, _band("test error in %", networks.rates[judged], 100 * errors)],
        },
        table=table,
        seeds=range(len(errors)),
    )


def _band(name: str, x: Sequence[float], values: FloatArray) -> dict[str, Any]:
    means, lows, highs = zip(*map(_mean, values.T), strict=True)
    return {"name": name, "x": list(x), "y": rounded(means), "low": rounded(lows), "high": rounded(highs)}


def _rivals(ctx: ClaimContext) -> ClaimResult:
    networks = _trained(ctx)
    judged = slice(0, len(SIZES[ctx.scale].rates))
    errors = networks.errors[:, judged]
    verdicts, table = [], []
    for layer, measures in networks.measures.items():
        alpha = _ranked(measures["alpha"][:, judged], errors)
        others = {name: _ranked(measures[name][:, judged], errors) for name in RIVALS}
        verdicts.append(judge_rivals(alpha, others))
        for name, values in others.items():
            lead, low, high = _mean([mine - abs(other) for mine, other in zip(alpha, values, strict=True)])
            table.append({"layer": layer, "rival": name, "lead": lead, "low": low, "high": high})
    strongest = min(table, key=lambda row: row["high"])
    return ClaimResult(
        verdict=_both(verdicts),
        measured=f"τ of α is ahead of the size of τ of its strongest rival, {strongest['rival']} of "
        f"{strongest['layer']}, by {strongest['lead']:.2f} ({strongest['low']:.2f} to {strongest['high']:.2f}).",
        value=strongest["lead"],
        interval=(strongest["low"], strongest["high"]),
        table=table,
        seeds=range(len(errors)),
    )


def _at_one_rate(ctx: ClaimContext) -> ClaimResult:
    networks = _trained(ctx)
    judged = slice(0, len(SIZES[ctx.scale].rates))
    errors = networks.errors[:, judged].T
    table, taus = [], {}
    for layer, measures in networks.measures.items():
        for name in ("alpha", *RIVALS, "gap", "alpha at the start"):
            values = _ranked(measures[name][:, judged].T, errors)
            if name == "alpha":
                taus[layer] = values
            mean, low, high = _mean(values)
            table.append({"layer": layer, "measure": name, "tau": mean, "low": low, "high": high})
    means = {layer: _mean(values) for layer, values in taus.items()}
    first = means[LAYERS[0]]
    return ClaimResult(
        verdict=_both([judge_at_one_rate(values) for values in taus.values()]),
        measured=f"Kendall's τ between α and test error over {errors.shape[1]} networks of one learning rate is "
        + " and ".join(
            f"{mean:.2f} ({low:.2f} to {high:.2f}) for {layer}" for layer, (mean, low, high) in means.items()
        )
        + ", mean over rates.",
        value=first[0],
        interval=first[1:],
        table=table,
        seeds=range(errors.shape[1]),
    )


def _gap(ctx: ClaimContext) -> ClaimResult:
    import numpy as np

    networks = _trained(ctx)
    judged = slice(0, len(SIZES[ctx.scale].rates))
    taus, table, series = {}, [], []
    for layer, measures in networks.measures.items():
        alpha, gap = measures["alpha"][:, judged], measures["gap"][:, judged]
        taus[layer] = _ranked(alpha, np.abs(gap))
        series.append(_band(layer, rounded(alpha.mean(0)), gap))
        for index, rate in enumerate(networks.rates[judged]):
            tail = float(measures["tail"][:, index].mean())
            row = {"layer": layer, "learning rate": rate, "alpha": float(alpha[:, index].mean())}
            mean, low, high = _mean(gap[:, index])
            table.append({**row, "tail": tail, "gap": mean, "low": low, "high": high})
    means = {layer: _mean(values) for layer, values in taus.items()}
    first = means[LAYERS[0]]
    ends = [row for row in table if row["layer"] == LAYERS[0]]
    return ClaimResult(
        verdict=_both([judge_above(values, TRACKS) for values in taus.values()]),
        measured="Kendall's τ between α and the size of the gap is "
        + " and ".join(
            f"{mean:.2f} ({low:.2f} to {high:.2f}) for {layer}" for layer, (mean, low, high) in means.items()
        )
        + f"; in {LAYERS[0]} the gap goes from {ends[0]['gap']:.0f} at α {ends[0]['alpha']:.2f} to "
        f"{ends[-1]['gap']:.0f} at α {ends[-1]['alpha']:.2f}.",
        value=first[0],
        interval=first[1:],
        figure={
            "title": "ERG gap by exponent, for each learning rate",
            "x_label": "mean α",
            "y_label": "ERG count less eigenvalues in the tail",
            "log_x": False,
            "log_y": False,
            "series": series,
        },
        table=table,
        seeds=range(len(networks.errors)),
    )


def _reversal(ctx: ClaimContext) -> ClaimResult:
    networks = _trained(ctx)
    alphas, errors = networks.measures[LAYERS[0]]["alpha"], networks.errors
    table = []
    for index, rate in enumerate(networks.rates):
        error, low, high = _mean(errors[:, index])
        alpha = float(alphas[:, index].mean())
        learned = int((errors[:, index] <= FAILED).sum())
        row = {"learning rate": rate, "alpha": alpha, "error": error, "low": low, "high": high}
        table.append({**row, "learned": learned})
    crossed = crossing(alphas, errors)
    if crossed is None:
        lowest = min((row["alpha"] for row in table if row["learned"] == len(errors)), default=math.nan)
        return ClaimResult(
            verdict="not held",
            measured=f"the mean α of {LAYERS[0]} is {lowest:.2f} at the least, where all networks learn.",
            table=table,
            seeds=range(len(errors)),
        )
    rises = errors[:, crossed] - errors[:, crossed - 1]
    mean, low, high = _mean(rises)
    return ClaimResult(
        verdict=judge_above(rises.tolist(), JUMP),
        measured=f"from learning rate {networks.rates[crossed - 1]:g} to {networks.rates[crossed]:g} the mean α of "
        f"{LAYERS[0]} falls from {alphas[:, crossed - 1].mean():.2f} to {alphas[:, crossed].mean():.2f}, and the test "
        f"error changes by {100 * mean:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}).",
        value=mean,
        interval=(low, high),
        figure={
            "title": f"Test error by α of {LAYERS[0]}",
            "x_label": "learning rate",
            "y_label": "α; error in %",
            "log_x": True,
            "log_y": False,
            "series": [
                {
                    "name": name,
                    "x": [row["learning rate"] for row in table if row["learned"] == len(errors)],
                    "y": rounded(factor * row[key] for row in table if row["learned"] == len(errors)),
                }
                for name, key, factor in (("α", "alpha", 1), ("test error in %", "error", 100))
            ],
        },
        table=table,
        seeds=range(len(errors)),
    )


def _pretrained(ctx: ClaimContext) -> ClaimResult:
    import numpy as np

    from weightlab.exceptions import TaskError
    from weightlab.inspect import layer_report
    from weightlab.papers._setol_task import kendall
    from weightlab.tasks.data import model_file

    columns = ("alpha", "alpha_hat", "log_norm", "log_spectral_norm", "erg_gap")
    rows: list[dict[str, Any]] = []
    try:
        for index, (name, error) in enumerate(RESNETS.items()):
            ctx.progress(index / len(RESNETS), f"reading {name}")
            report = layer_report(model_file(f"akamaster/{name}-cifar10"))
            uncertain = len(report.flags.get("uncertain", ()))
            facts = {"network": name, "error in %": error, "layers": len(report.rows), "uncertain": uncertain}
            rows.append({**facts, **{column: report.summary[column] for column in columns}})
    except TaskError as missing:
        return ClaimResult(
            verdict="inconclusive",
            measured=f"not measured, because the trained networks are not at hand: {missing}",
        )
    errors = np.array([row["error in %"] for row in rows])
    taus = {column: kendall(np.array([row[column] for row in rows]), errors) for column in columns}
    ranks = {"network": "τ with the error", "error in %": 1.0, "layers": None, "uncertain": None, **taus}
    return ClaimResult(
        verdict="not held" if taus["alpha"] < 1 else "inconclusive",
        measured="Kendall's τ with the test error is "
        + ", ".join(f"{tau:.2f} for {column}" for column, tau in taus.items())
        + f", over {len(rows)} networks.",
        value=taus["alpha"],
        table=[*rows, ranks],
    )


def _logarithms(ctx: ClaimContext) -> ClaimResult:
    import torch

    from weightlab.inspect import erg_count
    from weightlab.papers._setol_task import count_by_products, gaussian_spectrum

    table = []
    widths = SIZES[ctx.scale].widths
    for index, (n, aspect) in enumerate(widths):
        ctx.progress(index / len(widths), f"a random layer of width {n}")
        evals = gaussian_spectrum(n, aspect, seed=n + aspect)
        exact, multiplied = erg_count(torch.from_numpy(evals)).k, count_by_products(evals)
        table.append(
            {"width": n, "aspect": aspect, "by logarithms": exact, "by products": multiplied}
            | {"off by": multiplied / exact - 1}
        )
    wide = max(abs(row["off by"]) for row in table if row["width"] >= 4096)
    narrow = max(abs(row["off by"]) for row in table if row["width"] <= 1024)
    return ClaimResult(
        verdict="held" if wide > MISCOUNT and narrow == 0 else "not held",
        measured=f"counts by products are off by {100 * wide:.1f} % at the most for widths from 4096 on, and by "
        f"{100 * narrow:.1f} % for widths up to 1024.",
        value=wide,
        table=table,
        seeds=[n + aspect for n, aspect in widths],
    )


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="alpha-tracks-error",
        statement="Over learning rates from 1 to 32 times the smallest, the exponent α of a layer falls as the test error of "
        "its network does.",
        threshold="For each seed, Kendall's τ between α and test error over the six rates (perceptron 64-300-100-10, digits). "
        "Held if the 95 % interval of the mean over seeds lies above 0.5 for both hidden layers; not held if it lies below for "
        "either; else inconclusive.",
        expected="α of the first layer falls towards 2 as the error falls, best at 16 times the rate (MNIST, 5 seeds)",
        run=_tracks,
    ),
    Claim(
        name="alpha-beats-norms",
        statement="Over those rates, α orders networks by test error better than the norm of the layer, its spectral norm, or "
        "its distance from the start do.",
        threshold="For each seed, τ of α less the size of τ of the rival. Held if the 95 % interval of the mean lies above 0 "
        "for every rival in both layers; not held if it lies below 0.1 for any, so that this rival is about as good; else "
        "inconclusive.",
        expected="not tested in the paper: the control for the claim before",
        run=_rivals,
    ),
    Claim(
        name="alpha-tells-at-one-rate",
        statement="Among networks that were trained alike but for the seed, those with a smaller α have a smaller test error.",
        threshold="For each of those six rates, Kendall's τ between α and test error over the seeds. Held if the 95 % interval "
        "of the mean over rates lies above 0 for both hidden layers; not held if it lies below 0.3 for either; else "
        "inconclusive.",
        expected="not tested in the paper: the control for what the learning rate does to both",
        run=_at_one_rate,
    ),
    Claim(
        name="gap-closes",
        statement="As α falls towards 2, the number of eigenvalues in the power-law tail and the number that multiply to one "
        "come together.",
        threshold="For each seed, Kendall's τ between α and the size of the ERG gap over the six rates. Held if the 95 % interval "
        "of the mean over seeds lies above 0.5 for both hidden layers; not held if it lies below for either; else "
        "inconclusive.",
        expected="the distance between the two starts of the tail goes to 0 as α goes to 2",
        run=_gap,
    ),
    Claim(
        name="below-two-error-rises",
        statement="Where a larger learning rate takes α of the first layer below 2, the test error rises.",
        threshold="Between the last rate with a mean α of at least 2 and the first with one under 2, of those at which every "
        "network stays under 50 % error. Held if the 95 % interval of the mean rise over seeds lies above 0.5 points; not held "
        "if it lies below, or if no such rate has α under 2; else inconclusive.",
        expected="at 32 times the rate α is under 2, and the error and its variance jump",
        run=_reversal,
    ),
    Claim(
        name="alpha-orders-resnets",
        statement="Mean α orders the CIFAR-10 ResNets 20, 32 and 56 of akamaster/pytorch_resnet_cifar10 as their test errors do.",
        threshold="Not held if any two are in the wrong order. Three networks are in the right order by chance once in six times, "
        "so that the right order is inconclusive. Simpler measures are reported beside it.",
        expected="a smaller mean α goes with a smaller error over networks of one architecture",
        run=_pretrained,
    ),
    Claim(
        name="wide-layers-need-logarithms",
        statement="The reference tool's products of eigenvalues leave the range of float64 in wide layers and miscount the "
        "eigenvalues that multiply to one; sums of logarithms do not.",
        threshold="Spectra of Gaussian matrices. Held if counts differ by more than 1 % for some width from 4096 on and by none up "
        "to 1024; else not held.",
        expected="the paper reports such counts for models with layers 4096 wide and wider",
        run=_logarithms,
    ),
)
