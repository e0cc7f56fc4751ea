"""How far a reading is, on the terminal."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from weightlab.inspect.layers import Layer
from weightlab.inspect.spectrum import ConvView

_PLAIN_EVERY = 10.0
# What a layer costs beside its arithmetic, in operations.
_EACH = 1e7


def layer_work(layer: Layer, conv: ConvView = "slices") -> float:
    """Estimate the operations of a layer's spectrum: `m²·n + (4/3)·m³` a matrix, m the shorter side.

    Example:
        >>> import torch
        >>> layer = Layer("w", "matrix", (300, 600), torch.float32, lambda: torch.ones(300, 600))
        >>> round(layer_work(layer) / 1e6)
        100
    """
    if layer.kind == "delta":
        return _EACH
    positions = math.prod(layer.shape[2:])
    sliced = conv == "slices"
    m, n = sorted((layer.shape[0], layer.shape[1] * (1 if sliced else positions)))
    return _EACH + (positions if sliced else 1) * (m * m * n + 4 / 3 * m**3)


class WorkBar:
    """Shows work of known size on standard error: a bar on a terminal, elsewhere a line about every 10 seconds.

    Args:
        quiet: Show nothing.
        console: Where to draw; standard error by default.

    Example:
        >>> with WorkBar(quiet=True) as bar:
        ...     bar.start(total=10.0, items=2)
        ...     bar.begin("first")
        ...     bar.finish(4.0)
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._quiet = quiet
        self._bar: Progress | None = None
        self._started = self._told = time.monotonic()
        self._total, self._work, self._items, self._done = 1.0, 0.0, 0, 0

    def __enter__(self) -> WorkBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """Print a line."""
        if not self._quiet:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(self, *, total: float, items: int) -> None:
        """Begin with so much work in so many items."""
        self._total, self._items = max(total, 1.0), items
        self._started = self._told = time.monotonic()
        if not self._quiet and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("{task.fields[items]}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:.0f} %"),
                TimeElapsedColumn(),
                TextColumn("·"),
                TimeRemainingColumn(),
                TextColumn("left"),
                TextColumn("{task.description}", markup=False),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._bar.add_task("", total=self._total, items=f"0/{items} layers")

    def begin(self, name: str) -> None:
        """Name the item that is being worked on."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=name)

    def finish(self, work: float) -> None:
        """Count one item and its work."""
        self._done += 1
        self._work += work
        items = f"{self._done}/{self._items} layers"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._work, items=items)
        elif time.monotonic() - self._told >= _PLAIN_EVERY:
            self._told = time.monotonic()
            share = 100 * self._work / self._total
            self.say(f"{items}, {share:.0f} % of the work, {self._told - self._started:.0f} s")
