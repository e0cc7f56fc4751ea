"""What the spectra of all layers of a model are like: one row a layer, a summary, and flags."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.jupyter import JupyterMixin
from rich.table import Table
from torch import Tensor

from weightlab._lazy import require
from weightlab.inspect.checkpoint import Checkpoint, Source
from weightlab.inspect.erg import erg_count
from weightlab.inspect.layers import Layer, walk_layers
from weightlab.inspect.numbers import csv_text, json_text
from weightlab.inspect.power_law import fit_power_law
from weightlab.inspect.randomized import RandomizedControl, randomized_control
from weightlab.inspect.spectrum import SLICE_FACTOR, ConvView, Normalization, esd
from weightlab.inspect.tables import report_table
from weightlab.linalg.power_law import SmallN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Tell = Callable[[int, int, str], None]

FLAGS = {
    "over-trained": "α is under 2: the tail is heavier than the theory's ideal; often too large a learning rate",
    "under-trained": "α is over 6: hardly a power law, as in random matrices",
    "uncertain": "fewer than 10 eigenvalues in the tail, or σ/α of 0.3 or more: α is mostly noise",
    "traps": "with its entries shuffled, the weight has eigenvalues beyond a random matrix's: a few entries are huge",
    "rank-deficient": "some singular values are zero to the precision of the stored type",
    "non-finite": "the weight holds NaN or infinity",
}
"""What each flag of a layer means."""

_MEANS = (
    "alpha",
    "alpha_hat",
    "ks",
    "erg_gap",
    "log_norm",
    "log_spectral_norm",
    "log_alpha_norm",
    "stable_rank",
)


@dataclass(frozen=True)
class LayerRow:
    """What was read from one layer. Numbers that could not be had are NaN, counts None.

    λ are the eigenvalues of [`esd`][weightlab.inspect.esd], σᵢ = √λᵢ. Logarithms of norms have base 10, as in
    WeightWatcher.

    Attributes:
        name: As in [`Layer`][weightlab.inspect.Layer].
        kind: `"matrix"`, `"conv"` or `"delta"`.
        shape: Shape of the weight.
        dtype: Stored type, e.g. `"bfloat16"`.
        status: `"ok"`; `"too small"`, `"too large"` (for the limits that were given), `"too few"`, `"degenerate"` (as
            for [`PowerLawFit`][weightlab.inspect.PowerLawFit]), `"non-finite"`, `"out of range"` (entries so large that
            eigenvalues overflow) or `"unreadable type"`.
        n_eigenvalues: Number of eigenvalues.
        alpha: Exponent α of the tail.
        alpha_hat: α · log₁₀ λ_max.
        xmin: Where the tail starts.
        xmax: λ_max.
        ks: Distance D between tail and power law.
        sigma: Standard error of α.
        n_tail: Number of eigenvalues in the tail.
        erg_count: Number of largest eigenvalues by [`erg_count`][weightlab.inspect.erg_count].
        erg_eigenvalue: The smallest of those.
        erg_gap: `erg_count − n_tail`.
        stable_rank: Σλ / λ_max.
        effective_rank: exp of the entropy of σᵢ/Σσ.
        matrix_rank: Singular values over `N · eps · σ_max`, N the longer side and eps that of the stored type, but
            of float32 for half precision, and at least what eigenvalues in float64 resolve.
        entropy: −Σ p ln p / ln(matrix rank), p = λ/Σλ.
        log_norm: log₁₀ Σλ.
        log_spectral_norm: log₁₀ λ_max.
        log_alpha_norm: log₁₀ Σ λ^α.
        orthogonality: Root mean square of σ² − 1, over the singular values of the matrices as they are stored.
        rand_max: Largest eigenvalue with shuffled entries; this and the following are those of
            [`RandomizedControl`][weightlab.inspect.RandomizedControl], and NaN or None unless asked for.
        rand_softrank: `rand_max` of one shuffle over `xmax`.
        rand_distance: Distance between spectrum and shuffled spectrum.
        rand_sigma_mp: Scale of the Marchenko-Pastur law of the shuffled.
        rand_bulk_max: Its end.
        n_traps: Number of eigenvalues of a shuffle beyond it.
        flags: Names from `FLAGS`.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    status: str
    n_eigenvalues: int = 0
    alpha: float = math.nan
    alpha_hat: float = math.nan
    xmin: float = math.nan
    xmax: float = math.nan
    ks: float = math.nan
    sigma: float = math.nan
    n_tail: int | None = None
    erg_count: int | None = None
    erg_eigenvalue: float = math.nan
    erg_gap: int | None = None
    stable_rank: float = math.nan
    effective_rank: float = math.nan
    matrix_rank: int | None = None
    entropy: float = math.nan
    log_norm: float = math.nan
    log_spectral_norm: float = math.nan
    log_alpha_norm: float = math.nan
    orthogonality: float = math.nan
    rand_max: float = math.nan
    rand_softrank: float = math.nan
    rand_distance: float = math.nan
    rand_sigma_mp: float = math.nan
    rand_bulk_max: float = math.nan
    n_traps: int | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report(JupyterMixin):
    """The spectra of a model.

    Attributes:
        source: What was read.
        rows: One a layer.
        summary: `layers`, `fitted`, `parameters` (in layers), plain means over the fitted layers
            (`alpha`, `alpha_hat`, `ks`, `erg_gap`, `log_norm`, ...; NaN if there are none).
        flags: Flag -> names of the layers that have it.
        eigenvalues: Name -> eigenvalues, ascending, if they were to be kept.
    """

    source: str
    rows: tuple[LayerRow, ...]
    summary: dict[str, float]
    flags: dict[str, tuple[str, ...]]
    eigenvalues: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def table(self, width: int | None = None) -> Table:
        """Return a rich table, one row a layer.

        Args:
            width: Characters to be had; columns of less importance are left out where they do not fit. None: any.
        """
        return report_table(self, width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table(options.max_width)

    def plot(self) -> Figure:
        """Draw the exponent of each fitted layer with its standard error, and the ranges that have flags.

        Returns:
            A `matplotlib.figure.Figure`; save it with `savefig`.

        Raises:
            MissingDependencyError: If matplotlib is not installed.
        """
        figure: Figure = require("matplotlib.figure", "trial").Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        fitted = [row for row in self.rows if row.status == "ok"]
        places = range(len(fitted))
        alphas = [row.alpha for row in fitted]
        axes.errorbar(places, alphas, [row.sigma for row in fitted], fmt="o", markersize=4, capsize=2)
        axes.axhspan(0, 2, color="tab:red", alpha=0.1, label="over-trained (α < 2)")
        axes.axhspan(
            6, max(8.0, *alphas, 0.0) + 1, color="tab:orange", alpha=0.1, label="under-trained (α > 6)"
        )
        if len(fitted) <= 40:
            axes.set_xticks(places, [row.name for row in fitted], rotation=90, fontsize=7)
        axes.set(title=self.source, ylabel="α", ylim=(0, max(8.0, *alphas, 0.0) + 1))
        axes.legend(loc="upper right", fontsize=8)
        return figure

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return all numbers as JSON, NaN and infinity as null, and write it to `path` if given."""
        content = {
            "source": self.source,
            "summary": self.summary,
            "flags": {flag: list(names) for flag, names in self.flags.items()},
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        return json_text(content, path)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the rows as CSV, one column an attribute, empty where there is no number; write it to `path` if given."""
        columns = [column.name for column in dataclasses.fields(LayerRow)]
        rows = (
            {**dataclasses.asdict(row), "shape": "x".join(map(str, row.shape)), "flags": " ".join(row.flags)}
            for row in self.rows
        )
        return csv_text(columns, rows, path)


def layer_report(
    model: Source | Checkpoint,
    *,
    layers: Sequence[str] | None = None,
    split_qkv: bool = False,
    conv: ConvView = "slices",
    normalize: Normalization = "none",
    small_n: SmallN = "bias_corrected",
    randomize: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    min_eigenvalues: int = 8,
    max_eigenvalues: int = 15_000,
    keep_eigenvalues: bool = False,
    tell: Tell | None = None,
) -> Report:
    """Read the spectrum of every layer of a model, and fit the tail of each.

    Layers are loaded one at a time: memory holds the largest tensor, its Gram matrix and the eigensolver's workspace.

    Args:
        model: A module, a state dict, or the path of a checkpoint; see [`Checkpoint`][weightlab.inspect.Checkpoint].
        layers: Patterns of the names to take. Default: all.
        split_qkv: Whether to read fused projections as three; see [`walk_layers`][weightlab.inspect.walk_layers].
        conv: How a kernel is made matrices; see [`esd`][weightlab.inspect.esd].
        normalize: Scale of the eigenvalues; see [`esd`][weightlab.inspect.esd].
        small_n: Rule for fewer than 20 eigenvalues; see [`fit_power_law`][weightlab.inspect.fit_power_law].
        randomize: Whether to compare with shuffled entries (in float32); not for a LoRA's changes. About twice the time.
        seed: Seed of the shuffles.
        dtype: Type to compute in. float32 is faster, leaves out ranks and entropy, which it does not support, and
            gives another α where the tail reaches down to eigenvalues under about `1e-6 · λ_max`.
        device: Where to compute. Default: where each tensor is.
        min_eigenvalues: Layers with fewer are not fitted (status `"too small"`). Default: WeightWatcher's.
        max_eigenvalues: Layers with more are not read (status `"too large"`). Default: WeightWatcher's.
        keep_eigenvalues: Whether to keep the spectra in the report.
        tell: Called before each layer with how many are done, of how many, and its name.

    Returns:
        The report. A layer that cannot be read has a row that says so, and the rest goes on.

    Raises:
        TypeError: If `model` is none of these.
        UsageError: If a file cannot be read, or `layers` matches none.
        ValueError: If an option is unknown or out of range.

    References:
        SETOL: A Semi-Empirical Theory of (Deep) Learning, arXiv 2507.17912.

    Example:
        >>> from torch import nn
        >>> report = layer_report(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)))
        >>> [(row.name, row.status, row.n_eigenvalues) for row in report.rows]
        [('0.weight', 'ok', 32), ('2.weight', 'too small', 3)]
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint(model)
    found = list(walk_layers(checkpoint, layers=layers, split_qkv=split_qkv))
    results = layer_rows(
        found,
        conv=conv,
        normalize=normalize,
        small_n=small_n,
        randomize=randomize,
        seed=seed,
        dtype=dtype,
        device=device,
        min_eigenvalues=min_eigenvalues,
        max_eigenvalues=max_eigenvalues,
    )
    rows: list[LayerRow] = []
    kept: dict[str, Tensor] = {}
    for index, layer in enumerate(found):
        if tell is not None:
            tell(index, len(found), layer.name)
        row, eigenvalues = next(results)
        rows.append(row)
        if keep_eigenvalues and eigenvalues is not None:
            kept[layer.name] = eigenvalues.cpu()
    return make_report(checkpoint.source, rows, kept)


def make_report(
    source: str, rows: Sequence[LayerRow], eigenvalues: dict[str, Tensor] | None = None
) -> Report:
    """Add summary and flags to rows.

    Args:
        source: What was read.
        rows: One a layer.
        eigenvalues: Spectra by name, to be kept in the report.

    Example:
        >>> make_report("nothing", []).summary["layers"]
        0
    """
    fitted = [row for row in rows if row.status == "ok"]
    summary: dict[str, float] = {
        "layers": len(rows),
        "fitted": len(fitted),
        "parameters": sum(math.prod(row.shape) for row in rows),
    }
    for column in _MEANS:
        values = [float(getattr(row, column)) for row in fitted]
        summary[column] = math.fsum(values) / len(values) if values else math.nan
    flags = {flag: tuple(row.name for row in rows if flag in row.flags) for flag in FLAGS}
    return Report(
        source,
        tuple(rows),
        summary,
        {flag: names for flag, names in flags.items() if names},
        eigenvalues or {},
    )


def layer_rows(
    layers: Iterable[Layer],
    *,
    conv: ConvView = "slices",
    normalize: Normalization = "none",
    small_n: SmallN = "bias_corrected",
    randomize: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    min_eigenvalues: int = 8,
    max_eigenvalues: int = 15_000,
) -> Iterator[tuple[LayerRow, Tensor | None]]:
    """Read layers one after the other, as their results are asked for.

    A row does not depend on the layers before it, so that whoever keeps the rows can stop and go on later.

    Args:
        layers: From [`walk_layers`][weightlab.inspect.walk_layers].
        conv, normalize, small_n, randomize, seed, dtype, device, min_eigenvalues, max_eigenvalues: As for
            [`layer_report`][weightlab.inspect.layer_report].

    Yields:
        For each layer, in order, its row and its eigenvalues; None for those of a layer that has none.

    Raises:
        ValueError: If an option is unknown or out of range (when the first row is asked for).

    Example:
        >>> layers = [Layer("w", "matrix", (9, 9), torch.float32, lambda: torch.eye(9))]
        >>> [(row.name, row.status) for row, eigenvalues in layer_rows(layers)]
        [('w', 'degenerate')]
    """
    if not 2 <= min_eigenvalues <= max_eigenvalues:
        raise ValueError(
            f"min_eigenvalues must be at least 2 and at most max_eigenvalues, got {min_eigenvalues} and {max_eigenvalues}"
        )
    if normalize not in ("none", "1/N"):
        raise ValueError(f'normalize must be "none" or "1/N", got {normalize!r}')
    for layer in layers:
        yield inspect_layer(
            layer,
            conv=conv,
            normalize=normalize,
            small_n=small_n,
            randomize=randomize,
            seed=seed,
            dtype=dtype,
            device=device,
            min_eigenvalues=min_eigenvalues,
            max_eigenvalues=max_eigenvalues,
        )


def inspect_layer(
    layer: Layer,
    *,
    conv: ConvView = "slices",
    normalize: Normalization = "none",
    small_n: SmallN = "bias_corrected",
    randomize: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    min_eigenvalues: int = 8,
    max_eigenvalues: int = 15_000,
) -> tuple[LayerRow, Tensor | None]:
    """Read one layer.

    Args:
        layer: From [`walk_layers`][weightlab.inspect.walk_layers].
        conv, normalize, small_n, randomize, seed, dtype, device, min_eigenvalues, max_eigenvalues: As for
            [`layer_report`][weightlab.inspect.layer_report].

    Returns:
        Its row and its eigenvalues; None for those of a layer that has none.

    Example:
        >>> layer = Layer("w", "matrix", (9, 9), torch.float32, lambda: torch.eye(9))
        >>> row, eigenvalues = inspect_layer(layer)
        >>> row.status, row.stable_rank, row.erg_count
        ('degenerate', 9.0, 9)
    """
    facts = {
        "name": layer.name,
        "kind": layer.kind,
        "shape": layer.shape,
        "dtype": str(layer.dtype).removeprefix("torch."),
    }
    if layer.dtype is None:
        return LayerRow(**facts, status="unreadable type"), None
    sliced = layer.kind == "conv" and conv == "slices"
    sides = (
        layer.shape[:2] if len(layer.shape) == 2 or sliced else (layer.shape[0], math.prod(layer.shape[1:]))
    )
    # Limits are on the matrices that are decomposed.
    if min(sides) > max_eigenvalues and layer.kind != "delta":
        return LayerRow(**facts, status="too large"), None
    weight = layer.load()
    if weight.is_meta:
        raise ValueError(f"{layer.name} is on the meta device and has no values; load the weights first")
    weight = weight if device is None else weight.to(device)
    if layer.dtype.itemsize == 1:
        weight = weight.float()  # 8-bit types have no arithmetic.
    largest = float(torch.stack(weight.aminmax()).double().abs().max())
    if not math.isfinite(largest):
        return LayerRow(**facts, status="non-finite", flags=("non-finite",)), None
    if largest > math.sqrt(torch.finfo(dtype).max / weight.numel()):
        return LayerRow(**facts, status="out of range"), None
    # A delta's stand-in is smaller than the weight, so that N is not its own.
    divisor = max(sides) if normalize == "1/N" else 1
    evals = esd(weight, conv=conv, dtype=dtype) / divisor
    scale = (SLICE_FACTOR if sliced else 1.0) / divisor
    row = _row(facts, evals, weight.dtype, max(sides), scale, small_n, min_eigenvalues)
    if randomize and layer.kind != "delta":
        control = randomized_control(weight, conv=conv, seed=seed, evals=evals * divisor)
        # Among slices of a kernel, those of a large norm look like traps.
        trapped = () if sliced or not control.n_traps else ("traps",)
        row = dataclasses.replace(row, **_control(control, divisor), flags=(*row.flags, *trapped))
    return row, evals


def _control(control: RandomizedControl, divisor: int) -> dict[str, Any]:
    return {
        "rand_max": control.max_eigenvalue / divisor,
        "rand_softrank": control.softrank,
        "rand_distance": control.distance,
        "rand_sigma_mp": control.sigma_mp,
        "rand_bulk_max": control.bulk_max / divisor,
        "n_traps": control.n_traps,
    }


def _row(
    facts: dict[str, Any],
    evals: Tensor,
    stored: torch.dtype,
    longest: int,
    scale: float,
    small_n: SmallN,
    min_eigenvalues: int,
) -> LayerRow:
    exact = evals.dtype == torch.float64
    x = evals.double()
    total, top = float(x.sum()), float(x[-1])
    numbers: dict[str, Any] = {
        "n_eigenvalues": len(x),
        "xmax": top,
        "orthogonality": float((x / scale - 1).square().mean().sqrt()),
    }
    flags: list[str] = []
    if top > 0:
        numbers |= {
            "stable_rank": total / top,
            "log_norm": math.log10(total),
            "log_spectral_norm": math.log10(top),
        }
    if exact:
        rank, numbers["effective_rank"], numbers["entropy"] = _ranks(x, stored, longest)
        numbers["matrix_rank"] = rank
        if rank < len(x) and facts["kind"] != "delta":
            flags.append("rank-deficient")
    erg = erg_count(x)
    numbers |= {"erg_count": erg.k, "erg_eigenvalue": erg.eigenvalue}
    if len(x) < min_eigenvalues:
        return LayerRow(**facts, **numbers, status="too small", flags=tuple(flags))
    fit = fit_power_law(x, small_n=small_n)
    if fit.status != "ok":
        return LayerRow(**facts, **numbers, status=fit.status, flags=tuple(flags))
    if fit.alpha < 2 or fit.alpha > 6:
        flags.insert(0, "over-trained" if fit.alpha < 2 else "under-trained")
    if fit.n_tail < 10 or fit.sigma >= 0.3 * fit.alpha:
        flags.append("uncertain")
    # The largest factored out, since λ^α may be out of range.
    alpha_norm = fit.alpha * math.log10(top) + math.log10(float((x / top).pow(fit.alpha).sum()))
    return LayerRow(
        **facts,
        **numbers,
        status="ok",
        alpha=fit.alpha,
        alpha_hat=fit.alpha * math.log10(top),
        xmin=fit.xmin,
        ks=fit.ks,
        sigma=fit.sigma,
        n_tail=fit.n_tail,
        erg_gap=erg.k - fit.n_tail,
        log_alpha_norm=alpha_norm,
        flags=tuple(flags),
    )


def _ranks(x: Tensor, stored: torch.dtype, longest: int) -> tuple[int, float, float]:
    """Matrix rank, effective rank and entropy from eigenvalues in float64."""
    if float(x[-1]) == 0:
        return 0, math.nan, math.nan
    eps = torch.finfo(torch.promote_types(stored, torch.float32)).eps
    resolved = torch.finfo(torch.float64).eps * longest
    rank = int((x > x[-1] * max((eps * longest) ** 2, resolved)).sum())
    p = x / x.sum()
    entropy = float(torch.special.entr(p).sum()) / math.log(rank) if rank > 1 else math.nan
    q = x.sqrt() / x.sqrt().sum()
    return rank, math.exp(float(torch.special.entr(q).sum())), entropy
