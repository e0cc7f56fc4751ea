"""One training run, from its description to its result: the only training loop a trial has."""

from __future__ import annotations

import math
import platform
import socket
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weightlab.exceptions import MissingDependencyError, TaskError, WeightlabError
from weightlab.tasks.base import Split, Task
from weightlab.trial import registry
from weightlab.trial.arm import Arm
from weightlab.trial.hashing import BatchHash, derive_seed, hash_tensors
from weightlab.trial.memory import PeakMemory, state_size
from weightlab.trial.spec import CurvePoint, Job, Progress, RunResult, Status

PROGRESS_SECONDS = 0.1
ACCELERATOR_CHECK_EVERY = 25


class Diverged(Exception):
    """The loss or the metric stopped being finite, or the run ended worse than it began."""


def evaluation_steps(steps: int, points: int) -> list[int]:
    """Return the steps after which a run is evaluated: at most `points`, evenly spread, the last at the end.

    Example:
        >>> evaluation_steps(100, 4), evaluation_steps(3, 10)
        ([25, 50, 75, 100], [1, 2, 3])
    """
    points = min(points, steps)
    return [round(steps * (i + 1) / points) for i in range(points)]


def move(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch (a tensor, or nested tuples, lists, dicts of them) to a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: move(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [move(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def endless(task: Task, generator: torch.Generator) -> Iterator[Any]:
    """Yield training batches for ever, epoch after epoch."""
    while True:
        empty = True
        for batch in task.batches("train", generator):
            empty = False
            yield batch
        if empty:
            raise TaskError(
                f"task {task.name!r}: batches('train', generator) yields nothing; it must yield batches"
            )


def describe(error: BaseException) -> str:
    """Return an exception as one line: its class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def evaluate(task: Task, model: nn.Module, split: Split) -> dict[str, float]:
    """Evaluate without a trace: eval mode, no gradients, global random state put back."""
    training = model.training
    model.eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        values = task.evaluate(model, split)
    torch.set_rng_state(state)
    model.train(training)
    if not isinstance(values, dict) or task.metric not in values:
        given = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise TaskError(
            f"task {task.name!r}: evaluate() must return a dict with {task.metric!r}; it returned {given}"
        )
    return {name: float(value) for name, value in values.items()}


def check_loss(task: Task, loss: object) -> None:
    """Refuse a loss that cannot be trained on.

    Raises:
        TaskError: When it is not a scalar tensor that requires gradients.
    """
    if not isinstance(loss, Tensor):
        raise TaskError(
            f"task {task.name!r}: loss() must return a scalar tensor; it returned {type(loss).__name__}"
        )
    if loss.dim() != 0:
        raise TaskError(
            f"task {task.name!r}: loss() must return a scalar tensor; it returned shape {tuple(loss.shape)} "
            "(take .mean() or .sum() of it)"
        )
    if not loss.requires_grad:
        raise TaskError(f"task {task.name!r}: loss() does not depend on any trainable parameter")


class Schedule:
    """Scales every group's learning rate from the value that the arm's optimizer was made with."""

    def __init__(self, arm: Arm, optimizers: Sequence[Optimizer], steps: int, hyperparameters: dict) -> None:
        self.arm, self.steps, self.hyperparameters = arm, steps, hyperparameters
        self.groups = [
            (group, float(group["lr"])) for optimizer in optimizers for group in optimizer.param_groups
        ]

    def apply(self, step: int) -> None:
        """Set learning rates for the given step, counted from 0."""
        factor = self.arm.schedule(step, self.steps, self.hyperparameters)
        for group, peak in self.groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(peak * factor)
            else:
                group["lr"] = peak * factor


class Run:
    """The state of a run in flight, kept outside the training loop so that a failure loses none of it."""

    def __init__(self, job: Job, on_progress: Callable[[Progress], None] | None) -> None:
        self.job, self.spec = job, job.spec
        self.report = on_progress or (lambda progress: None)
        self.device = torch.device(job.device)
        self.metrics: dict[str, float] = {}
        self.untrained: float | None = None
        self.curve: list[CurvePoint] = []
        self.step_seconds: list[float] = []
        self.train_seconds = 0.0
        self.weights_hash: str | None = None
        self.data = BatchHash()
        self.optimizers: Sequence[Optimizer] = ()
        self.peak = PeakMemory(self.device)
        self.started = perf_counter()

    def progress(self, step: int) -> None:
        """Give a sign of life."""
        metric = self.curve[-1].metric if self.curve else None
        self.report(Progress(self.spec.key, step, self.spec.steps, metric, self.untrained, self.weights_hash))

    def synchronize(self) -> None:
        """Wait for the accelerator, so that clocks mean something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prepare(self, task: Task) -> tuple[nn.Module, Iterator[Any]]:
        """Build the model, check the task, and score the untrained model. Every failure here is the task's."""
        spec = self.spec
        torch.manual_seed(derive_seed(spec.seed, "weights"))
        model = task.build(torch.Generator().manual_seed(derive_seed(spec.seed, "weights")))
        if not isinstance(model, nn.Module):
            raise TaskError(
                f"task {task.name!r}: build() must return an nn.Module; it returned {type(model).__name__}"
            )
        self.weights_hash = hash_tensors(model.state_dict())
        model.to(self.device)
        values = evaluate(task, model, spec.split)
        self.untrained = values[task.metric]
        if not math.isfinite(self.untrained):
            raise TaskError(f"task {task.name!r}: the untrained model's {task.metric} is {self.untrained}")
        self.curve.append(CurvePoint(0, 0.0, None, self.untrained))
        generator = torch.Generator().manual_seed(derive_seed(spec.seed, "data"))
        batches = endless(task, generator)
        first = next(batches)
        model.eval()
        check_loss(task, task.loss(model, move(first, self.device)))
        return model, _chain(first, batches)

    def train(self, task: Task, arm: Arm, model: nn.Module, batches: Iterator[Any]) -> None:
        """Train to the end. Every failure here is the arm's."""
        spec, device = self.spec, self.device
        hyperparameters = {**arm.defaults, **spec.hyperparameters}
        torch.manual_seed(derive_seed(spec.seed, "set-up"))
        if arm.transform is not None:
            model = arm.transform(model, hyperparameters).to(device)
        if arm.init is not None:
            arm.init(model, hyperparameters, torch.Generator().manual_seed(derive_seed(spec.seed, "arm")))
        if arm.prepare is not None:
            generator = torch.Generator().manual_seed(derive_seed(spec.seed, "prepare"))
            apart = (move(batch, device) for batch in endless(task, generator))
            arm.prepare(model, hyperparameters, apart, task.loss)
            model.zero_grad(set_to_none=True)
        torch.manual_seed(derive_seed(spec.seed, "training"))
        made = arm.optimizer(model, hyperparameters)
        self.optimizers = optimizers = [made] if isinstance(made, Optimizer) else list(made)
        schedule = Schedule(arm, optimizers, spec.steps, hyperparameters)
        callbacks = arm.callbacks(model, optimizers, hyperparameters) if arm.callbacks else ()
        penalty, on_cpu = arm.penalty, device.type == "cpu"
        check_every = 1 if on_cpu else ACCELERATOR_CHECK_EVERY

        model.train()
        losses: list[float] = []
        unread: list[Tensor] = []
        done, reported = 0, perf_counter()
        for stop in evaluation_steps(spec.steps, spec.eval_points):
            losses.clear()
            self.synchronize()
            begun = clock = perf_counter()
            for step in range(done, stop):
                batch = next(batches)
                self.data.update(batch)
                loss = task.loss(model, batch if on_cpu else move(batch, device))
                unread.append(loss.detach())
                if len(unread) >= check_every or step + 1 == stop:
                    losses += _read_finite(unread, step + 1)
                    unread.clear()
                if penalty is not None:
                    loss = loss + penalty(model, hyperparameters)
                loss.backward()
                schedule.apply(step)
                for optimizer in optimizers:
                    optimizer.step()
                for callback in callbacks:
                    callback(model=model, step=step + 1, steps=spec.steps)
                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=True)
                now = perf_counter()
                self.step_seconds.append(now - clock)
                clock = now
                if now - reported > PROGRESS_SECONDS:
                    reported = now
                    self.progress(step + 1)
            self.synchronize()
            elapsed = perf_counter() - begun
            if not on_cpu:
                self.step_seconds[done:] = [elapsed / (stop - done)] * (stop - done)
            self.train_seconds += elapsed
            done = stop
            self.metrics = evaluate(task, model, spec.split)
            value = self.metrics[task.metric]
            train_loss = math.fsum(losses) / len(losses)
            self.curve.append(CurvePoint(done, self.train_seconds, train_loss, value))
            if not math.isfinite(value):
                raise Diverged(f"{task.metric} became {value} at step {done}")
        assert self.untrained is not None
        value = self.metrics[task.metric]
        if (value > self.untrained) if task.mode == "min" else (value < self.untrained):
            raise Diverged(
                f"ended with {task.metric} {value:.4g}, worse than the untrained model's {self.untrained:.4g}"
            )

    def result(self, status: Status, error: str | None = None) -> RunResult:
        """Sum up the run as it stands."""
        finite = [point for point in self.curve if math.isfinite(point.metric)]
        return RunResult(
            spec=self.spec,
            status=status,
            metrics=self.metrics,
            untrained=self.untrained,
            curve=tuple(finite),
            step_ms=1e3 * statistics.median(self.step_seconds) if self.step_seconds else None,
            train_seconds=self.train_seconds or None,
            total_seconds=perf_counter() - self.started,
            peak_memory_mb=self.peak.read(),
            state_mb=state_size(self.optimizers),
            weights_hash=self.weights_hash,
            data_hash=self.data.hexdigest() if status == "ok" else None,
            error=error,
            timeout=self.job.timeout if status == "timeout" else None,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            host=socket.gethostname(),
        )


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _read_finite(losses: Sequence[Tensor], step: int) -> list[float]:
    values = torch.stack(list(losses)).tolist() if len(losses) > 1 else [losses[0].item()]
    for value in values:
        if not math.isfinite(value):
            raise Diverged(f"training loss became {value} by step {step}")
    return values


def execute(job: Job, on_progress: Callable[[Progress], None] | None = None) -> RunResult:
    """Carry out one run and return its result, on any engine alike.

    An arm that raises, diverges or leaves non-finite numbers gives a result with that status. CPU
    threads are set to the run's number and put back afterwards.

    Args:
        job: The run.
        on_progress: Called about ten times a second, and once the untrained model is scored.

    Raises:
        WeightlabError: When the *task* does not work, a name cannot be resolved, or a package that the
            arm needs is not installed: no method is to blame, so there is no result.
    """
    task, arm = registry.task(job.task_ref), registry.arm(job.arm_ref)
    threads = torch.get_num_threads()
    torch.set_num_threads(job.spec.threads)
    run = Run(job, on_progress)
    try:
        try:
            model, batches = run.prepare(task)
        except WeightlabError:
            raise
        except Exception as error:
            raise TaskError(f"task {task.name!r} failed before any training: {describe(error)}") from error
        run.progress(0)
        try:
            run.train(task, arm, model, batches)
        except Diverged as error:
            return run.result("diverged", str(error))
        except MissingDependencyError:
            raise
        except Exception as error:
            return run.result("error", describe(error))
        return run.result("ok")
    finally:
        torch.set_num_threads(threads)


def versions(arm: Arm | None = None) -> dict[str, str]:
    """Return the versions that a run's numbers depend on: every run's, or also those of what an arm requires.

    A package that is not installed has no version; the arm says so when it is run.
    """
    import numpy

    import weightlab

    found = {
        "weightlab": weightlab.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }
    for package in arm.requires if arm is not None else ():
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def device_kind(device: str) -> str:
    """Return the kind of a device: its type, with the model's name on CUDA."""
    kind = torch.device(device)
    return f"cuda {torch.cuda.get_device_name(kind)}" if kind.type == "cuda" else kind.type
