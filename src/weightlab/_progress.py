"""How far work is, on the terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY = 10.0


class WorkBar:
    """Shows work on standard error: a bar on a terminal, elsewhere a line about every 10 seconds.

    Args:
        quiet: Show nothing.
        console: Where to draw; standard error by default.

    Example:
        >>> with WorkBar(quiet=True) as bar:
        ...     bar.tell("layer 1 of 2", 4.0, 10.0)
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._quiet = quiet
        self._drawn = not quiet and self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar: Progress | None = None
        self._row = TaskID(0)
        self._started = self._told = time.monotonic()

    def __enter__(self) -> WorkBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def say(self, text: str) -> None:
        """Print a line."""
        if not self._quiet:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def phase(self, text: str) -> None:
        """Print a line and begin something new, with a bar of its own."""
        self._stop()
        self.say(text)
        self._started = self._told = time.monotonic()

    def tell(self, what: str, done: float, total: float) -> None:
        """Show what is being done, and how much of how much is done; one step is of unknown length."""
        known = total > 1
        if self._drawn:
            if self._bar is None:
                self._start()
            assert self._bar is not None
            self._bar.update(self._row, description=what, completed=done, total=total if known else None)
        elif time.monotonic() - self._told >= PLAIN_EVERY:
            self._told = time.monotonic()
            share = f", {100 * done / total:.0f} %" if known else ""
            self.say(f"{what}{share}, {self._told - self._started:.0f} s")

    def _start(self) -> None:
        self._bar = Progress(
            BarColumn(),
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
        self._row = self._bar.add_task("", total=None)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
