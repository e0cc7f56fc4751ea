"""What every engine does around a run: find the function, thin out progress, tell how it came out."""

from __future__ import annotations

import importlib
import platform
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from typing import Any, Protocol

from weightlab import exceptions
from weightlab.exceptions import WeightlabError
from weightlab.trial.spec import Job, Progress, RunResult, RunSpec, Status

EXECUTE = "weightlab.trial.runner:execute"
PROGRESS_SECONDS = 0.1


class Execute(Protocol):
    """Carries out one run; `weightlab.trial.runner.execute` is the one that trials use."""

    def __call__(self, job: Job, on_progress: Callable[[Progress], None] | None = None) -> RunResult:
        """Return the run's result; raise `WeightlabError` when its task is to blame."""
        ...


@cache
def resolve(path: str) -> Execute:
    """Import `"module:function"`, and pay once for what would else slow its first run.

    PyTorch imports its compiler, which takes seconds, when a process makes its first optimizer; that
    must not count against the first run's time limit.

    Example:
        >>> resolve("math:floor")(2.5)
        2
    """
    module, _, name = path.partition(":")
    function = getattr(importlib.import_module(module), name)
    if torch := sys.modules.get("torch"):
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    return function


class Thinned:
    """Passes on about ten signs of life a second, and at once what an engine must not miss.

    Example:
        >>> seen = []
        >>> report = Thinned(seen.append)
        >>> for step in range(100):
        ...     report(Progress("k", step, 1000))
        >>> report(Progress("k", 100, 1000, untrained=2.0))
        >>> [progress.step for progress in seen]
        [0, 100]
    """

    def __init__(self, report: Callable[[Progress], None]) -> None:
        self._report = report
        self._known: tuple[float | None, str | None] | None = None
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        """Pass it on, or drop it."""
        known = (progress.untrained, progress.weights_hash)
        now = time.monotonic()
        if known != self._known or progress.step >= progress.steps or now >= self._next:
            self._known, self._next = known, now + PROGRESS_SECONDS
            self._report(progress)


class Watched:
    """A run in flight as its engine sees it: enough to write its result when it cannot any more."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.started: float | None = None
        self._untrained: float | None = None
        self._weights_hash: str | None = None

    def start(self) -> None:
        """Note that the run has left the queue: its time runs from now."""
        self.started = time.monotonic()

    def note(self, progress: Progress) -> None:
        """Keep what a sign of life tells about the initial model."""
        if progress.untrained is not None:
            self._untrained = progress.untrained
        if progress.weights_hash is not None:
            self._weights_hash = progress.weights_hash

    @property
    def deadline(self) -> float | None:
        """When the run is overdue, on the monotonic clock; `None` if it never is."""
        if self.started is None or self.job.timeout is None:
            return None
        return self.started + self.job.timeout

    @property
    def overdue(self) -> bool:
        """Whether the run has used up its time."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def failed(self, status: Status, error: str) -> RunResult:
        """Write the result of a run that could not do so itself."""
        return RunResult(
            spec=self.job.spec,
            status=status,
            untrained=self._untrained,
            total_seconds=None if self.started is None else time.monotonic() - self.started,
            weights_hash=self._weights_hash,
            error=error,
            timeout=self.job.timeout if status == "timeout" else None,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            host=platform.node(),
        )

    def timed_out(self) -> RunResult:
        """Write the result of a run that was stopped at its time limit."""
        return self.failed("timeout", f"stopped after its time limit of {self.job.timeout:g} s")


def perform(
    execute: Execute, job: Job, on_progress: Callable[[Progress], None], watched: Watched | None = None
) -> RunResult:
    """Call `execute`; an arm that ends the process by `sys.exit` failed like one that raises."""
    watched = watched or Watched(job)
    if watched.started is None:
        watched.start()

    def pass_on(progress: Progress) -> None:
        watched.note(progress)
        on_progress(progress)

    try:
        return execute(job, Thinned(pass_on))
    except SystemExit as error:
        return watched.failed("error", f"SystemExit: {error.code}")


def pack(call: Callable[[], RunResult]) -> dict[str, Any]:
    """Run `call` and put what came out, result or exception, into plain JSON types."""
    try:
        return {"result": call().to_dict()}
    except WeightlabError as error:
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == exceptions.__name__]
        return {"raised": kinds[0], "message": str(error)}
    except BaseException:
        return {"broken": traceback.format_exc()}


def unpack(outcome: dict[str, Any]) -> RunResult:
    """Return the result that `pack` was given, or raise its exception again.

    Raises:
        WeightlabError: Of the same class and with the same message.
        RuntimeError: With the traceback of an exception that no run should raise.
    """
    if "result" in outcome:
        return RunResult.from_dict(outcome["result"])
    if "raised" in outcome:
        raise getattr(exceptions, outcome["raised"])(outcome["message"])
    raise RuntimeError(f"a run broke down in its worker:\n{outcome['broken']}")


def job_to_dict(job: Job) -> dict[str, Any]:
    """Put a job into plain JSON types."""
    fields = {"task_ref": job.task_ref, "arm_ref": job.arm_ref, "device": job.device, "timeout": job.timeout}
    return {"spec": job.spec.to_dict(), **fields}


def job_from_dict(data: dict[str, Any]) -> Job:
    """Rebuild what `job_to_dict` returned, also after a trip through JSON."""
    return Job(**{**data, "spec": RunSpec.from_dict(data["spec"])})


def thread_environment(threads: int) -> dict[str, str]:
    """Return the environment variables that fix CPU threads before any library reads them.

    Example:
        >>> thread_environment(2)["OMP_NUM_THREADS"]
        '2'
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return dict.fromkeys(names, str(threads))
