"""Controls for Bone: its update without the plain blocks, and with a random matrix for the weight that guides it."""

from __future__ import annotations

from typing import Any

import torch
from optuna.distributions import FloatDistribution
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import AdamW, Optimizer

from weightlab.adapters.block_affine import block_shape, bone_delta
from weightlab.trial.arm import Arm, Hyperparameters


class GuidedBlocks(nn.Module):
    """Parametrization W + G_ab D_a + D_a by a guide G in place of W, or W + G_ab D_a alone.

    Args:
        weight: W, (out, in); G starts as a copy of it.
        r: Side of a block.
        plain: Whether the term without guide is there.
    """

    guide: Tensor

    def __init__(self, weight: Tensor, r: int, plain: bool) -> None:
        super().__init__()
        shape = block_shape(weight.shape[0], weight.shape[1], r)
        self.register_buffer("guide", weight.detach().clone())
        self.blocks = nn.Parameter(weight.new_zeros(shape))
        self.plain = plain

    def forward(self, weight: Tensor) -> Tensor:
        """Return the updated weight."""
        updated = weight + bone_delta(self.guide, self.blocks)
        return updated if self.plain else updated - bone_delta(torch.zeros_like(self.guide), self.blocks)


def _guided(plain: bool) -> Any:
    def transform(model: nn.Module, hyperparameters: Hyperparameters) -> nn.Module:
        model.requires_grad_(False)
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        for layer in layers[:-1]:
            blocks = GuidedBlocks(layer.weight, hyperparameters["r"], plain)
            parametrize.register_parametrization(layer, "weight", blocks)
        return model

    return transform


def randomize_guides(model: nn.Module, hyperparameters: Hyperparameters, generator: torch.Generator) -> None:
    """Replace every guide by a Gaussian matrix of the same norm."""
    for module in model.modules():
        if isinstance(module, GuidedBlocks):
            norm = module.guide.norm()
            drawn = torch.randn(module.guide.shape, generator=generator).to(module.guide)
            module.guide.copy_(drawn * (norm / drawn.norm()))


def adamw_on_trained(model: nn.Module, hyperparameters: Hyperparameters) -> Optimizer:
    """Build AdamW on what trains, without weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return AdamW(trained, lr=hyperparameters["lr"], weight_decay=0.0, betas=(0.9, 0.95), foreach=True)


SPACE = {"lr": FloatDistribution(5e-4, 5e-2, log=True)}
DEFAULTS = {"lr": 3e-3, "r": 8}

ARMS = (
    Arm(
        name="bone-guide-only",
        optimizer=adamw_on_trained,
        transform=_guided(plain=False),
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="bone",
        description="Bone, affine, without the plain term: blocks become W + W D",
    ),
    Arm(
        name="bone-random-guide",
        optimizer=adamw_on_trained,
        transform=_guided(plain=True),
        init=randomize_guides,
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="bone",
        description="Bone, affine, guided by a random matrix R of W's norm: blocks become W + R D + D",
    ),
)
