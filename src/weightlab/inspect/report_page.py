"""The page of `weightlab inspect`: one self-contained file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

import weightlab
from weightlab._pages.shell import markup, render
from weightlab.inspect.binned_spectrum import BinnedSpectrum, bin_spectrum
from weightlab.inspect.comparison import Comparison
from weightlab.inspect.comparison_page import comparison_values
from weightlab.inspect.drawings import Curve, Point, Tail, profile_drawing, spectrum_drawing
from weightlab.inspect.numbers import shown
from weightlab.inspect.page_parts import (
    HIGHEST,
    Kinds,
    Spectra,
    card_entry,
    flag_entry,
    grouped,
    shape_text,
    table_row,
)
from weightlab.inspect.report import LayerRow, Report

_COLUMNS = (
    ("α", "alpha"),
    ("σ", "sigma"),
    ("D", "ks"),
    ("tail", "n_tail"),
    ("ERG", "erg_count"),
    ("gap", "erg_gap"),
    ("α̂", "alpha_hat"),
    ("xmin", "xmin"),
    ("λ max", "xmax"),
    ("n", "n_eigenvalues"),
    ("stable rank", "stable_rank"),
    ("effective rank", "effective_rank"),
    ("rank", "matrix_rank"),
    ("log norm", "log_norm"),
    ("log spectral", "log_spectral_norm"),
    ("orthogonality", "orthogonality"),
)
_SHUFFLED_COLUMNS = (
    ("shuffled λ max", "rand_max"),
    ("soft rank", "rand_softrank"),
    ("distance", "rand_distance"),
    ("traps", "n_traps"),
)
_SETTINGS = {
    "layers": ((), lambda value: f"layers {', '.join(value)}"),
    "split_qkv": (False, lambda value: "fused projections split"),
    "conv": ("slices", lambda value: f"kernels {value}"),
    "randomize": (False, lambda value: "with shuffled entries"),
    "dtype": ("float64", lambda value: f"computed in {value}"),
    "device": (None, lambda value: f"on {value}"),
}


def report_html(
    result: Report | Comparison,
    spectra: Spectra | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    command: str = "",
) -> str:
    """Return the HTML of a report or a comparison. Equal arguments give equal text.

    Args:
        result: What was read.
        spectra: Layer -> its binned spectra, `"weight"` for a report, `"before"`, `"after"` and `"delta"` for a
            comparison. Default: of the eigenvalues that the result keeps.
        settings: The command's settings; those that are not the default are told.
        command: What repeats it.

    Raises:
        MissingDependencyError: If jinja2 is not installed.

    Example:
        >>> import torch
        >>> from weightlab.inspect import layer_report
        >>> report_html(layer_report({"w": torch.eye(9)}, keep_eigenvalues=True))[:15]
        '<!doctype html>'
    """
    if spectra is None:
        spectra = _kept(result)
    values = _report(result, spectra) if isinstance(result, Report) else comparison_values(result, spectra)
    told = [
        tell(settings[name])
        for name, (default, tell) in _SETTINGS.items()
        if settings and settings[name] != default
    ]
    values["facts"] = [*values["facts"], *told]
    script = resources.files("weightlab.inspect").joinpath("page.js").read_text("utf-8")
    return render(
        "weightlab.inspect",
        "page.html.j2",
        script=script,
        command=command,
        version=weightlab.__version__,
        **values,
    )


def _kept(result: Report | Comparison) -> Spectra:
    if isinstance(result, Report):
        return {name: {"weight": bin_spectrum(values)} for name, values in result.eigenvalues.items()}
    kept = {
        "before": result.before.eigenvalues,
        "after": result.after.eigenvalues,
        "delta": result.eigenvalues,
    }
    return {
        row.name: {
            which: bin_spectrum(values[row.name]) for which, values in kept.items() if row.name in values
        }
        for row in result.rows
    }


def _report(report: Report, spectra: Spectra) -> dict[str, Any]:
    rows = report.rows
    kinds = Kinds([row.name for row in rows])
    shuffled = any(row.n_traps is not None for row in rows)
    fitted = [row for row in rows if row.status == "ok"]
    usual = sum(2 <= row.alpha <= 6 for row in fitted)
    facts = [
        f"{report.summary['layers']:.0f} layers, {report.summary['fitted']:.0f} fitted",
        f"{report.summary['parameters']:,.0f} parameters in them",
        ", ".join(dict.fromkeys(row.dtype for row in rows)),
    ]
    cards = [
        card_entry("mean α", shown(report.summary["alpha"]), f"over {len(fitted)} fitted layers"),
        card_entry("α from 2 to 6", f"{usual} of {len(fitted)}", "layers in the usual range"),
        card_entry("mean ERG gap", shown(report.summary["erg_gap"]), "0 where both tails are the same"),
        card_entry("mean α̂", shown(report.summary["alpha_hat"]), "α · log₁₀ λ max"),
        card_entry("mean log norm", shown(report.summary["log_norm"]), "the simpler predictor, to compare"),
    ]
    points = [
        Point(
            f"{row.name}: α {shown(row.alpha)} ± {shown(row.sigma)}, {row.n_tail} in the tail",
            f"layer-{index}",
            row.alpha,
            row.sigma,
            kinds.colours[row.name],
        )
        for index, row in enumerate(rows)
    ]
    label = f"Exponent α of {len(fitted)} layers in the order of the checkpoint."
    profile = profile_drawing(points, label=label, unit="α", limit=HIGHEST)
    columns = _COLUMNS + (_SHUFFLED_COLUMNS if shuffled else ())
    return {
        "title": report.source,
        "mode": "report",
        "facts": facts,
        "cards": cards,
        "kinds": kinds.legend,
        "profiles": [
            {
                "heading": "Along the depth",
                "figure": markup(profile),
                "text": "α of each layer with its standard error. Shaded: under 2, called over-trained, and over 6, "
                f"called under-trained. Triangles at the border are over {HIGHEST:g}. A point leads to its layer.",
            }
        ]
        if profile
        else [],
        "flags": [flag_entry(flag, names, rows) for flag, names in report.flags.items()],
        "unmatched": [],
        "start": kinds.start,
        "columns": [name for name, _ in columns],
        "rows": [table_row(row, index, columns, kinds) for index, row in enumerate(rows)],
        "means": [shown(report.summary.get(column, math.nan)) for _, column in columns],
        "groups": grouped(
            [_spectrum(row, index, spectra.get(row.name, {})) for index, row in enumerate(rows)], kinds
        ),
        "shuffled": shuffled,
    }


def _spectrum(row: LayerRow, index: int, spectra: Mapping[str, BinnedSpectrum]) -> dict[str, Any]:
    figure = ""
    if "weight" in spectra:
        tail = None
        if row.status == "ok" and row.n_tail:
            tail = Tail(row.alpha, row.xmin, row.n_tail, row.n_eigenvalues)
        figure = spectrum_drawing(
            [Curve(spectra["weight"], "own")],
            label=f"Spectrum of {row.name}, α {shown(row.alpha)}.",
            tail=tail,
            marks=((row.xmin, "xmin"), (row.erg_eigenvalue, "erg"), (row.rand_max, "shuffled")),
        )
    text = f"α {shown(row.alpha)} ± {shown(row.sigma)}, {row.n_tail} of {row.n_eigenvalues} in the tail"
    return {
        "index": index,
        "name": row.name,
        "shape": shape_text(row.shape),
        "figure": markup(figure),
        "text": text if row.status == "ok" else row.status,
        "flags": [flag for flag in row.flags if flag != row.status],
    }
