"""What the page of a comparison says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from weightlab._pages.shell import markup
from weightlab.inspect.binned_spectrum import BinnedSpectrum
from weightlab.inspect.comparison import Comparison
from weightlab.inspect.drawings import Curve, Point, profile_drawing, spectrum_drawing
from weightlab.inspect.layer_changes import ChangeRow
from weightlab.inspect.numbers import shown
from weightlab.inspect.page_parts import (
    HIGHEST,
    Kinds,
    Spectra,
    card_entry,
    flag_entry,
    grouped,
    notes_text,
    shape_text,
    table_row,
)

_COLUMNS = (
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


def comparison_values(comparison: Comparison, spectra: Spectra) -> dict[str, Any]:
    """Return what the template of the page fills in."""
    rows, summary = comparison.rows, comparison.summary
    kinds = Kinds([row.name for row in rows])
    facts = [
        f"{summary['layers']:.0f} layers compared",
        f"{summary['changed']:.0f} changed",
        f"{summary['unchanged']:.0f} unchanged",
    ]
    cards = [
        card_entry("mean ‖ΔW‖/‖W‖", shown(summary["relative_norm"]), "size of the change"),
        card_entry(
            "mean α",
            f"{shown(summary['alpha_before'])} → {shown(summary['alpha_after'])}",
            "before and after",
        ),
        card_entry("mean stable rank of ΔW", shown(summary["stable_rank"]), "directions that count most"),
        card_entry("mean overlap", shown(summary["overlap"]), "of leading singular spaces, 1 if the same"),
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
                alphas, label="Exponent of each layer before and after.", unit="α", limit=HIGHEST
            ),
            "Ring: before; dot: after. Shaded: under 2, called over-trained, and over 6, called under-trained.",
        ),
    )
    unmatched = [
        (f"only in {comparison.before.source}", list(comparison.only_before)),
        (f"only in {comparison.after.source}", list(comparison.only_after)),
        (
            "of different shapes",
            [
                f"{name} {shape_text(a)} → {shape_text(b)}"
                for name, (a, b) in comparison.shapes_differ.items()
            ],
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
        "flags": [flag_entry(flag, names, rows) for flag, names in comparison.new_flags.items()],
        "unmatched": [(what, names) for what, names in unmatched if names],
        "start": kinds.start,
        "columns": [name for name, _ in _COLUMNS],
        "rows": [table_row(row, index, _COLUMNS, kinds) for index, row in enumerate(rows)],
        "means": [shown(summary.get(column, math.nan)) for _, column in _COLUMNS],
        "groups": grouped(
            [_spectrum(row, index, spectra.get(row.name, {})) for index, row in enumerate(rows)], kinds
        ),
        "shuffled": False,
    }


def _spectrum(row: ChangeRow, index: int, spectra: Mapping[str, BinnedSpectrum]) -> dict[str, Any]:
    curves = [Curve(spectra[which], which) for which in ("before", "after", "delta") if which in spectra]
    if row.status == "unchanged":
        curves = curves[:1]
    figure = spectrum_drawing(curves, label=f"Spectra of {row.name} before, after and of the change.")
    text = f"‖ΔW‖/‖W‖ {shown(row.relative_norm)}, α {shown(row.alpha_before)} → {shown(row.alpha_after)}"
    return {
        "index": index,
        "name": row.name,
        "shape": shape_text(row.shape),
        "figure": markup(figure),
        "text": row.status if row.status in ("unchanged", "too large") or not figure else text,
        "flags": [note for note in (notes_text(row),) if note and note != "unchanged"],
    }
