"""Controls for Bone: its update without the plain blocks, and with a random matrix for the weight that guides it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightlab.adapters.block_affine import block_shape, bone_delta
from weightlab.trial.arm import Arm, Hyperparameters
from weightlab.trial.arms._adaptation import Transform, adamw_on_trained, freezing, hidden_linears
from weightlab.trial.arms.adapters import FIXED, LOW_RANK


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


def _guided(plain: bool) -> Transform:
    def change(model: nn.Module, hyperparameters: Hyperparameters) -> nn.Module:
        for layer in hidden_linears(model).values():
            blocks = GuidedBlocks(layer.weight, hyperparameters["r"], plain)
            parametrize.register_parametrization(layer, "weight", blocks)
        return model

    return freezing(change)


def randomize_guides(model: nn.Module, hyperparameters: Hyperparameters, generator: torch.Generator) -> None:
    """Replace every guide by a Gaussian matrix of the same norm."""
    for module in model.modules():
        if isinstance(module, GuidedBlocks):
            norm = module.guide.norm()
            drawn = torch.randn(module.guide.shape, generator=generator).to(module.guide)
            module.guide.copy_(drawn * (norm / drawn.norm()))


ARMS = (
    Arm(
        name="bone-guide-only",
        optimizer=adamw_on_trained,
        transform=_guided(plain=False),
        search_space=LOW_RANK,
        defaults={**FIXED, "lr": 3e-3, "r": 8},
        paper="bone",
        description="Bone without the plain term: blocks of side 8 become W + W D",
    ),
    Arm(
        name="bone-random-guide",
        optimizer=adamw_on_trained,
        transform=_guided(plain=True),
        init=randomize_guides,
        search_space=LOW_RANK,
        defaults={**FIXED, "lr": 3e-3, "r": 8},
        paper="bone",
        description="Bone guided by a random matrix R of W's norm: blocks of side 8 become W + R D + D",
    ),
)
