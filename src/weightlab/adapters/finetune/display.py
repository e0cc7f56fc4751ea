"""How far a fine-tuning is, on the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from weightlab.adapters._peft import TrainerCallback

_PLAIN_EVERY = 10.0


class Display:
    """Shows the phases of a fine-tuning on standard error.

    On a terminal: a spinner for phases of unknown length, a bar with step, loss and time left for training. Elsewhere:
    a line when a phase ends, and about every 10 seconds of training.

    Args:
        quiet: Show nothing.
        console: Where to draw; standard error by default.

    Example:
        >>> display = Display(quiet=True)
        >>> with display.phase("loading the model"):
        ...     pass
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._quiet = quiet
        self._drawn = not quiet and self._console.is_terminal and not self._console.is_dumb_terminal
        self._shown = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line."""
        if not self._quiet:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show that something is being done, and how long it took."""
        started = time.monotonic()
        if self._drawn:
            with self._progress(
                SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
            ) as bar:
                bar.add_task(name, total=None)
                yield
        else:
            yield
        self.say(f"{name}: {time.monotonic() - started:.1f} s")

    @contextmanager
    def training(self, total: int, done: int) -> Iterator[TrainerCallback]:
        """Show training; the callback it gives tells it of steps and losses."""
        if not self._drawn:
            yield _Watch(self, None, total)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps{task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("·"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        with self._progress(*columns) as bar:
            bar.add_task("training", total=total, completed=done, loss="")
            yield _Watch(self, bar, total)

    def tick(self, text: str) -> None:
        """Print a line if the last one is some time ago."""
        if time.monotonic() - self._shown >= _PLAIN_EVERY:
            self._shown = time.monotonic()
            self.say(text)

    def _progress(self, *columns: Any) -> Progress:
        return Progress(*columns, console=self._console, transient=True)


class _Watch(TrainerCallback):
    def __init__(self, display: Display, bar: Progress | None, total: int) -> None:
        self.display, self.bar, self.total = display, bar, total
        self.loss = ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is None:
            self.display.tick(f"step {state.global_step} of {self.total}{self.loss}")
        else:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.loss = f" · loss {float(logs['loss']):.4f}"
            if self.bar is not None:
                self.bar.update(self.bar.task_ids[0], loss=self.loss)
