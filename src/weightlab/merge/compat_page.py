"""The page about maps between two embedding models: what each keeps and finds, and what backfilling gains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightlab._pages.drawing import MUTED, PAGE, SERIES, TEXT, canvas, style_axes, svg
from weightlab._pages.shell import markup, render

_CROSS, _OWN = 1, 2


def page(result: Mapping[str, Any]) -> str:
    """Return one HTML page about what `compat_files.fit_files` found. Equal arguments give equal text.

    Raises:
        MissingDependencyError: Without matplotlib or jinja2.
    """
    chosen = result["maps"][result["chosen"]]
    labelled = result["labels"] is not None
    pairs = result["pairs"]
    return render(
        "weightlab.merge",
        "compat_page.html.j2",
        title=f"Maps from {result['new']['path']} to {result['old']['path']}",
        headline=_headline(result, chosen, labelled),
        facts=[
            f"{pairs['fitted']:,} pairs fitted",
            f"{pairs['held_out']:,} held out",
            f"{result['new']['dimensions']} to {result['old']['dimensions']} dimensions",
            f"{result['seconds']:.1f} s",
        ],
        notes=result["notes"],
        new=result["new"]["path"],
        old=result["old"]["path"],
        labelled=labelled,
        own="self" if labelled else "neighbours kept",
        legend=[
            {"label": "found in the old gallery (cross)", "colour": _CROSS, "dash": ""},
            {
                "label": "found among mapped new embeddings (self)" if labelled else "neighbours kept",
                "colour": _OWN,
                "dash": "7 3",
            },
        ],
        sweep=markup(_sweep(result)),
        rows=[
            {
                "name": row["map"],
                "tol": "-" if row["tol"] is None else f"{row['tol']:g}",
                "deviation": f"{row['deviation']:.3g}",
                "cross": f"{100 * row['cross']:.1f} %",
                "cross_map": f"{row['cross_map']:.3f}",
                "own": f"{100 * row['self']:.1f} %",
                "drop": f"{100 * row['drop']:.2f}",
                "chosen": number == result["chosen"],
            }
            for number, row in enumerate(result["maps"])
        ],
        reference={
            name: None if value is None else f"{100 * value:.1f} %"
            for name, value in result["reference"].items()
        },
        rule=result["rule"],
        backfill=_backfill(result),
        command=result["command"],
    )


def _headline(result: Mapping[str, Any], chosen: Mapping[str, Any], labelled: bool) -> str:
    name = {"orthogonal": "A rotation", "affine": "An affine map"}.get(
        chosen["map"], f"A map within λ/√d = {chosen['tol'] or 0:g}"
    )
    if not labelled:
        return f"{name} finds {100 * chosen['cross']:.1f} % of items by their old embeddings"
    old = result["reference"]["old"]
    return f"{name} finds {100 * chosen['cross']:.1f} % in the old gallery, where old queries find {100 * old:.1f} %"


def _sweep(result: Mapping[str, Any]) -> str:
    rows = result["maps"]
    places = list(range(len(rows)))
    labels = [
        "rotation" if r["map"] == "orthogonal" else "affine" if r["map"] == "affine" else f"{r['tol']:g}"
        for r in rows
    ]
    with canvas(7.2, 3.2) as figure:
        axes = style_axes(figure.subplots(), grid="y")
        for key, colour, dash in (("cross", _CROSS, "-"), ("self", _OWN, (0, (7, 3)))):
            heights = [100 * row[key] for row in rows]
            axes.plot(
                places,
                heights,
                "o",
                linestyle=dash,
                color=SERIES[colour],
                linewidth=1.8,
                markersize=4,
                zorder=3,
            )
            axes.plot(
                [result["chosen"]], [heights[result["chosen"]]], "o", markerfacecolor=PAGE, markeredgecolor=TEXT,
                markersize=9, markeredgewidth=1.4, zorder=2,
            )  # fmt: skip
        if result["labels"] is not None:
            # Where lines of found items run elsewhere as a rule.
            for name, place, side in (("old", places[0], "left"), ("new", places[-1], "right")):
                height = 100 * result["reference"][name]
                axes.axhline(height, color=MUTED, linewidth=0.8, zorder=1)
                axes.text(place, height, f"{name} in {name}", color=MUTED, fontsize=8, ha=side, va="bottom")
        axes.set_xticks(places, labels)
        axes.set_xlabel("λ/√d")
        axes.set_ylabel("%")
        label = "By tolerance: " + "; ".join(
            f"{name}: cross {100 * row['cross']:.1f} %, self {100 * row['self']:.1f} %"
            for name, row in zip(labels, rows, strict=True)
        )
        return svg(figure, "compat sweep", label)


def _backfill(result: Mapping[str, Any]) -> dict[str, Any] | None:
    curves = result["backfill"]
    if not curves:
        return None
    legend = []
    with canvas(7.2, 3.0) as figure:
        axes = style_axes(figure.subplots())
        for number, (name, curve) in enumerate(curves.items()):
            colour, dash = (1, "") if number == 0 else (0, "2 2")
            legend.append({"label": f"{name}, area {curve['area']:.3f}", "colour": colour, "dash": dash})
            pattern = tuple(float(part) for part in dash.split())
            axes.plot(
                [100 * x for x in curve["fractions"]], [100 * y for y in curve["top1"]], color=SERIES[colour],
                linestyle=(0, pattern) if pattern else "-", linewidth=1.8, zorder=3,
            )  # fmt: skip
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the gallery computed anew, %")
        axes.set_ylabel("top-1, %")
        label = "Backfill curves. " + " ".join(f"{each['label']}." for each in legend)
        return {"legend": legend, "figure": markup(svg(figure, "compat backfill", label))}
