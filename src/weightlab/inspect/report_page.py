"""The page of `weightlab inspect`: one self-contained file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import weightlab
from weightlab._pages.shell import markup, render
from weightlab.inspect.binned_spectrum import BinnedSpectrum, bin_spectrum
from weightlab.inspect.comparison import Comparison
from weightlab.inspect.drawings import Curve, Point, Tail, profile_drawing, spectrum_drawing
from weightlab.inspect.layer_changes import ChangeRow
from weightlab.inspect.numbers import shown
from weightlab.inspect.report import FLAGS, LayerRow, Report
from weightlab.inspect.tables import shortened

Spectra = Mapping[str, Mapping[str, BinnedSpectrum]]

# Above this, an α is drawn at the border: random matrices have any.
_HIGHEST = 12.0
# So many spectra are open when the page is; more are folded by kind of layer.
_OPEN = 60
_COLOURS = 7

_REPORT_COLUMNS = (
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
_CHANGE_COLUMNS = (
    ("α before", "alpha_before"),
    ("α after", "alpha_after"),
    ("‖ΔW‖/‖W‖", "relative_norm"),
    ("σ max of ΔW", "spectral_norm"),
    ("stable rank", "stable_rank"),
    ("effective rank", "effective_rank"),
    ("rank", "rank"),
    ("α of ΔW", "alpha"),
    ("tail of ΔW", "n_tail"),
    ("overlap, out", "overlap_out"),
    ("overlap, in", "overlap_in"),
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
        settings: How it was read, as far as it is not the default.
        command: What repeats it.

    Raises:
        MissingDependencyError: If jinja2 is not installed.
    """
    if spectra is None:
        spectra = _kept(result)
    values = _report(result, spectra) if isinstance(result, Report) else _comparison(result, spectra)
    told = [
        tell((settings or {}).get(name))
        for name, (default, tell) in _SETTINGS.items()
        if (settings or {}).get(name, default) not in (default, list(default) if default == () else default)
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
    kinds = _kinds([row.name for row in rows])
    shuffled = any(row.n_traps is not None for row in rows)
    fitted = [row for row in rows if row.status == "ok"]
    usual = sum(2 <= row.alpha <= 6 for row in fitted)
    facts = [
        f"{report.summary['layers']:.0f} layers, {report.summary['fitted']:.0f} fitted",
        f"{report.summary['parameters']:,.0f} parameters in them",
        ", ".join(dict.fromkeys(row.dtype for row in rows)),
    ]
    cards = [
        _card("mean α", shown(report.summary["alpha"]), f"over {len(fitted)} fitted layers"),
        _card("α from 2 to 6", f"{usual} of {len(fitted)}", "layers in the usual range"),
        _card("mean ERG gap", shown(report.summary["erg_gap"]), "0 where both tails are the same"),
        _card("mean α̂", shown(report.summary["alpha_hat"]), "α · log₁₀ λ max"),
        _card("mean log norm", shown(report.summary["log_norm"]), "the simpler predictor, to compare"),
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
    profile = profile_drawing(points, label=label, unit="α", limit=_HIGHEST)
    columns = _REPORT_COLUMNS + (_SHUFFLED_COLUMNS if shuffled else ())
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
                f"called under-trained. Triangles at the border are over {_HIGHEST:g}. A point leads to its layer.",
            }
        ]
        if profile
        else [],
        "flags": [_flag(flag, names, rows) for flag, names in report.flags.items()],
        "unmatched": [],
        "start": kinds.start,
        "columns": [name for name, _ in columns],
        "rows": [_table_row(row, index, columns, kinds) for index, row in enumerate(rows)],
        "means": [shown(report.summary.get(column, math.nan)) for _, column in columns],
        "groups": _grouped(
            [_card_of_layer(row, index, spectra.get(row.name, {})) for index, row in enumerate(rows)], kinds
        ),
        "shuffled": shuffled,
    }


def _comparison(comparison: Comparison, spectra: Spectra) -> dict[str, Any]:
    rows, summary = comparison.rows, comparison.summary
    kinds = _kinds([row.name for row in rows])
    facts = [
        f"{summary['layers']:.0f} layers compared",
        f"{summary['changed']:.0f} changed",
        f"{summary['unchanged']:.0f} unchanged",
    ]
    cards = [
        _card("mean ‖ΔW‖/‖W‖", shown(summary["relative_norm"]), "size of the change"),
        _card(
            "mean α",
            f"{shown(summary['alpha_before'])} → {shown(summary['alpha_after'])}",
            "before and after",
        ),
        _card("mean stable rank of ΔW", shown(summary["stable_rank"]), "directions that count most"),
        _card("mean overlap", shown(summary["overlap"]), "of leading singular spaces, 1 if the same"),
    ]
    alphas = [
        Point(
            f"{row.name}: α {shown(row.alpha_before)} → {shown(row.alpha_after)}",
            f"layer-{index}",
            row.alpha_after,
            0.0,
            kinds.colours[row.name],
            row.alpha_before,
        )
        for index, row in enumerate(rows)
    ]
    sizes = [
        Point(
            f"{row.name}: ‖ΔW‖/‖W‖ {shown(row.relative_norm)}",
            f"layer-{index}",
            row.relative_norm,
            0.0,
            kinds.colours[row.name],
        )
        for index, row in enumerate(rows)
    ]
    drawings = (
        (
            "How much has changed",
            profile_drawing(
                sizes,
                label="Relative size of each layer's change.",
                unit="‖ΔW‖ / ‖W‖",
                bands=False,
                logarithmic=True,
            ),
            "Size of the change relative to the weight. Layers that are unchanged leave a gap.",
        ),
        (
            "α before and after",
            profile_drawing(
                alphas, label="Exponent of each layer before and after.", unit="α", limit=_HIGHEST
            ),
            "Ring: before; dot: after. Shaded: under 2, called over-trained, and over 6, called under-trained.",
        ),
    )
    unmatched = [
        (f"only in {comparison.before.source}", list(comparison.only_before)),
        (f"only in {comparison.after.source}", list(comparison.only_after)),
        (
            "of different shapes",
            [f"{name} {_shape(a)} → {_shape(b)}" for name, (a, b) in comparison.shapes_differ.items()],
        ),
    ]
    return {
        "title": f"{comparison.before.source} → {comparison.after.source}",
        "mode": "comparison",
        "facts": facts,
        "cards": cards,
        "kinds": kinds.legend,
        "profiles": [
            {"heading": heading, "figure": markup(figure), "text": text}
            for heading, figure, text in drawings
            if figure
        ],
        "flags": [_flag(flag, names, rows) for flag, names in comparison.new_flags.items()],
        "unmatched": [(what, names) for what, names in unmatched if names],
        "start": kinds.start,
        "columns": [name for name, _ in _CHANGE_COLUMNS],
        "rows": [_table_row(row, index, _CHANGE_COLUMNS, kinds) for index, row in enumerate(rows)],
        "means": [shown(summary.get(column, math.nan)) for _, column in _CHANGE_COLUMNS],
        "groups": _grouped(
            [_card_of_change(row, index, spectra.get(row.name, {})) for index, row in enumerate(rows)], kinds
        ),
        "shuffled": False,
    }


class _Kinds:
    """Layers by name without numbers: those that recur along the depth have a colour."""

    def __init__(self, names: Sequence[str]) -> None:
        self.start, short = shortened(names)
        self.short = dict(zip(names, short, strict=True))
        self.kind = {name: re.sub(r"\d+", "#", short) for name, short in self.short.items()}
        members: dict[str, int] = {}
        for kind in self.kind.values():
            members[kind] = members.get(kind, 0) + 1
        common = sorted((kind for kind in members if members[kind] > 1), key=lambda kind: -members[kind])
        chosen = [kind for kind in members if kind in common[:_COLOURS]]
        numbers = {kind: index + 1 for index, kind in enumerate(chosen)} if len(chosen) > 1 else {}
        rest = 0 if numbers else 1
        self.colours = {name: numbers.get(kind, rest) for name, kind in self.kind.items()}
        self.legend = [(kind, number, members[kind]) for kind, number in numbers.items()]
        others = sum(colour == 0 for colour in self.colours.values())
        if others and self.legend:
            self.legend.append(("others", 0, others))


def _kinds(names: Sequence[str]) -> _Kinds:
    return _Kinds(names)


def _card(name: str, value: str, text: str) -> dict[str, str]:
    return {"name": name, "value": value, "text": text}


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def _flag(flag: str, names: Sequence[str], rows: Sequence[LayerRow | ChangeRow]) -> dict[str, Any]:
    places = {row.name: index for index, row in enumerate(rows)}
    return {
        "name": flag,
        "meaning": FLAGS[flag],
        "layers": [(name, places.get(name)) for name in names],
    }


def _table_row(
    row: LayerRow | ChangeRow, index: int, columns: Sequence[tuple[str, str]], kinds: _Kinds
) -> dict[str, Any]:
    values = [getattr(row, column) for _, column in columns]
    return {
        "index": index,
        "short": kinds.short[row.name],
        "shape": _shape(row.shape),
        "size": math.prod(row.shape),
        "colour": kinds.colours[row.name],
        "cells": [
            (shown(value), "" if value is None or not math.isfinite(value) else f"{value:.9g}")
            for value in values
        ],
        "notes": _notes(row),
    }


def _notes(row: LayerRow | ChangeRow) -> str:
    if isinstance(row, LayerRow):
        return ", ".join(row.flags) or ("" if row.status == "ok" else row.status)
    return row.notes


def _card_of_layer(row: LayerRow, index: int, spectra: Mapping[str, BinnedSpectrum]) -> dict[str, Any]:
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
        "shape": _shape(row.shape),
        "figure": markup(figure),
        "text": text if row.status == "ok" else row.status,
        "flags": [flag for flag in row.flags if flag != row.status],
    }


def _card_of_change(row: ChangeRow, index: int, spectra: Mapping[str, BinnedSpectrum]) -> dict[str, Any]:
    curves = [Curve(spectra[which], which) for which in ("before", "after", "delta") if which in spectra]
    if row.status == "unchanged":
        curves = curves[:1]
    figure = spectrum_drawing(curves, label=f"Spectra of {row.name} before, after and of the change.")
    text = f"‖ΔW‖/‖W‖ {shown(row.relative_norm)}, α {shown(row.alpha_before)} → {shown(row.alpha_after)}"
    return {
        "index": index,
        "name": row.name,
        "shape": _shape(row.shape),
        "figure": markup(figure),
        "text": row.status if row.status in ("unchanged", "too large") or not figure else text,
        "flags": [note for note in (_notes(row),) if note and note != "unchanged"],
    }


def _grouped(cards: Sequence[dict[str, Any]], kinds: _Kinds) -> list[dict[str, Any]]:
    """All cards at once, or by kind of layer where there are many."""
    if len(cards) <= _OPEN:
        return [{"name": "", "cards": list(cards)}]
    groups: dict[str, list[dict[str, Any]]] = {}
    for card in cards:
        kind = kinds.kind[card["name"]]
        groups.setdefault(kind if sum(k == kind for k in kinds.kind.values()) > 1 else "others", []).append(
            card
        )
    return [{"name": name, "cards": members} for name, members in groups.items()]
