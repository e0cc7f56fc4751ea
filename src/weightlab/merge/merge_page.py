"""The page about a merge: the loss between the networks, what matching did, what was written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightlab._pages.drawing import GOOD, GRID, MUTED, PAGE, SERIES, TEXT, canvas, style_axes, svg
from weightlab._pages.files import write_text
from weightlab._pages.shell import markup, render
from weightlab.merge.stored_weights import file_size

_LABELS = {
    "before": ("as they are", 2, "7 3"),
    "after": ("units matched", 1, ""),
    "reset": ("batch norm statistics taken anew", 3, "2 2"),
}
_METHODS = {
    "weights": "matching and averaging",
    "average": "averaging",
    "slerp": "spherical interpolation",
    "task-arithmetic": "task arithmetic",
}
_MOST_LAYERS = 40
_MOST_TENSORS = 30


def write(result: Mapping[str, Any], path: str) -> Path:
    """Write one HTML page about what `merge_checkpoints` did, with everything it needs inside.

    Args:
        result: What it returned.
        path: File to write; replaced whole.

    Raises:
        MissingDependencyError: Without matplotlib or jinja2.
        WeightlabError: When the file cannot be written.
    """
    return write_text(Path(path).expanduser(), page(result))


def page(result: Mapping[str, Any]) -> str:
    """Return the HTML of `write`. Equal arguments give equal text."""
    names = [model["path"] for model in result["models"]]
    losses = result.get("losses", {})
    lines = [
        {"key": key, "label": label, "colour": colour, "dash": dash, **losses[key]}
        for key, (label, colour, dash) in _LABELS.items()
        if key in losses
    ]
    count = len(result["models"])
    return render(
        "weightlab.merge",
        "merge_page.html.j2",
        title=f"Merge of {', '.join(names)}",
        method=_METHODS[result["method"]],
        headline=_headline(result, lines),
        facts=[
            f"{count} {'network' if count == 1 else 'networks'}",
            f"{result['parameters']:,} parameters in {result['tensors']} tensors",
            file_size(result["bytes"]),
            f"{result['seconds']:.1f} s",
        ],
        notes=result["notes"],
        names=names,
        data=losses.get("data") or result.get("scores", {}).get("data", ""),
        curve=markup(_curve(losses, lines, result)) if lines else None,
        lines=[
            {
                **line,
                "barrier": _number(line["barrier"]),
                "at": _number(line["at"]) if line["barrier"] else "-",
            }
            for line in lines
        ],
        on_line=result["method"] in ("weights", "average"),
        scores=_scores(result, names),
        scored_as_is="batch_norm" in result,
        matching=_matching(result, names),
        alignment=_alignment(result.get("alignment") or {}),
        differences=_differences(result, names),
        done=_done(result),
        command=result["command"],
    )


def _headline(result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    barriers = [_number(line["barrier"]) for line in lines]
    if len(lines) > 1:
        return f"The barrier between the two goes from {barriers[0]} to {barriers[-1]}"
    if lines and lines[0]["barrier"] == 0:
        return "No barrier lies between the two"
    if lines:
        return f"A barrier of {barriers[0]} lies between the two"
    count = len(result["models"])
    return (
        f"{count} networks in one"
        if count > 1
        else f"What {result['models'][0]['path']} learned, by {result['models'][0]['weight']:g}"
    )


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else str(value)


def _curve(losses: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> str:
    lambdas = losses["lambdas"]
    with canvas(7.2, 3.4) as figure:
        axes = style_axes(figure.subplots())
        for line in lines:
            heights = line["losses"]
            pattern = tuple(float(part) for part in line["dash"].split())
            colour = SERIES[line["colour"]]
            ends = [heights[0], heights[-1]]
            if line is lines[0] or ends != [lines[0]["losses"][0], lines[0]["losses"][-1]]:
                axes.plot([0, 1], ends, color=MUTED, linewidth=0.8, zorder=2)
            axes.plot(
                lambdas,
                heights,
                color=colour,
                linewidth=2,
                linestyle=(0, pattern) if pattern else "-",
                zorder=3,
            )
            if line["barrier"] > 0:
                axes.plot(
                    [line["at"]],
                    [heights[lambdas.index(line["at"])]],
                    "o",
                    color=colour,
                    markersize=6,
                    zorder=4,
                )
        if result["method"] in ("weights", "average"):
            share = result["models"][1]["weight"]
            axes.plot(
                [share], [losses["merged"]], "o", markerfacecolor=PAGE, markeredgecolor=TEXT, markersize=8,
                markeredgewidth=1.4, zorder=5,
            )  # fmt: skip
        axes.set_xlim(0, 1)
        axes.set_xlabel("λ, the second network's share")
        axes.set_ylabel("loss")
        label = "Loss along the line between the networks. " + " ".join(
            f"{line['label']}: barrier {_number(line['barrier'])} at {_number(line['at'])}." for line in lines
        )
        return svg(figure, "merge curve", label)


def _scores(result: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    columns: dict[str, list[float]] = {}
    if "scores" in result:
        scores = result["scores"]
        columns |= {
            f"test {key}": [s[key] for s in (*scores["models"], scores["merged"])] for key in scores["merged"]
        }
    if "losses" in result:
        columns["held-out loss"] = [*result["losses"]["models"], result["losses"]["merged"]]
    if not columns:
        return None
    rows = [
        {"name": name, "cells": [f"{values[i]:.4g}" for values in columns.values()]}
        for i, name in enumerate([*names, "merged"])
    ]
    return {"names": list(columns), "rows": rows}


def _matching(result: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    if "matching" not in result:
        return None
    matching = result["matching"]
    distance = matching["distance"]
    rows = [
        {
            "name": name,
            "moved": f"{moved:,}",
            "before": f"{before:.4g}",
            "after": f"{after:.4g}",
            "share": f"{100 * (1 - after / before):.1f} %" if before else "-",
        }
        for name, moved, before, after in zip(
            names[1:], matching["moved"], distance["before"], distance["after"], strict=True
        )
    ]
    groups, units = matching["groups"], matching["units"]
    lead = f"{units:,} units in {groups} {'group' if groups == 1 else 'groups'} that move together were free to move."
    return {"rows": rows, "norm": f"{distance['norm']:.4g}", "lead": lead}


def _alignment(alignment: Mapping[str, Any]) -> dict[str, Any] | None:
    if not alignment:
        return None
    before, after = alignment["before"], alignment["after"]
    names = [name for name in before["per_layer"] if name in after["per_layer"]]
    shown = names[:_MOST_LAYERS]
    legend = [
        {"label": label, "colour": colour, "dash": ""}
        for label, colour, _ in (_LABELS["before"], _LABELS["after"])
    ]
    with canvas(7.2, 0.9 + 0.24 * len(shown)) as figure:
        axes = style_axes(figure.subplots(), grid="x")
        for row, name in enumerate(shown):
            pair = before["per_layer"][name], after["per_layer"][name]
            axes.plot(pair, [row, row], color=GRID, linewidth=3, zorder=2)
            for value, (_, colour, _) in zip(pair, (_LABELS["before"], _LABELS["after"]), strict=True):
                axes.plot([value], [row], "o", color=SERIES[colour], markersize=6, zorder=3)
        axes.axvline(0, color=MUTED, linewidth=0.7)
        axes.axvline(1, color=GOOD, linewidth=0.7)
        axes.set_yticks(range(len(shown)), [_short(name) for name in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlabel("alignment R of the leading singular vectors")
        figure_text = svg(
            figure,
            "merge alignment",
            f"Alignment of leading singular vectors of {len(shown)} layers before and after matching; over all "
            f"layers {_number(before['total'])} before, {_number(after['total'])} after.",
        )
    return {
        "legend": legend,
        "figure": markup(figure_text),
        "total": f"{_number(before['total'])} before, {_number(after['total'])} after",
        "shown": len(shown),
        "more": len(names) > len(shown),
        "rows": [
            {"name": n, "before": _number(before["per_layer"][n]), "after": _number(after["per_layer"][n])}
            for n in names
        ],
    }


def _short(name: str) -> str:
    return name if len(name) <= 44 else f"…{name[-43:]}"


def _differences(result: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    norms = {name: pair for name, pair in result.get("differences", {}).items() if pair[0] > 0}
    if not norms:
        return None
    ratios = sorted(((change / norm, name) for name, (norm, change) in norms.items()), reverse=True)
    pair = [result["base"], *names] if result["base"] is not None else names
    return {
        "names": pair[:2],
        "count": len(ratios),
        "rows": [
            {"name": name, "ratio": _number(ratio), "share": round(100 * min(1.0, ratio / math.sqrt(2)), 1)}
            for ratio, name in ratios[:_MOST_TENSORS]
        ],
    }


def _done(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    word = "Scale" if result["method"] == "task-arithmetic" else "Share"
    rows = [(f"{word} of {model['path']}", f"{model['weight']:.4g}") for model in result["models"]]
    if result["base"] is not None:
        rows.insert(0, ("Base", result["base"]))
    if layers := result.get("batch_norm"):
        rows.append(("Batch norm", f"statistics of {len(layers)} layers taken anew"))
    if "matching" in result:
        rows.append(
            (
                "Checked",
                "each network, permuted at random and as matched, stayed the same function on an example",
            )
        )
        rows.append(("Seed", str(result["seed"])))
    return [*rows, ("Written", result["out"])]
