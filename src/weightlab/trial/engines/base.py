"""What a trial asks of an engine: take runs, carry them out somewhere, hand back their results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType

from weightlab.trial.spec import Job, Progress, RunResult


class Engine(ABC):
    """Carries out runs. Engines differ in where runs happen, never in what comes out.

    The trial submits while `running < capacity`, then waits; it alone talks to the store.

    Attributes:
        capacity: Runs that may be in flight at once.
        on_progress: Called in the trial's process with signs of life from runs in flight.
    """

    capacity: int = 1

    def __init__(self, on_progress: Callable[[Progress], None] | None = None) -> None:
        self.on_progress = on_progress or (lambda progress: None)

    @property
    @abstractmethod
    def running(self) -> int:
        """Runs submitted and not handed back yet."""

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Start a run. Only called while `running < capacity`."""

    @abstractmethod
    def wait(self, timeout: float) -> list[RunResult]:
        """Hand back runs that ended, waiting up to `timeout` seconds for the first.

        An arm's failure is a result (`status="error"`, `"diverged"` or `"timeout"`), also when its
        process died. A `WeightlabError` raised by the task is raised here.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop at once whatever is in flight and free everything. Safe to call twice."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
