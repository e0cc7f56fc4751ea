"""What arms that adapt a pre-trained model have in common: which layers, what trains, which factors are frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import AdamW

from weightlab._lazy import require
from weightlab.optim import split_named_parameters
from weightlab.trial.arm import Hyperparameters

Transform = Callable[[nn.Module, Hyperparameters], nn.Module]


def hidden_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Find the layers to adapt, by name: every `nn.Linear` but the output head.

    Raises:
        ValueError: If there is none.

    Example:
        >>> list(hidden_linears(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))))
        ['0']
    """
    matrices, _ = split_named_parameters(model)
    hidden = {id(parameter) for _, parameter in matrices}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) in hidden
    }
    if not found:
        raise ValueError("the model has no nn.Linear besides its output head, so there is nothing to adapt")
    return found


def heads(model: nn.Module) -> list[nn.Linear]:
    """Return the output heads: the `nn.Linear` layers that `hidden_linears` leaves out."""
    hidden = hidden_linears(model).values()
    return [
        m for m in model.modules() if isinstance(m, nn.Linear) and not any(m is layer for layer in hidden)
    ]


def freezing(change: Transform) -> Transform:
    """Make a transform that freezes the model, changes it, and thaws the head if `train_head` says so."""

    def transform(model: nn.Module, hyperparameters: Hyperparameters) -> nn.Module:
        head = heads(model)
        model.requires_grad_(False)
        changed = change(model, hyperparameters)
        for layer in head if hyperparameters["train_head"] else ():
            layer.requires_grad_(True)
        return changed

    return transform


def by_peft(config: Callable[[Any, Hyperparameters], Any]) -> Transform:
    """Make a transform that puts a PEFT adapter on the hidden linear layers.

    Args:
        config: `(module, hyperparameters) -> config without its targets`, where the module offers the
            configs of `peft` and of `weightlab.adapters`.
    """

    def change(model: nn.Module, hyperparameters: Hyperparameters) -> nn.Module:
        peft = require("peft", "adapters")
        chosen = config(peft, hyperparameters)
        chosen.target_modules = set(hidden_linears(model))
        return peft.get_peft_model(model, chosen)

    return freezing(change)


def thawing(wanted: Callable[[nn.Module], Iterator[nn.Parameter]]) -> Transform:
    """Make a transform that trains some of the model's own parameters.

    Raises:
        ValueError: When applied to a model that has no such parameters.
    """

    def change(model: nn.Module, hyperparameters: Hyperparameters) -> nn.Module:
        parameters = list(wanted(model))
        if not parameters:
            raise ValueError("the model has no parameters of the kind that this arm trains")
        for parameter in parameters:
            parameter.requires_grad_(True)
        return model

    return freezing(change)


class FrozenFactors(nn.Module):
    """Parametrization W + L C R: factors L and R stay, the small core C trains and starts at zero.

    Args:
        left: L, (out, r).
        right: R, (r, in).
        diagonal: Whether C is a diagonal of r numbers rather than r × r.
    """

    left: Tensor
    right: Tensor

    def __init__(self, left: Tensor, right: Tensor, *, diagonal: bool) -> None:
        super().__init__()
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        r = len(right)
        self.core = nn.Parameter(left.new_zeros(r if diagonal else (r, r)))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the updated weight."""
        scaled = self.left * self.core if self.core.ndim == 1 else self.left @ self.core
        return torch.addmm(weight, scaled, self.right)


def with_factors(factors: Callable[[Tensor, int], tuple[Tensor, Tensor]], *, diagonal: bool) -> Transform:
    """Make a transform that updates hidden weights by a core between frozen factors.

    Args:
        factors: `(weight, r) -> (L, R)`; r is at most min(out, in).
        diagonal: As for `FrozenFactors`.
    """

    def change(model: nn.Module, hyperparameters: Hyperparameters) -> nn.Module:
        for layer in hidden_linears(model).values():
            weight = layer.weight.detach()
            left, right = factors(weight, min(hyperparameters["r"], *weight.shape))
            parametrize.register_parametrization(
                layer, "weight", FrozenFactors(left, right, diagonal=diagonal)
            )
        return model

    return freezing(change)


def adamw_on_trained(model: nn.Module, hyperparameters: Hyperparameters) -> AdamW:
    """Build AdamW on the parameters that train, all with the same weight decay."""
    return AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=hyperparameters["lr"],
        weight_decay=hyperparameters["weight_decay"],
        betas=(0.9, 0.95),
        foreach=True,
    )
