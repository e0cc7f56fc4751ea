"""Giving the units of an averaged network the mean and spread that they had in the networks it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightlab.merge.batch_norm_statistics import Moments, first_input
from weightlab.merge.permutation import evaluating
from weightlab.merge.weight_descent import check_same_tensors

_Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@torch.no_grad()
def repair_(
    model: nn.Module,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    batches: Iterable[Any],
    lam: float = 0.5,
    *,
    forward: Callable[[nn.Module, Any], Any] = first_input,
) -> list[str]:
    r"""Rescale the layers of a merged network so that their outputs vary as those of its two parents do, in place.

    Averaging units that are not quite the same makes their activations vary less, layer after layer, until little is left. Each
    output of each linear and convolution layer is shifted and scaled, by its own row of weights and bias, to

    .. math:: \mathrm{mean} = (1-\lambda)\mu_a + \lambda\mu_b, \qquad \mathrm{std} = (1-\lambda)\sigma_a + \lambda\sigma_b

    For networks *without* batch norm; where it is, `reset_batch_norm_` does the same and more.

    Args:
        model: The merged network, ``interpolate(a, b, lam)``; run in evaluation mode and left in its own.
        a: The first parent, such as a state dict.
        b: The second one, permuted to match.
        batches: Data, each the model's input or a sequence that starts with it, on the model's device; gone through three
            times, so a list or a loader.
        lam: Share of `b`. Default 0.5.
        forward: How to run a batch. Default: ``model(batch)``, or its first entry.

    Returns:
        Names of the layers changed: those with a bias that the data reach. Outputs that are constant in `model` are only shifted.

    Raises:
        ValueError: If names or shapes differ, `lam` is outside [0, 1], there are no batches (a generator can be gone through but once), or a layer's outputs are not finite
            or one value only. The model is then as it was.

    Complexity:
        Three forward passes. In the third each layer's outputs are corrected by the batch at hand before they go on, as in the paper; with
        one batch the result is exact.

    Reference:
        REPAIR: REnormalizing Permuted Activations for Interpolation Repair, arXiv 2211.08403.

    Example:
        >>> from weightlab.merge import interpolate
        >>> build = lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model, a, b = build(), build().state_dict(), build().state_dict()
        >>> _ = model.load_state_dict(interpolate(a, b, 0.5))
        >>> repair_(model, a, b, [torch.randn(50, 3)])
        ['0', '2']
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
    merged = {name: x.clone() for name, x in model.state_dict().items()}
    for parent in (a, b):
        check_same_tensors(merged, parent)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _Layer) and m.bias is not None}
    try:
        found = []
        for parent in (a, b):
            model.load_state_dict(dict(parent))
            found.append(_watch(model, layers, batches, forward, {}))
        goals: dict[str, tuple[Tensor, Tensor]] = {}
        for name in found[0]:
            (mean_a, std_a), (mean_b, std_b) = (_spread(name, moments[name]) for moments in found)
            goals[name] = (torch.lerp(mean_a, mean_b, lam), torch.lerp(std_a, std_b, lam))
        model.load_state_dict(merged)
        own = _watch(model, layers, batches, forward, goals)
        changes = {name: _change(*_spread(name, moments), *goals[name]) for name, moments in own.items()}
    finally:
        model.load_state_dict(merged)
    for name, (scale, shift) in changes.items():
        layer = layers[name]
        assert layer.bias is not None
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        factor = scale.to(dtype)
        layer.weight.copy_(layer.weight.to(dtype) * factor.reshape(-1, *[1] * (layer.weight.ndim - 1)))
        layer.bias.copy_(layer.bias.to(dtype) * factor + shift.to(dtype))
    return list(changes)


def _watch(
    model: nn.Module,
    layers: Mapping[str, _Layer],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
    goals: Mapping[str, tuple[Tensor, Tensor]],
) -> dict[str, Moments]:
    """Moments of each layer's outputs, which go on corrected where there is a goal."""
    moments = {name: Moments() for name in layers}

    def correct(name: str, output: Tensor) -> Tensor | None:
        channels = -1 if isinstance(layers[name], nn.Linear) else 1
        moved = (output[None] if output.ndim == 1 else output).movedim(channels, 1)
        moments[name].add(moved)
        if name not in goals:
            return None
        batch = Moments()
        batch.add(moved)
        scale, shift = (x.to(output.dtype) for x in _change(*_spread(name, batch), *goals[name]))
        return (output.movedim(channels, -1) * scale + shift).movedim(-1, channels)

    def corrector(name: str) -> Callable[[nn.Module, Any, Any], Tensor | None]:
        return lambda _module, _inputs, output: correct(name, output)

    handles = [layer.register_forward_hook(corrector(name)) for name, layer in layers.items()]
    count = 0
    try:
        with evaluating(model):
            for batch in batches:
                count += 1
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError(
            "there are no batches; they are gone through three times, which a generator cannot be"
        )
    return {name: found for name, found in moments.items() if found.count}


def _spread(name: str, moments: Moments) -> tuple[Tensor, Tensor]:
    return moments.mean, moments.variance(f"the output of {name}").sqrt()


def _change(mean: Tensor, std: Tensor, goal_mean: Tensor, goal_std: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and summand that take outputs to their goal."""
    # Within rounding, an output that never changes has no scale.
    constant = std <= 1e-6 * mean.abs() + torch.finfo(torch.float32).tiny
    scale = torch.where(constant, 1.0, goal_std / torch.where(constant, 1.0, std))
    return scale, goal_mean - scale * mean
