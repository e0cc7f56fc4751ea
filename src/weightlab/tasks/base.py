"""What a trial needs to know about a task: a model, its data, its loss and its score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

Split = Literal["train", "validation", "test"]


class Task(ABC):
    """A training problem: everything that is *not* the method under trial.

    Subclasses set the facts below as class or instance attributes and write the four methods. Data
    are loaded on first use, never in `__init__`. A trial calls, for one run with seed k::

        torch.manual_seed(...)            # so that default PyTorch initialisation is seeded as well
        model = task.build(generator)     # same weights for every arm
        for batch in task.batches("train", generator): ...   # same order for every arm
            task.loss(model, batch).backward()
        task.evaluate(model, "test")      # under eval mode and no_grad

    Attributes:
        name: Short name, as given to `--task`.
        metric: Key of `evaluate`'s result that decides the trial.
        mode: `"min"` if smaller is better, `"max"` if larger is.
        batch_size: Examples in a training batch; part of a run's budget.
        steps: Default number of training steps of one run.
        target: Metric value that counts as solved, for time-to-target; `None` means the baseline's
            own median final value.
        minimal_effect: Smallest difference of the metric (in its own units) worth claiming. Stated
            here, before any run, and used as the threshold of every verdict on this task.
        description: One line for lists and reports.
    """

    name: str
    metric: str
    mode: Literal["min", "max"]
    batch_size: int
    steps: int = 200
    target: float | None = None
    minimal_effect: float = 0.0
    description: str = ""

    required: ClassVar[tuple[str, ...]] = (
        "name",
        "metric",
        "mode",
        "batch_size",
        "build",
        "batches",
        "loss",
        "evaluate",
    )

    @abstractmethod
    def build(self, generator: torch.Generator) -> nn.Module:
        """Return a freshly initialised model on the CPU."""

    @abstractmethod
    def batches(self, split: Split, generator: torch.Generator) -> Iterable[Any]:
        """Yield training batches (tensors, or tuples / dicts of them, on the CPU).

        The order must depend on `generator` alone. A finite iterable is asked for again when it
        ends, with the same generator, which makes it the next epoch.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the scalar training loss of one batch (already on the model's device)."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: Split) -> dict[str, float]:
        """Return metrics of `model` on a whole split. Called in eval mode under `no_grad`."""

    def fingerprint(self) -> str:
        """Identify the task's data beyond its code (e.g. a hash of the text); part of a run's key."""
        return ""
