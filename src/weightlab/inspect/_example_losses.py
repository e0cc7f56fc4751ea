"""The loss of each example of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional

from weightlab.inspect._example_batch import ExampleBatch, change_tensors, tensors

LossFunction = Callable[[Any, Any], Tensor]


class ModelWithLoss(nn.Module):
    """A model and its loss as one module, so that both see the same replacements of parameters.

    Args:
        model: The model.
        loss_fn: Gives the losses of all examples or one number.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: ExampleBatch) -> tuple[list[Tensor], Tensor]:
        """Run the model: the tensors that it gives, and the loss of each example, shape `(B,)`."""
        args, kwargs = batch.arguments
        outputs = self.model(*args, **kwargs)
        return list(tensors(outputs)), example_losses(self.loss_fn, outputs, batch)


def example_losses(loss_fn: LossFunction, outputs: Any, batch: ExampleBatch) -> Tensor:
    """The loss of each example, `(B,)`, from a function that gives these or one number for a batch."""
    if loss_fn is functional.cross_entropy:
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"cross_entropy cannot take the model's outputs, a {type(outputs).__name__}; pass a loss_fn that does"
            )
        if outputs.ndim == 2:
            return functional.cross_entropy(outputs, batch.targets, reduction="none")
    losses = loss_fn(outputs, batch.targets)
    if not isinstance(losses, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(losses).__name__}")
    if losses.shape == (batch.size,):
        return losses
    if losses.ndim:
        raise ValueError(
            f"loss_fn must return the loss of each example, shape ({batch.size},), or one number; got shape "
            f"{tuple(losses.shape)}"
        )
    return losses[None] if batch.size == 1 else _losses_alone(loss_fn, outputs, batch)


def _losses_alone(loss_fn: LossFunction, outputs: Any, batch: ExampleBatch) -> Tensor:
    """Ask a loss that gives one number for each example by itself."""
    pieces = [*tensors(outputs), *tensors(batch.targets)]
    for x in pieces:
        if len(x) != batch.size:
            raise ValueError(
                f"loss_fn returned one number for {batch.size} examples, and the outputs cannot be taken apart, as they "
                f"hold a tensor of shape {tuple(x.shape)}; return the loss of each example, shape ({batch.size},)"
            )

    def loss(*one: Tensor) -> Tensor:
        rest = iter(one)
        return loss_fn(*(change_tensors(tree, lambda _: next(rest)) for tree in (outputs, batch.targets)))

    def loss_of_one(*one: Tensor) -> Tensor:
        return loss(*(x[None] for x in one))

    try:
        return vmap(loss_of_one)(*pieces)
    except RuntimeError:  # the loss cannot be vectorised
        return torch.stack([loss(*(x[i : i + 1] for x in pieces)) for i in range(batch.size)])
