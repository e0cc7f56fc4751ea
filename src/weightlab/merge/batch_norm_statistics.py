"""Running statistics of batch norm layers, taken anew from data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightlab.merge.permutation import evaluating


def first_input(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: the input, or a sequence that starts with it."""
    return model(batch[0] if isinstance(batch, list | tuple) else batch)


@torch.no_grad()
def reset_batch_norm_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] = first_input,
) -> list[str]:
    r"""Replace the running statistics of all batch norm layers by those of some data, in place.

    Averaged weights do not have averaged activations: a merged network with interpolated statistics looks worse than it is.
    In one pass, in which each layer normalises by the batch at hand as in training, and every other layer evaluates, the
    moments of what reaches each layer are pooled over all batches:

    .. math:: \mu = \frac{1}{N} \sum_b n_b \mu_b, \qquad
        \sigma^2 = \frac{1}{N - 1} \sum_b \left( n_b \sigma_b^2 + n_b (\mu_b - \mu)^2 \right)

    `torch.optim.swa_utils.update_bn`, the plain average of `momentum=None`, leaves out the second term and weighs a
    small last batch like any other. For one batch the two agree.

    Args:
        model: Any module with batch norm layers: PyTorch's, `torch.nn.SyncBatchNorm`, `GhostBatchNorm`, subclasses.
            Modes, gradients and everything but `running_mean`, `running_var` and `num_batches_tracked` (which becomes the
            number of batches) stay what they were. Layers without running statistics are left alone.
        batches: Data, each the model's input or a sequence that starts with it, on the model's device. Batches
            as large as in training, a few thousand samples in all.
        forward: How to run a batch, e.g. ``task.loss``. Default: ``model(batch)``, or its first entry.

    Returns:
        Names of the layers changed. A layer that the data do not reach is none of them.

    Raises:
        ValueError: If there are no batches, a layer has seen one value a channel in all, or values that are not finite. The
            model is then as it was.

    Complexity:
        One forward pass, and two readings of what enters each layer. Moments are taken in float32 (or the input's
        dtype, if wider) and pooled in float64. With several processes, each pools its own data.

    Reference:
        "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching", arXiv 2402.04051, resets the
        statistics of its convolutional networks so.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> reset_batch_norm_(model, [torch.randn(50, 3), torch.randn(20, 3)])
        ['1']
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    kept = {
        name: {key: x.clone() for key, x in layer.named_buffers(recurse=False)}
        for name, layer in layers.items()
    }
    moments = {name: Moments() for name in layers}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, inputs: moments[name].add(inputs[0])

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    count = 0
    try:
        with evaluating(model):
            for layer in layers.values():
                layer.training = True
            for batch in batches:
                count += 1
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            for key, x in kept[name].items():
                layer.get_buffer(key).copy_(x)
    if not count:
        raise ValueError("there are no batches (a generator that was used before is empty)")
    found = {
        name: (moments[name].mean, moments[name].variance(f"the input of {name}"))
        for name in layers
        if moments[name].count
    }
    for name, values in found.items():
        for key, value in zip(("running_mean", "running_var"), values, strict=True):
            layers[name].get_buffer(key).copy_(value)
        if layers[name].num_batches_tracked is not None:
            layers[name].get_buffer("num_batches_tracked").fill_(count)
    return list(found)


@dataclass
class Moments:
    """Pooled mean and variance of each channel, the second axis, of the tensors that were added.

    Example:
        >>> moments = Moments()
        >>> for x in (torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])):
        ...     moments.add(x)
        >>> moments.mean, moments.variance("x")
        (tensor([3.], dtype=torch.float64), tensor([7.], dtype=torch.float64))
    """

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: Tensor) -> None:
        """Take in a tensor of shape `(N, C, *)`."""
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1).flatten(1)
        number = wide.shape[1]
        if not number:
            return
        variance, mean = (m.double() for m in torch.var_mean(wide, 1, correction=0))
        if not self.count:
            self.mean, self.squares = torch.zeros_like(mean), torch.zeros_like(mean)
        delta = mean - self.mean
        total = self.count + number
        self.mean = self.mean + delta * (number / total)
        self.squares = self.squares + number * variance + delta.square() * (self.count * number / total)
        self.count = total

    def variance(self, name: str) -> Tensor:
        """The unbiased variance. Raises ValueError with this name if there is none."""
        if self.count < 2:
            raise ValueError(f"{name} has seen one value a channel, which has no variance; give more data")
        if not (self.mean.isfinite().all() and self.squares.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite on this data")
        return self.squares / (self.count - 1)
