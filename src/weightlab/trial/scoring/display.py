"""How far the scoring is, on the terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_PLAIN_EVERY = 10.0


class Display:
    """Shows a bar on a terminal, elsewhere a line about every 10 seconds; on standard error.

    Args:
        quiet: Show nothing.
        console: Where to draw; standard error by default.

    Example:
        >>> with Display(quiet=True) as display:
        ...     display.tell(1, 10, "run 1 of 2")
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._quiet = quiet
        self._bar: Progress | None = None
        self._shown = time.monotonic()
        if not quiet and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:.0f} %"),
                TimeElapsedColumn(),
                TextColumn("·"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self._console,
                transient=True,
            )

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        if not self._quiet:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def phase(self, text: str) -> None:
        """Begin something new, with a bar of its own."""
        self.say(text)
        if self._bar is not None:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task("", total=None)

    def tell(self, done: int, total: int, message: str) -> None:
        """Show how much is done, of how much, and what is going on."""
        if self._bar is not None:
            if not self._bar.task_ids:
                self._bar.add_task("", total=None)
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=message)
        elif time.monotonic() - self._shown >= _PLAIN_EVERY:
            self._shown = time.monotonic()
            self.say(f"{message}, {100 * done / max(total, 1):.0f} %")
