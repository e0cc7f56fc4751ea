"""What a merge of files shows on the terminal: its progress, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from weightlab.merge.stored_weights import file_size

_PLAIN_EVERY = 10.0


class MergeDisplay:
    """Shows steps of a merge on a console: a bar on a terminal, elsewhere a line about every 10 seconds.

    Args:
        console: Where to draw.
        quiet: Show nothing.

    Example:
        >>> with MergeDisplay(Console(), quiet=True) as display:
        ...     display.tell("writing", 1, 10)
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console, self._quiet = console, quiet
        self._bar: Progress | None = None
        self._row = TaskID(0)
        self._told = time.monotonic()

    def __enter__(self) -> MergeDisplay:
        if not self._quiet and self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
            self._row = self._bar.add_task("", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tell(self, what: str, done: int, total: int) -> None:
        """Show what is being done, how many steps of it are done, and of how many."""
        if self._bar is not None:
            # One step of unknown length has a bar that runs to and fro.
            self._bar.update(self._row, description=what, completed=done, total=total if total > 1 else None)
        elif not self._quiet and time.monotonic() - self._told >= _PLAIN_EVERY:
            self._told = time.monotonic()
            steps = f" {done}/{total}" if total > 1 else ""
            self._console.print(f"{what}{steps}", markup=False, highlight=False, soft_wrap=True)


def summary(result: Mapping[str, Any]) -> str:
    """Return what `merge_checkpoints` did as a few lines of text."""
    parts = [f"{model['weight']:.4g} × {model['path']}" for model in result["models"]]
    start = "" if result["base"] is None else f"{result['base']} + "
    lines = [f"{result['method']}: {start}{' + '.join(parts)}", *_matching(result), *_losses(result)]
    if layers := result.get("batch_norm"):
        lines.append(f"statistics of {len(layers)} batch norm layers taken anew")
    lines += [f"note: {note}" for note in result["notes"]]
    where = "" if result["report"] is None else f", report: {result['report']}"
    size = f"{result['tensors']} tensors, {result['parameters']:,} parameters, {file_size(result['bytes'])}"
    return "\n".join([*lines, f"{size}, {result['seconds']:.1f} s: {result['out']}{where}"])


def _matching(result: Mapping[str, Any]) -> list[str]:
    if "matching" not in result:
        return []
    matching = result["matching"]
    moved = "; ".join(f"{count:,}" for count in matching["moved"])
    before, after = (_each(matching["distance"][key]) for key in ("before", "after"))
    return [
        f"moved {moved} of {matching['units']:,} units in {matching['groups']} groups; distance {before} before, {after} after"
    ]


def _losses(result: Mapping[str, Any]) -> list[str]:
    lines = []
    if "losses" in result:
        losses = result["losses"]
        lines.append(
            f"loss on {losses['data']}: models {_each(losses['models'])}; merged {losses['merged']:.4g}"
        )
        barriers = [
            f"{losses[key]['barrier']:.4g} {label}"
            for key, label in (
                ("before", "as they are"),
                ("after", "matched"),
                ("reset", "with new statistics"),
            )
            if key in losses
        ]
        if barriers:
            lines.append(f"barrier: {', '.join(barriers)}")
    if "scores" in result:
        scores = result["scores"]
        for name, merged in scores["merged"].items():
            lines.append(f"{name}: models {_each([s[name] for s in scores['models']])}; merged {merged:.4g}")
    return lines


def _each(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
