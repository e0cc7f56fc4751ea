"""Permute the hidden units of one network so that its average with another has a low loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightlab.merge.interpolation import interpolate
from weightlab.merge.permutation import Permutation, apply_permutation, call_with, evaluating
from weightlab.merge.permutation_spec import PermutationSpec
from weightlab.merge.weight_descent import (
    WeightMatching,
    check_same_tensors,
    inner_product_and_distance,
    weight_matching,
)


@dataclass(frozen=True, eq=False)
class StraightThroughMatching(WeightMatching):
    """A permutation that `ste_matching` found.

    Attributes:
        loss: Mean loss of the average of A and the permuted B over all batches.
    """

    loss: float


def ste_matching(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    spec: PermutationSpec,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    steps: int = 250,
    lr: float = 1e-2,
    momentum: float = 0.9,
    init: Permutation | None = None,
    generator: torch.Generator | None = None,
) -> StraightThroughMatching:
    r"""Learn the permutation of B's units with which the average of A and B has the lowest loss.

    In every step free weights :math:`\hat\theta`, which begin at A's, are matched with B's, from where the last step
    left, and the gradient of the loss at the midpoint :math:`(\theta_a + \pi(\theta_b))/2` moves them as if they
    themselves stood there in place of :math:`\pi(\theta_b)` (straight through). Of the permutations after each pass
    over the data, and the one at the start, the one of the lowest loss is returned.

    The permutation fits these two networks: it connects them without aligning their singular vectors, and so says
    nothing about a third network, which is what `weight_matching` does.

    Args:
        model_a: The reference. Both are run in evaluation mode and left as they were.
        model_b: The network to permute: the same layers.
        loader: Batches ``(inputs, targets)``, gone through as often as needed: a list or a `DataLoader`, no generator.
        spec: Which axes move together.
        loss: ``loss(outputs, targets)``, the mean over a batch. Default cross-entropy.
        steps: Steps of gradient descent, one a batch. Default 250.
        lr: Learning rate. Default 1e-2, the paper's.
        momentum: Momentum of the gradient. Default 0.9, the paper's.
        init: Where to start: the free weights then begin at B's, so permuted. Default None: at A's, as in the official
            code of Git Re-Basin, and so at the result of `weight_matching`.
        generator: For the orders of visits, on the CPU. Default None: PyTorch's.

    Returns:
        The permutation, to be applied to B, on the CPU. `objective` and `distance` are as of `weight_matching`, `sweeps` all
        of the search's.

    Raises:
        ValueError: If names or shapes of the models differ, `spec` does not fit, there is no batch, a loss is not
            finite, or an option is out of range.

    Complexity:
        A step costs a forward and backward pass and a matching of a few sweeps; a pass over the data whose steps
        changed the permutation costs another forward pass.

    Reference:
        "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching", arXiv 2402.04051; the method
        is that of "Git Re-Basin", arXiv 2209.04836.

    Example:
        >>> from weightlab.merge import PermutationSpec
        >>> a, b = (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
        >>> x, y = torch.randn(20, 3), torch.randint(2, (20,))
        >>> found = ste_matching(a, b, [(x, y)], PermutationSpec.from_model(a, x), steps=3)
        >>> found.indices["0"].shape, found.loss > 0
        (torch.Size([8]), True)
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
    a: dict[str, Tensor] = model_a.state_dict()
    b: dict[str, Tensor] = model_b.state_dict()
    check_same_tensors(a, b)
    origin = a if init is None else apply_permutation(spec, init, b)
    free = {name: origin[name].to(a[name], copy=True) for name, _ in model_a.named_parameters()}
    # Tied weights, one parameter under several names, stay one.
    by_place = {a[name].data_ptr(): tensor for name, tensor in free.items()}
    mind = {name: by_place.get(tensor.data_ptr(), tensor) for name, tensor in a.items()}
    velocity = {name: torch.zeros_like(tensor) for name, tensor in free.items()}

    perm = init or weight_matching(a, b, spec, generator=generator)
    sweeps = perm.sweeps if isinstance(perm, WeightMatching) else 0
    best, lowest = perm, _midpoint_loss(model_a, a, b, spec, perm, loader, loss)
    step = 0
    while step < steps:
        for inputs, targets in loader:
            middle = interpolate(a, apply_permutation(spec, perm, b), 0.5)
            gradients = _gradients(
                model_a, {name: middle[name] for name in free}, middle, inputs, targets, loss
            )
            for name, gradient in gradients.items():
                # Half of the midpoint is the permuted B, for which the free weights stand.
                velocity[name].mul_(momentum).add_(gradient, alpha=0.5)
                free[name].sub_(velocity[name], alpha=lr)
            found = weight_matching(mind, b, spec, init=perm, n_restarts=1, generator=generator)
            perm, sweeps = found, sweeps + found.sweeps
            step += 1
            if step == steps:
                break
        height = _midpoint_loss(model_a, a, b, spec, perm, loader, loss)
        if height < lowest:
            best, lowest = perm, height
    return StraightThroughMatching(
        dict(best.indices), *inner_product_and_distance(a, b, spec, best), sweeps, lowest
    )


def _gradients(
    model: nn.Module,
    places: dict[str, Tensor],
    params: dict[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Gradients of a model's loss with other tensors, at those of `places`."""
    leaves = {name: tensor.requires_grad_() for name, tensor in places.items()}
    with evaluating(model), torch.enable_grad():
        value = loss(call_with(model, {**params, **leaves}, (inputs,)), targets)
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


@torch.no_grad()
def _midpoint_loss(
    model: nn.Module,
    a: dict[str, Tensor],
    b: dict[str, Tensor],
    spec: PermutationSpec,
    perm: Permutation,
    loader: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> float:
    middle = interpolate(a, apply_permutation(spec, perm, b), 0.5)
    total, count = 0.0, 0
    with evaluating(model):
        for inputs, targets in loader:
            total += float(loss(call_with(model, middle, (inputs,)), targets)) * len(targets)
            count += len(targets)
    if not count:
        raise ValueError("loader has no batches (a generator that was used before is empty)")
    if not math.isfinite(total):
        raise ValueError(f"the loss of the average is not finite on this data: {total / count}")
    return total / count
