"""Runs in this very process, one after another."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from weightlab.trial.engines.base import Engine
from weightlab.trial.engines.outcome import EXECUTE, Watched, perform, resolve
from weightlab.trial.spec import Job, Progress, RunResult

_REPEAT_SECONDS = 1.0


class _TimeUp(BaseException):
    """Not an `Exception`, so that an arm's own `except Exception` does not swallow it."""


class LocalEngine(Engine):
    """Carries out one run at a time in this process; `wait` returns when it is done.

    A run's time limit holds in the main thread on systems with `setitimer`: it interrupts Python
    code, not a single call into C that never comes back. Worker processes have neither restriction.

    Args:
        on_progress: Called with signs of life.
        execute: `"module:function"` that carries out a run.
    """

    capacity = 1

    def __init__(
        self, on_progress: Callable[[Progress], None] | None = None, *, execute: str = EXECUTE
    ) -> None:
        super().__init__(on_progress)
        self._execute = execute
        self._queue: deque[Job] = deque()

    @property
    def running(self) -> int:
        """Runs submitted and not handed back yet."""
        return len(self._queue)

    def submit(self, job: Job) -> None:
        """Take a run; `wait` carries it out."""
        self._queue.append(job)

    def wait(self, timeout: float) -> list[RunResult]:
        """Carry out the run at hand, however long it takes, and hand it back."""
        if not self._queue:
            return []
        job = self._queue.popleft()
        execute = resolve(self._execute)
        watched = Watched(job)
        watched.start()  # before the alarm is set, so that a run that it ends has lasted as long as it says
        try:
            with _limited_to(job.timeout):
                return [perform(execute, job, self.on_progress, watched)]
        except _TimeUp:
            return [watched.timed_out()]

    def close(self) -> None:
        """Forget what was submitted."""
        self._queue.clear()


@contextmanager
def _limited_to(seconds: float | None) -> Iterator[None]:
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if seconds is None or not usable:
        yield
        return

    def expire(number: int, frame: object) -> None:
        # Once more if the first one was caught on its way up, e.g. by a bare `except` or in a finalizer.
        signal.setitimer(signal.ITIMER_REAL, _REPEAT_SECONDS)
        raise _TimeUp

    previous = signal.signal(signal.SIGALRM, expire)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
