"""What the pages of a report and of a comparison have in common."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weightlab.inspect.binned_spectrum import BinnedSpectrum
from weightlab.inspect.layer_changes import ChangeRow
from weightlab.inspect.numbers import shown
from weightlab.inspect.report import FLAGS, LayerRow
from weightlab.inspect.tables import shortened

Spectra = Mapping[str, Mapping[str, BinnedSpectrum]]

HIGHEST = 12.0
"""Above this, an α is drawn at the border: random matrices have any."""

# So many spectra are open when the page is; more are folded by kind of layer.
_OPEN = 60
_COLOURS = 7


class Kinds:
    """Layers by name without numbers: those that recur along the depth have a colour."""

    def __init__(self, names: Sequence[str]) -> None:
        self.start, short = shortened(names)
        self.short = dict(zip(names, short, strict=True))
        self.kind = {name: re.sub(r"\d+", "#", short) for name, short in self.short.items()}
        members = Counter(self.kind.values())
        self.members = members
        common = sorted((kind for kind in members if members[kind] > 1), key=lambda kind: -members[kind])
        chosen = [kind for kind in members if kind in common[:_COLOURS]]
        numbers = {kind: index + 1 for index, kind in enumerate(chosen)} if len(chosen) > 1 else {}
        rest = 0 if numbers else 1
        self.colours = {name: numbers.get(kind, rest) for name, kind in self.kind.items()}
        self.legend = [(kind, number, members[kind]) for kind, number in numbers.items()]
        others = sum(colour == 0 for colour in self.colours.values())
        if others and self.legend:
            self.legend.append(("others", 0, others))


def card_entry(name: str, value: str, text: str) -> dict[str, str]:
    """A number at the top of a page, with its name and what it is."""
    return {"name": name, "value": value, "text": text}


def shape_text(shape: Iterable[int]) -> str:
    """Write a shape, as 3×4."""
    return "×".join(map(str, shape))


def flag_entry(flag: str, names: Sequence[str], rows: Sequence[LayerRow | ChangeRow]) -> dict[str, Any]:
    """A flag, its meaning, and the layers that have it with their places."""
    places = {row.name: index for index, row in enumerate(rows)}
    return {
        "name": flag,
        "meaning": FLAGS[flag],
        "layers": [(name, places.get(name)) for name in names],
    }


def table_row(
    row: LayerRow | ChangeRow, index: int, columns: Sequence[tuple[str, str]], kinds: Kinds
) -> dict[str, Any]:
    """A row of the table: cells with what is shown and what is sorted by."""
    values = [getattr(row, column) for _, column in columns]
    return {
        "index": index,
        "short": kinds.short[row.name],
        "shape": shape_text(row.shape),
        "size": math.prod(row.shape),
        "colour": kinds.colours[row.name],
        "cells": [
            (shown(value), "" if value is None or not math.isfinite(value) else f"{value:.9g}")
            for value in values
        ],
        "notes": notes_text(row),
    }


def notes_text(row: LayerRow | ChangeRow) -> str:
    """What there is to say of a layer beside its numbers."""
    if isinstance(row, LayerRow):
        return ", ".join(row.flags) or ("" if row.status == "ok" else row.status)
    return row.notes


def grouped(cards: Sequence[dict[str, Any]], kinds: Kinds) -> list[dict[str, Any]]:
    """All cards at once, or by kind of layer where there are many."""
    if len(cards) <= _OPEN:
        return [{"name": "", "cards": list(cards)}]
    groups: dict[str, list[dict[str, Any]]] = {}
    for card in cards:
        kind = kinds.kind[card["name"]]
        groups.setdefault(kind if kinds.members[kind] > 1 else "others", []).append(card)
    return [{"name": name, "cards": members} for name, members in groups.items()]
