"""A running trial on the terminal: how far it is, what is in flight, what is best so far."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from weightlab.trial.report import wording
from weightlab.trial.spec import Job, Progress, RunResult, RunSpec

_PLAIN_EVERY = 10.0
_REFRESH_PER_SECOND = 4
_MOST_LINES = 8


@dataclass
class _Flight:
    spec: RunSpec
    step: int = 0
    steps: int = 0
    metric: float | None = None

    @property
    def fraction(self) -> float:
        return min(1.0, self.step / self.steps) if self.steps else 0.0


@dataclass
class _Tally:
    """What is known of one arm."""

    best: float | None = None
    tests: list[float] = field(default_factory=list)
    failed: int = 0


class LiveDisplay:
    """Shows a running trial on standard error.

    On a terminal: a bar with elapsed and remaining time, a line for each run in flight, a line for
    each arm with its best validation score. Elsewhere: a plain line about every 10 seconds and at
    the end of a phase. Calls only note what happened (well under 10 µs); drawing takes place in
    a thread of its own, 4 times a second, and the terminal is restored whichever way the block ends.

    Args:
        metric: Name of the task's deciding metric.
        mode: `"min"` if smaller scores are better, `"max"` if larger ones are.
        total: Runs in all phases together, if known; the bar then covers the whole trial, not just
            the phase.
        quiet: Show nothing.
        console: Where to draw; a rich console on standard error by default.
        clock: Seconds that never go backwards; for tests.

    Example:
        >>> with LiveDisplay("loss", "min", quiet=True) as display:
        ...     display.start_phase("tuning", total=12, done=3)
        ...     display.note("3 runs were in the store")
    """

    def __init__(
        self,
        metric: str,
        mode: Literal["min", "max"],
        *,
        total: int | None = None,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metric = wording.plain(metric)
        self._mode = mode
        self._total = total
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._quiet = quiet
        self._live: Live | None = None
        self._open = False
        self._lock = threading.Lock()
        self._flights: dict[str, _Flight] = {}
        self._tallies: dict[str, _Tally] = {}
        self._phase = ""
        self._phase_total = self._phase_done = self._phase_reused = 0
        self._before = self._before_reused = 0
        self._phase_closed = True
        self._started = self._phase_started = self._last_line = clock()

    def __enter__(self) -> LiveDisplay:
        self._started = self._phase_started = self._last_line = self._clock()
        self._open = not self._quiet
        if self._open and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                get_renderable=self._draw,
                console=self._console,
                refresh_per_second=_REFRESH_PER_SECOND,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        self._close_if_done()
        if self._phase and not self._phase_closed:
            self._say(self._status())
        self._open = False

    def start_phase(self, name: str, total: int, done: int) -> None:
        """Begin a phase, e.g. `"tuning"` or `"report runs"`.

        Args:
            name: What to call it.
            total: Its runs.
            done: How many of them were in the store already.
        """
        self._close_if_done()
        with self._lock:
            self._before += self._phase_done
            self._before_reused += self._phase_reused
            self._phase, self._phase_total, self._phase_done, self._phase_reused = name, total, done, done
            self._phase_closed = False
            self._phase_started = self._last_line = self._clock()
        # A phase wholly from the store ends with the next, when `reused` has told its scores.
        if done < total and self._live is None:
            kept = f", {done} of them kept from before" if done else ""
            self._say(f"{name}: {total} runs{kept}")

    def started(self, job: Job) -> None:
        """Note that a run has begun."""
        with self._lock:
            self._flights[job.spec.key] = _Flight(job.spec, steps=job.spec.steps)

    def progress(self, p: Progress) -> None:
        """Note a sign of life of a run in flight; one from an unknown run is passed over."""
        flight = self._flights.get(p.key)
        if flight is None:
            return
        flight.step, flight.steps = p.step, p.steps
        if p.metric is not None:
            flight.metric = p.metric
        if self._live is None:
            self._now_and_then()

    def finished(self, result: RunResult, score: float) -> None:
        """Note that a run has ended with a score on its split."""
        with self._lock:
            self._flights.pop(result.key, None)
            self._phase_done += 1
            self._count(result, score)
        self._close_if_done()
        if self._live is None and not self._phase_closed:
            self._now_and_then()

    def reused(self, result: RunResult, score: float) -> None:
        """Note the score of a run that was in the store and is counted in `start_phase`'s `done`."""
        with self._lock:
            self._count(result, score)

    def note(self, text: str) -> None:
        """Print a line above the display."""
        self._say(text)

    def _count(self, result: RunResult, score: float) -> None:
        tally = self._tallies.setdefault(result.spec.arm, _Tally())
        if result.status != "ok":
            tally.failed += 1
        if not math.isfinite(score):
            return
        if result.spec.split == "test":
            tally.tests.append(score)
        elif result.status == "ok" and (tally.best is None or self._better(score, tally.best)):
            tally.best = score

    def _better(self, score: float, than: float) -> bool:
        return score < than if self._mode == "min" else score > than

    def _say(self, text: str) -> None:
        if self._open or self._live is not None:
            self._console.print(Text(wording.plain(text)), soft_wrap=self._live is None)

    def _now_and_then(self) -> None:
        if self._open and self._clock() - self._last_line >= _PLAIN_EVERY:
            self._last_line = self._clock()
            self._say(self._status())

    def _close_if_done(self) -> None:
        if self._phase_closed or self._phase_done < self._phase_total:
            return
        self._phase_closed = True
        total, reused = self._phase_total, self._phase_reused
        if not total:
            return
        runs = f"{total} {'run' if total == 1 else 'runs'}"
        if reused == total:
            how = ", kept from before"
        else:
            kept = f", {reused} of them kept from before" if reused else ""
            how = f"{kept}, {wording.duration(self._clock() - self._phase_started)}"
        self._say(f"{self._phase} done: {runs}{how}{self._scores()}")

    def _status(self) -> str:
        flying = len(self._flights)
        return (
            f"{self._phase}: {self._phase_done} of {self._phase_total} runs, {flying} in flight, "
            f"{_clock_time(self._clock() - self._started)} elapsed{self._left()}{self._scores()}"
        )

    def _left(self) -> str:
        remaining = self._remaining()
        return "" if remaining is None else f", about {_clock_time(remaining)} left"

    def _scores(self) -> str:
        """Mean test score of each arm once there are any, else its best validation score."""
        tallies = list(self._tallies.items())
        found = {name: sum(tally.tests) / len(tally.tests) for name, tally in tallies if tally.tests}
        kind = "mean test"
        if not found:
            found = {name: tally.best for name, tally in tallies if tally.best is not None}
            kind = "best validation"
        if not found:
            return ""
        each = ", ".join(f"{wording.plain(name)} {wording.number(score)}" for name, score in found.items())
        return f"; {kind} {self._metric}: {each}"

    def _counts(self) -> tuple[int, int]:
        """Runs done and runs in all, of the trial if its total is known, else of the phase."""
        if self._total is None:
            return self._phase_done, self._phase_total
        return self._before + self._phase_done, max(self._total, self._before + self._phase_total)

    def _remaining(self) -> float | None:
        """Seconds left, if the runs to come are like those carried out here so far."""
        done, total = self._counts()
        whole = self._total is not None
        reused = self._phase_reused + (self._before_reused if whole else 0)
        worked = done - reused + sum(flight.fraction for flight in list(self._flights.values()))
        if done >= total or worked < 0.05:
            return None
        since = self._started if whole else self._phase_started
        return (self._clock() - since) / worked * max(0.0, total - reused - worked)

    def _draw(self) -> Group:
        with self._lock:
            done, total = self._counts()
            flights = list(self._flights.values())
            remaining = self._remaining()
        part = sum(flight.fraction for flight in flights)
        head = Table.grid(padding=(0, 1))
        left = "" if remaining is None else f"· {_clock_time(remaining)} left"
        head.add_row(
            Text(self._phase, "bold"),
            ProgressBar(total=max(total, 1), completed=done + part, width=24),
            Text(f"{done}/{total} runs"),
            Text(f"· {_clock_time(self._clock() - self._started)}", "dim"),
            Text(left, "dim"),
        )
        for column in head.columns:
            column.no_wrap = True
        parts: list[Table | Text] = [head]
        if flights:
            parts.append(_flight_table(flights[:_MOST_LINES], self._metric))
            if len(flights) > _MOST_LINES:
                parts.append(Text(f"  and {len(flights) - _MOST_LINES} more", "dim"))
        if self._tallies:
            parts.append(self._tally_table())
        return Group(*parts)

    def _tally_table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        scores = [tally.best for tally in self._tallies.values() if tally.best is not None]
        best = (min if self._mode == "min" else max)(scores, default=None)
        for name, tally in list(self._tallies.items()):
            row = [Text(f"  {wording.plain(name)}")]
            style = "green" if tally.best is not None and tally.best == best else ""
            row.append(
                Text("" if tally.best is None else f"best validation {wording.number(tally.best)}", style)
            )
            tests = tally.tests
            seeds = f"{len(tests)} {'seed' if len(tests) == 1 else 'seeds'}"
            row.append(Text(f"test {wording.number(sum(tests) / len(tests))}, {seeds}" if tests else ""))
            row.append(Text(f"{tally.failed} failed" if tally.failed else "", "yellow"))
            table.add_row(*row)
        for column in table.columns:
            column.no_wrap = True
        return table


def _flight_table(flights: list[_Flight], metric: str) -> Table:
    table = Table.grid(padding=(0, 2))
    for flight in flights:
        spec = flight.spec
        role = "tuning" if spec.split == "validation" else "report"
        table.add_row(
            Text(f"  {wording.plain(spec.arm)}", "cyan"),
            Text(f"{role}, seed {spec.seed}", "dim"),
            Text(f"step {flight.step}/{flight.steps}"),
            Text("" if flight.metric is None else f"{metric} {wording.number(flight.metric)}"),
            Text(wording.settings(spec.hyperparameters), "dim"),
        )
    for column in table.columns:
        column.no_wrap = True
    table.columns[-1].overflow = "ellipsis"
    return table


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
