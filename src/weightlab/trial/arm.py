"""Arms: what a trial changes about a task's plain training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from optuna.distributions import BaseDistribution
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from weightlab.trial.spec import Scalar

Hyperparameters = Mapping[str, Any]


class Callback(Protocol):
    """Called by the training loop after each optimizer step, before gradients are cleared."""

    def __call__(self, *, model: nn.Module, step: int, steps: int) -> None:
        """React to the end of step `step` (counted from 1) of `steps`."""
        ...


def warmup_linear(step: int, steps: int, hyperparameters: Hyperparameters) -> float:
    """Learning-rate factor: linear warm-up over the first 5 % of steps, then linear decay to 10 %.

    The plain schedule of every arm that does not bring its own.

    Example:
        >>> warmup_linear(0, 100, {}), warmup_linear(4, 100, {}), round(warmup_linear(99, 100, {}), 3)
        (0.2, 1.0, 0.109)
    """
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 - 0.9 * (step - warmup) / max(1, steps - warmup)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A named bundle of changes to a task's plain training, with the space to tune it in.

    Every callable receives the hyper-parameters of the run: `defaults` overlaid with the values drawn
    from `search_space`. Steps of one run, in order: the task builds the model; `transform`; `init`;
    `prepare`; `optimizer`; then for each batch: loss (+ `penalty`), backward, `schedule`, optimizer step,
    `callbacks`.

    Attributes:
        name: Short name, as given to `--arms`.
        optimizer: `(model, hyperparameters) -> Optimizer`, or a sequence of optimizers that are
            stepped in turn. Each group's `lr` at this point is the peak that `schedule` scales.
        search_space: Name -> Optuna distribution. Fair arms have equally many free dimensions; an
            arm with another number says why in `dimension_note`.
        defaults: Hyper-parameters that are not tuned.
        schedule: `(step, steps, hyperparameters) -> factor` on the learning rate, step from 0.
        transform: Returns a changed model (a parametrization, another layer, ...).
        init: Changes initial weights in place, drawing from the generator only.
        prepare: `(model, hyperparameters, batches, loss)`: sets the model up from data, in place. `batches`
            are training batches without end, on the model's device, drawn in an order of their own, so
            that those of training stay the same; `loss(model, batch)` is the task's. Gradients that it
            leaves are cleared. It is part of a run's total time and not of its training time.
        penalty: A scalar to add to the task's loss.
        callbacks: `(model, optimizers, hyperparameters) -> callbacks` for this run.
        requires: Distributions besides PyTorch whose code the arm runs, as pip names them, e.g.
            `("peft",)`. Their versions are part of a run's identity.
        dimension_note: Why the number of free dimensions differs from the other arms', if it does.
        paper: Slug of the paper that the method comes from.
        description: One line for lists and reports.
    """

    name: str
    optimizer: Callable[[nn.Module, Hyperparameters], Optimizer | Sequence[Optimizer]]
    search_space: Mapping[str, BaseDistribution] = field(default_factory=dict)
    defaults: Mapping[str, Scalar] = field(default_factory=dict)
    schedule: Callable[[int, int, Hyperparameters], float] = warmup_linear
    transform: Callable[[nn.Module, Hyperparameters], nn.Module] | None = None
    init: Callable[[nn.Module, Hyperparameters, torch.Generator], object] | None = None
    prepare: (
        Callable[[nn.Module, Hyperparameters, Iterator[Any], Callable[[nn.Module, Any], Tensor]], object]
        | None
    ) = None
    penalty: Callable[[nn.Module, Hyperparameters], Tensor] | None = None
    callbacks: Callable[[nn.Module, Sequence[Optimizer], Hyperparameters], Sequence[Callback]] | None = None
    requires: Sequence[str] = ()
    dimension_note: str = ""
    paper: str | None = None
    description: str = ""
