"""The page of a scored data set: sheets of its hardest and likely mislabelled examples, and what retraining gave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightlab._pages import drawing
from weightlab._pages.shell import markup, render
from weightlab.inspect.scored_data import DataScores, rank_correlation
from weightlab.inspect.scoring import SCORES
from weightlab.trial.scoring.pictures import Pictures
from weightlab.trial.scoring.retraining import ALL, Recipe, Retrained
from weightlab.trial.scoring.sources import Source

LIKELY = 0.5
WEAK = 0.3
BINS = 60
TITLES = {
    "el2n": "EL2N",
    "grand": "GraNd",
    "forgetting": "forgetting",
    "margin": "margin",
    "loss": "loss",
    "aum": "AUM",
}
_VALUES = 6


def page(
    source: Source,
    found: Mapping[str, DataScores],
    *,
    facts: Sequence[str],
    show: int,
    retrained: Sequence[Retrained] = (),
    recipe: Recipe | None = None,
    notes: Sequence[str] = (),
    command: str = "",
    versions: str = "",
) -> str:
    """Return the page.

    Args:
        source: The examples.
        found: Scores by name; the first is the one that the sheets follow.
        facts: What to say of the data and the training, in short.
        show: Examples on a sheet.
        retrained: What retraining gave.
        recipe: How that was done.
        notes: What the reader must know.
        command: How to repeat it.
        versions: What it depends on.

    Raises:
        MissingDependencyError: Without matplotlib, jinja2 or, for images, Pillow.
    """
    name, result = next(iter(found.items()))
    title = TITLES[name]
    order, suspicion = result.order(), result.suspicion
    suspects = suspicion.argsort(descending=True, stable=True)
    suspects = suspects[suspicion[suspects] > 0][:show]
    likely = int((suspicion >= LIKELY).sum())
    cells = _Cells(source, result)
    n = len(order)
    return render(
        "weightlab.trial.scoring",
        "page.html.j2",
        title=f"data scores of {source.name}",
        name=source.name,
        headline=_headline(likely, n, otherwise(result)),
        facts=facts,
        notes=notes,
        score=title,
        meaning=SCORES[name],
        likely=f"{LIKELY:g}",
        suspects=cells.of(suspects),
        hardest=cells.of(order[:show]),
        easiest=cells.of(order.flip(0)[: min(show, 16)]),
        cell=6.6 if cells.pictures.drawn else 9,
        rendering="pixelated" if max(cells.pictures.shape) < 64 else "auto",
        histogram=markup(_histogram(result, title)),
        agreement=_agreement(result),
        never=int(result.scores.isinf().sum()),
        names=[TITLES[other] for other in found],
        correlations=_correlations(found),
        classes=_classes(source, result),
        retraining=_retraining(retrained, recipe, n) if recipe and retrained else None,
        terms=_terms(found),
        command=command,
        versions=versions,
    )


def otherwise(result: DataScores) -> float:
    """Return the share of examples for which another class than the label is predicted."""
    return float((result.predicted != result.targets).double().mean())


def _headline(likely: int, n: int, predicted_otherwise: float) -> str:
    if predicted_otherwise > WEAK:
        return f"{n:,} examples scored, by models that learned too little to judge labels by"
    if likely == 0:
        return f"None of {n:,} examples looks mislabelled"
    return f"{likely:,} of {n:,} examples {'looks' if likely == 1 else 'look'} mislabelled"


class _Cells:
    """Examples as the sheets show them."""

    def __init__(self, source: Source, result: DataScores) -> None:
        self.source = source
        self.pictures = Pictures(source.inputs)
        self._scores, self._predicted = result.scores.tolist(), result.predicted.tolist()
        self._suspicion = result.suspicion.tolist()

    def of(self, indices: Tensor) -> list[dict[str, Any]]:
        height, width = self.pictures.shape
        return [
            {
                "index": index,
                "label": self.source.called(int(self.source.labels[index])),
                "predicted": self.source.called(self._predicted[index]),
                "score": number(self._scores[index]),
                "suspect": self._suspicion[index] >= LIKELY,
                "image": self.pictures.url(index) if self.pictures.drawn else "",
                "height": round(96 * height / max(width, 1)),
                "content": "" if self.pictures.drawn else self._values(index),
            }
            for index in indices.tolist()
        ]

    def _values(self, index: int) -> str:
        values = self.source.inputs[index].flatten()
        more = ", ..." if len(values) > _VALUES else ""
        return ", ".join(f"{value:.3g}" for value in values[:_VALUES].tolist()) + more


def number(value: float) -> str:
    """Write a score in three digits.

    Example:
        >>> number(0.12345), number(float("inf"))
        ('0.123', '∞')
    """
    return "∞" if math.isinf(value) else f"{value:.3g}"


def _histogram(result: DataScores, title: str) -> str:
    scores = result.scores
    finite = scores[scores.isfinite()]
    low, high = (float(value) for value in torch.aminmax(finite)) if len(finite) else (0.0, 1.0)
    high = high if high > low else low + 1
    step = (high - low) / BINS
    # What was never learned stands apart, two bins beyond the rest.
    scores = torch.where(scores.isinf(), high + 2.5 * step, scores)
    edges = low + step * torch.arange(BINS + (3 if len(finite) < len(scores) else 0) + 1)
    right = result.predicted == result.targets
    with drawing.canvas(9.0, 2.9) as figure:
        axes = drawing.style_axes(figure.subplots(), grid="y")
        for place, part in ((1, scores[right]), (2, scores[~right])):
            axes.hist(part.numpy(), bins=edges.numpy(), color=drawing.SERIES[place], alpha=0.75)
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel=title, ylabel="examples", ylim=(0, None))
        return drawing.svg(figure, "histogram", f"histogram of {title}")


def _agreement(result: DataScores) -> str:
    runs = len(result.per_run)
    if runs == 1:
        return "One run only: scores of single runs are noisy, ten are the paper's number."
    return (
        f"A run's ranking correlates with that of the other {runs - 1} by {result.agreement():.3f} on average "
        "(Spearman); where that is low, more runs are needed."
    )


def _correlations(found: Mapping[str, DataScores]) -> list[dict[str, Any]]:
    if len(found) == 1:
        return []
    return [
        {
            "name": TITLES[first],
            "cells": [f"{rank_correlation(result.scores, other.scores):.2f}" for other in found.values()],
        }
        for first, result in found.items()
    ]


def _classes(source: Source, result: DataScores) -> list[dict[str, Any]]:
    scores, predicted, suspicion = result.scores, result.predicted, result.suspicion
    rows = []
    for label in source.labels.unique().tolist():
        members = source.labels == label
        own = scores[members]
        finite = own[own.isfinite()]
        mean = float(finite.mean()) if len(finite) else math.inf
        others = predicted[members & (predicted != label)]
        rows.append(
            {
                "name": source.called(label),
                "examples": f"{int(members.sum()):,}",
                "value": mean,
                "mean": number(mean),
                "other": f"{100 * len(others) / int(members.sum()):.1f} %",
                "most": source.called(int(others.mode().values)) if len(others) else "",
                "suspects": f"{int((suspicion[members] >= LIKELY).sum()):,}",
            }
        )
    rows.sort(key=lambda row: -row["value"])
    values = [row["value"] for row in rows if math.isfinite(row["value"])]
    low, high = min([0.0, *values]), max([0.0, *values])
    for row in rows:
        share = (min(row["value"], high) - low) / (high - low) if high > low else 0.0
        row["share"] = f"{100 * share:.1f}"
    return rows


def _retraining(retrained: Sequence[Retrained], recipe: Recipe, n: int) -> dict[str, Any]:
    rows = [
        {
            "name": row.choice.name,
            "examples": f"{row.examples:,}",
            "error": f"{100 * row.error:.2f} %",
            "to_all": _difference(row.to_all),
            "to_random": _difference(row.to_random),
        }
        for row in retrained
    ]
    return {
        "lead": verdict(retrained),
        "figure": markup(_pruning_curve(retrained)),
        "rows": rows,
        "steps": f"{recipe.steps(n):,}",
    }


def verdict(retrained: Sequence[Retrained]) -> str:
    """Say in a sentence or two how far pruning by score goes, and whether it beats a random choice."""
    hardest = [row for row in retrained if row.choice.how == "hardest"]
    no_worse = [row for row in hardest if row.to_all and row.to_all[1][0] <= 0]
    better = [row for row in hardest if row.to_random and row.to_random[1][1] < 0]
    worse = [row for row in hardest if row.to_random and row.to_random[1][0] > 0]
    parts = []
    if no_worse:
        most = max(row.choice.pruned for row in no_worse)
        parts.append(
            f"Without the easiest {100 * most:g} % the test error is not measurably higher than with all examples."
        )
    else:
        parts.append("Every pruning raised the test error measurably.")
    for rows, how in ((better, "better"), (worse, "worse")):
        if rows:
            shares = " and ".join(f"{100 * row.choice.pruned:g}" for row in rows)
            parts.append(f"At {shares} % the hardest are {how} to train on than a random choice.")
    if hardest and not better and not worse:
        parts.append("The hardest differ from a random choice at no fraction measurably.")
    return " ".join(parts)


def _difference(value: tuple[float, tuple[float, float]] | None) -> dict[str, str] | None:
    if value is None:
        return None
    mean, (low, high) = value
    tone = "tone held" if high < 0 else "tone not-held" if low > 0 else ""
    return {"text": f"{100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]", "tone": tone}


def _pruning_curve(retrained: Sequence[Retrained]) -> str:
    everything = next(row for row in retrained if row.choice.how == ALL)
    ways: dict[str, list[Retrained]] = {}
    for row in retrained:
        if row.choice.how != ALL:
            ways.setdefault(row.choice.way, [everything]).append(row)
    with drawing.canvas(9.0, 3.6) as figure:
        axes = drawing.style_axes(figure.subplots())
        for place, (way, rows) in enumerate(ways.items()):
            colour = drawing.SERIES[1 + place]
            x = [100 * row.choice.pruned for row in rows]
            axes.plot(x, [100 * row.error for row in rows], color=colour, marker="o", markersize=4, label=way)
            if len(everything.errors) > 1:
                low, high = ([100 * row.interval[side] for row in rows] for side in (0, 1))
                axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.axhline(100 * everything.error, color=drawing.MUTED, linewidth=1, linestyle="--", label=ALL)
        axes.set(xlabel="examples left out, %", ylabel="test error, %")
        axes.legend(frameon=False)
        return drawing.svg(figure, "pruning", "test error by share of examples left out")


def _terms(found: Mapping[str, DataScores]) -> list[tuple[str, str]]:
    terms = [(TITLES[name], SCORES[name]) for name in found]
    return [
        *terms,
        ("Harder", "The larger a score, the harder the example was for models early in training."),
        (
            "Suspicion",
            "How far another class is ahead of the label (mean probability over the runs), times the share of examples "
            "with no higher score; between 0 and 1.",
        ),
        (
            "Epochs",
            "The models were trained on these examples, a few epochs only: the longer, the more wrong labels are learned "
            "by heart and look right.",
        ),
        (
            "Pruning",
            "Keeping the hardest examples works while enough are left; with few left, a random choice is better. Wrong "
            "labels are kept first: mend or leave them out before.",
        ),
    ]
