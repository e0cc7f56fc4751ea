"""Tables of layers that leave out what a terminal has no room for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from weightlab.inspect.numbers import shown

if TYPE_CHECKING:
    from weightlab.inspect.report import LayerRow, Report

_SUFFIX = ".weight"
_GAP = 2
_LEAST_NAME = 12


@dataclass(frozen=True)
class Column:
    """A column: its head, its cells, its foot, and how much it matters: the least important go first."""

    head: str
    cells: Sequence[str]
    foot: str = ""
    rank: int = 0

    @property
    def width(self) -> int:
        """Characters that it needs."""
        return max(len(text) for text in (self.head, self.foot, *self.cells))


def shortened(names: Sequence[str]) -> tuple[str, list[str]]:
    """Leave out the parts that all names begin with, and `.weight` if all end with it.

    Returns:
        A head that tells what they begin with, and what is left of each.

    Example:
        >>> shortened(["model.h.0.q.weight", "model.h.1.q.weight"])
        ('model.h.*', ['0.q', '1.q'])
    """
    suffix = _SUFFIX if all(name.endswith(_SUFFIX) for name in names) else ""
    # Columns of equal parts, none of which is a name's last.
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False) if len(names) > 1 else ()
    common = list(itertools.takewhile(lambda parts: len(set(parts)) == 1, columns))
    start = "".join(f"{parts[0]}." for parts in common)
    return f"{start}*" if start else "layer", [name.removesuffix(suffix)[len(start) :] for name in names]


def fitting_table(
    title: str, names: Sequence[str], foot: str, columns: Sequence[Column], notes: Column, width: int | None
) -> Table:
    """Build a table of layers, without the columns of highest rank that do not fit.

    Args:
        title: Stands above it.
        names: Names of the layers. `.weight` is left out if all end with it.
        foot: Stands under the names.
        columns: Numbers.
        notes: The last column, wrapped if there is no room.
        width: Characters to be had. None: any.

    Example:
        >>> columns = [Column("α", ["2.5"], "2.5"), Column("tail", ["40"], "", rank=1)]
        >>> table = fitting_table("model", ["w.weight"], "mean", columns, Column("flags", [""]), width=18)
        >>> [column.header for column in table.columns]
        ['layer', 'α', 'flags']
    """
    head, names = shortened(names)
    longest = max([len(head), len(foot), *map(len, names)])
    kept = list(columns)

    def room() -> float:
        """What is left for names and notes."""
        return math.inf if width is None else width - sum(column.width + _GAP for column in kept) - _GAP

    name_width = min(longest, max(_LEAST_NAME, (width or longest) // 3))
    while kept and room() < name_width + min(notes.width, 14):
        kept.remove(max(kept, key=lambda column: column.rank))
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column(head, overflow="fold", min_width=name_width)
    for column in kept:
        table.add_column(column.head, justify="right", no_wrap=True)
    table.add_column(notes.head, overflow="fold")
    for index, name in enumerate(names):
        # As Text, because brackets in names are not rich's markup.
        table.add_row(Text(name), *(column.cells[index] for column in kept), notes.cells[index])
    table.add_section()
    table.add_row(foot, *(column.foot for column in kept), notes.foot, style="bold")
    return table


# Head, attribute, rank.
_REPORT = (
    ("shape", "shape", 5),
    ("α", "alpha", 0),
    ("±σ", "sigma", 1),
    ("tail", "n_tail", 1),
    ("D", "ks", 6),
    ("gap", "erg_gap", 2),
    ("α̂", "alpha_hat", 3),
    ("stable", "stable_rank", 4),
    ("eff.", "effective_rank", 8),
    ("rank", "matrix_rank", 7),
    ("log norm", "log_norm", 4),
    ("log spec", "log_spectral_norm", 8),
    ("orth.", "orthogonality", 9),
)
_SHUFFLED = (("soft rank", "rand_softrank", 3), ("traps", "n_traps", 3), ("dist.", "rand_distance", 9))


def report_table(report: Report, width: int | None = None) -> Table:
    """Return a table of a report, one row a layer.

    Args:
        report: The report.
        width: Characters to be had; columns of less importance are left out where they do not fit. None: any.
    """
    rows = report.rows
    shuffled = any(row.n_traps is not None for row in rows)
    columns = [
        Column(
            head,
            [_cell(row, name) for row in rows],
            shown(report.summary[name]) if name in report.summary else "",
            rank,
        )
        for head, name, rank in _REPORT + (_SHUFFLED if shuffled else ())
    ]
    notes = [", ".join(row.flags) or ("" if row.status == "ok" else row.status) for row in rows]
    foot = f"mean of {report.summary['fitted']:.0f} fitted"
    return fitting_table(
        report.source, [row.name for row in rows], foot, columns, Column("flags", notes), width
    )


def _cell(row: LayerRow, name: str) -> str:
    value = getattr(row, name)
    return "×".join(map(str, value)) if isinstance(value, tuple) else shown(value)
