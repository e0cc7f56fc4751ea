"""The unit of work of a trial: one training run, what determines it, and what came of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

Scalar = float | int | str | bool
Status = Literal["ok", "diverged", "error", "timeout"]


@dataclass(frozen=True)
class RunSpec:
    """Everything that determines the outcome of one training run, and nothing else.

    Attributes:
        task: The task's name.
        task_fingerprint: Hash of the task's code and data.
        arm: The arm's name.
        arm_fingerprint: Hash of the arm's code.
        hyperparameters: Values of the arm's search space.
        seed: Seeds initial weights, data order and everything drawn while training.
        split: Split that is evaluated: `"validation"` for tuning, `"test"` for the report.
        steps: Training steps.
        eval_points: Evaluations spread evenly over the run, the last at its end (one more is made
            before the first step).
        batch_size: Examples in a training batch.
        threads: Intra-op CPU threads; results on CPU depend on it.
        device: Device kind, e.g. `"cpu"` or `"cuda NVIDIA H200"`.
        versions: Package name -> version, of what the numbers depend on.
    """

    task: str
    task_fingerprint: str
    arm: str
    arm_fingerprint: str
    hyperparameters: Mapping[str, Scalar]
    seed: int
    split: Literal["validation", "test"]
    steps: int
    eval_points: int
    batch_size: int
    threads: int
    device: str
    versions: Mapping[str, str]

    @cached_property
    def key(self) -> str:
        """SHA-256 of the canonical JSON of all fields: the run's identity in the store."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunSpec:
        """Rebuild what `to_dict` returned."""
        return cls(**data)


@dataclass(frozen=True)
class Job:
    """A run and how to carry it out here; the second half does not change its outcome.

    Attributes:
        spec: What determines the run.
        task_ref: What to load the task from: a registered name or `path.py:object`.
        arm_ref: Likewise for the arm.
        device: Torch device string, e.g. `"cpu"`, `"cuda:0"`.
        timeout: Seconds after which the run counts as failed; `None` for no limit.
    """

    spec: RunSpec
    task_ref: str
    arm_ref: str
    device: str = "cpu"
    timeout: float | None = None


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation along a run.

    Attributes:
        step: Training steps done.
        seconds: Training time so far, evaluation not counted.
        train_loss: Mean training loss since the previous point; `None` at step 0.
        metric: The task's metric on the run's split.
    """

    step: int
    seconds: float
    train_loss: float | None
    metric: float


@dataclass(frozen=True)
class RunResult:
    """What came of one run. A failed run has a result as well: nothing is dropped.

    Attributes:
        spec: The run.
        status: `"ok"`; `"diverged"` (non-finite loss or metric, or an end worse than the untrained
            model); `"error"` (the arm raised); `"timeout"`.
        metrics: Final evaluation; empty when the run did not get there.
        untrained: The task's metric of the model as built, before any training and before the arm
            touched it: the score of a failed run. `None` if the run did not get that far.
        curve: Evaluations from step 0 to the end, as far as the run got.
        step_ms: Median milliseconds of a training step, evaluation excluded.
        train_seconds: Training time, evaluation excluded.
        total_seconds: Wall time of the run, from building the model to the last evaluation.
        peak_memory_mb: Peak memory in MiB: allocated device memory on an accelerator, else the
            process's resident set.
        state_mb: Exact size of the optimizer's state tensors in MiB at the end.
        weights_hash: Hash of the initial weights, before the arm touched them.
        data_hash: Hash of the training batches in order.
        error: One line about the failure.
        timeout: Limit that a `"timeout"` run ran into, seconds.
        created_at: UTC time, ISO 8601.
        host: Name of the machine.
    """

    spec: RunSpec
    status: Status
    metrics: Mapping[str, float] = field(default_factory=dict)
    untrained: float | None = None
    curve: tuple[CurvePoint, ...] = ()
    step_ms: float | None = None
    train_seconds: float | None = None
    total_seconds: float | None = None
    peak_memory_mb: float | None = None
    state_mb: float | None = None
    weights_hash: str | None = None
    data_hash: str | None = None
    error: str | None = None
    timeout: float | None = None
    created_at: str = ""
    host: str = ""

    @property
    def key(self) -> str:
        """The run's key in the store."""
        return self.spec.key

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunResult:
        """Rebuild what `to_dict` returned, also after a trip through JSON."""
        fields = dict(data)
        fields["spec"] = RunSpec.from_dict(fields["spec"])
        fields["curve"] = tuple(CurvePoint(**point) for point in fields["curve"])
        return cls(**fields)


@dataclass(frozen=True)
class Progress:
    """A sign of life from a run in flight.

    Attributes:
        key: The run's key.
        step: Steps done.
        steps: Steps in all.
        metric: Latest evaluation, if any.
        untrained: The untrained model's metric, once known; engines keep it for a run they must kill.
        weights_hash: Hash of the initial weights, likewise.
    """

    key: str
    step: int
    steps: int
    metric: float | None = None
    untrained: float | None = None
    weights_hash: str | None = None
