"""Two checkpoints of one architecture beside each other: what training in between has changed in each layer."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.jupyter import JupyterMixin
from rich.table import Table
from torch import Tensor

from weightlab._lazy import require
from weightlab.inspect.checkpoint import Checkpoint, Source
from weightlab.inspect.layer_changes import Change, ChangeRow, change_rows
from weightlab.inspect.layer_pairs import Pairing, pair_layers
from weightlab.inspect.numbers import csv_text, json_text, shown
from weightlab.inspect.report import Report, Tell, make_report
from weightlab.inspect.spectrum import ConvView
from weightlab.inspect.tables import Column, fitting_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MEANS = ("alpha_before", "alpha_after", "relative_norm", "stable_rank", "effective_rank", "overlap")
# Head, attribute, and how soon it is left out where there is no room.
_SHOWN = (
    ("α before", "alpha_before", 1),
    ("α after", "alpha_after", 1),
    ("‖ΔW‖/‖W‖", "relative_norm", 0),
    ("σ max", "spectral_norm", 5),
    ("stable", "stable_rank", 2),
    ("eff.", "effective_rank", 6),
    ("rank", "rank", 3),
    ("α of ΔW", "alpha", 4),
    ("overlap", "overlap", 2),
)


@dataclass(frozen=True)
class Comparison(JupyterMixin):
    """What lies between two checkpoints.

    Attributes:
        before: Report on the first, of the layers that both have.
        after: Report on the second.
        rows: One a layer.
        summary: `layers`, `changed`, `unchanged`, `only_before`, `only_after`, `shapes_differ`, and plain means over the
            layers where there is a number (`alpha_before`, `alpha_after`, `relative_norm`, ...; NaN if there are none).
        only_before: Names of layers that the second lacks.
        only_after: Names of layers that the first lacks.
        shapes_differ: Name -> shapes before and after, of layers that cannot be compared.
        eigenvalues: Name -> eigenvalues of ΔW, ascending, if they were to be kept.
    """

    before: Report
    after: Report
    rows: tuple[ChangeRow, ...]
    summary: dict[str, float]
    only_before: tuple[str, ...] = ()
    only_after: tuple[str, ...] = ()
    shapes_differ: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    eigenvalues: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def new_flags(self) -> dict[str, tuple[str, ...]]:
        """Flag -> names of the layers that have it after, but not before."""
        found = {
            flag: tuple(name for name in names if name not in self.before.flags.get(flag, ()))
            for flag, names in self.after.flags.items()
        }
        return {flag: names for flag, names in found.items() if names}

    def table(self, width: int | None = None) -> Table:
        """Return a rich table of the most telling columns; of those, what fits into so many characters."""
        columns = [
            Column(
                head,
                [shown(getattr(row, name)) for row in self.rows],
                shown(self.summary[name]) if name in self.summary else "",
                rank,
            )
            for head, name, rank in _SHOWN
        ]
        shapes = Column("shape", ["×".join(map(str, row.shape)) for row in self.rows], rank=5)
        title = f"{self.before.source} → {self.after.source}"
        notes = Column("status", [row.notes for row in self.rows])
        foot = f"mean of {self.summary['layers']:.0f}"
        return fitting_table(title, [row.name for row in self.rows], foot, [shapes, *columns], notes, width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table(options.max_width)

    def plot(self) -> Figure:
        """Draw each layer's exponent before and after, and under it the relative size of the change.

        Returns:
            A `matplotlib.figure.Figure`; save it with `savefig`.

        Raises:
            MissingDependencyError: If matplotlib is not installed.
        """
        figure: Figure = require("matplotlib.figure", "trial").Figure(figsize=(8, 6), layout="constrained")
        above, below = figure.subplots(2, sharex=True)
        places = range(len(self.rows))
        above.plot(places, [row.alpha_before for row in self.rows], "o", markersize=4, label="before")
        above.plot(places, [row.alpha_after for row in self.rows], "x", markersize=5, label="after")
        above.axhspan(2, 6, color="tab:green", alpha=0.08)
        above.set(title=f"{self.before.source} → {self.after.source}", ylabel="α")
        above.legend(loc="upper right", fontsize=8)
        below.bar(places, [row.relative_norm for row in self.rows])
        below.set(ylabel="‖ΔW‖ / ‖W‖")
        if len(self.rows) <= 40:
            below.set_xticks(places, [row.name for row in self.rows], rotation=90, fontsize=7)
        return figure

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return all numbers as JSON, NaN and infinity as null, and write it to `path` if given."""
        content = {
            "before": json.loads(self.before.to_json()),
            "after": json.loads(self.after.to_json()),
            "summary": self.summary,
            "only_before": self.only_before,
            "only_after": self.only_after,
            "shapes_differ": self.shapes_differ,
            "new_flags": self.new_flags,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        return json_text(content, path)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the rows as CSV, one column an attribute, empty where there is no number; write it to `path` if given."""
        columns = [column.name for column in dataclasses.fields(ChangeRow)]
        rows = (
            {
                **dataclasses.asdict(row),
                "shape": "x".join(map(str, row.shape)),
                "rows": "->".join(map(str, row.rows or ())),
            }
            for row in self.rows
        )
        return csv_text(columns, rows, path)


def compare_checkpoints(
    before: Source | Checkpoint,
    after: Source | Checkpoint,
    *,
    layers: Sequence[str] | None = None,
    split_qkv: bool = False,
    conv: ConvView = "slices",
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    min_eigenvalues: int = 8,
    max_eigenvalues: int = 15_000,
    keep_eigenvalues: bool = False,
    tell: Tell | None = None,
) -> Comparison:
    """Read two checkpoints of one architecture, as a base and a fine-tuned model, and the change between them.

    Layers are loaded one pair at a time. Names may differ by a prefix, as `h.0...` and `transformer.h.0...`. Tables of
    tokens that have more rows in one are compared where both have rows. Other layers of different shapes, and those
    that only one has, are named and left out.

    Args:
        before: A module, a state dict, or the path of a checkpoint; see [`Checkpoint`][weightlab.inspect.Checkpoint].
        after: Another.
        layers, split_qkv, conv, dtype, device, min_eigenvalues, max_eigenvalues: As for
            [`layer_report`][weightlab.inspect.layer_report]. In float32, effective rank and rank are left out.
        keep_eigenvalues: Whether to keep the spectra, of both and of the change.
        tell: Called before each layer with how many are done, of how many, and its name.

    Returns:
        The comparison. A layer that cannot be read has a row that says so, and the rest goes on.

    Raises:
        TypeError: If `before` or `after` is none of these.
        UsageError: If a file cannot be read, `layers` matches none, a checkpoint is an adapter, or no layer is
            in both.
        ValueError: If an option is unknown or out of range.

    Complexity:
        Three spectra a layer that has changed, one for the others.

    Example:
        >>> base = {"w": torch.eye(32), "fixed": torch.eye(9)}
        >>> comparison = compare_checkpoints(base, base | {"w": base["w"] + 0.5 * torch.eye(32)[0]})
        >>> [(row.name, row.status, round(row.relative_norm, 2), row.rank) for row in comparison.rows]
        [('w', 'too few', 0.5, 1), ('fixed', 'unchanged', 0.0, 0)]
    """
    first = before if isinstance(before, Checkpoint) else Checkpoint(before)
    second = after if isinstance(after, Checkpoint) else Checkpoint(after)
    pairing = pair_layers(first, second, layers=layers, split_qkv=split_qkv)
    results = change_rows(
        pairing.pairs,
        conv=conv,
        dtype=dtype,
        device=device,
        min_eigenvalues=min_eigenvalues,
        max_eigenvalues=max_eigenvalues,
    )
    changes = []
    for index, pair in enumerate(pairing.pairs):
        if tell is not None:
            tell(index, len(pairing.pairs), pair.before.name)
        change = next(results)
        changes.append(change if keep_eigenvalues else change._replace(eigenvalues={}))
    return make_comparison(first.source, second.source, changes, pairing)


def make_comparison(before: str, after: str, changes: Sequence[Change], pairing: Pairing) -> Comparison:
    """Add summary and what could not be compared to the changes of layers.

    Args:
        before: What was read first.
        after: What was read second.
        changes: One a pair of `pairing`.
        pairing: From [`pair_layers`][weightlab.inspect.pair_layers].

    Example:
        >>> make_comparison("a", "b", [], Pairing((), ("w",), (), {})).summary["only_before"]
        1
    """
    rows = tuple(change.row for change in changes)
    unchanged = sum(row.status == "unchanged" for row in rows)
    summary: dict[str, float] = {
        "layers": len(rows),
        "changed": len(rows) - unchanged,
        "unchanged": unchanged,
        "only_before": len(pairing.only_before),
        "only_after": len(pairing.only_after),
        "shapes_differ": len(pairing.shapes_differ),
    }
    for column in _MEANS:
        values = [value for row in rows if math.isfinite(value := float(getattr(row, column)))]
        summary[column] = math.fsum(values) / len(values) if values else math.nan

    def kept(which: str) -> dict[str, Tensor]:
        return {
            change.row.name: change.eigenvalues[which] for change in changes if which in change.eigenvalues
        }

    return Comparison(
        make_report(before, [change.before for change in changes], kept("before")),
        make_report(after, [change.after for change in changes], kept("after")),
        rows,
        summary,
        pairing.only_before,
        pairing.only_after,
        pairing.shapes_differ,
        kept("delta"),
    )
