"""ARO, and the controls that tell what its rotation and its base rule do.

All act on hidden matrices, with AdamW on the rest at the same learning rate: updates have a root mean square
of 0.2, near AdamW's.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from weightlab.optim import ARO
from weightlab.trial.arm import Arm, Hyperparameters
from weightlab.trial.arms._groups import adamw_options, matrix_groups
from weightlab.trial.arms.torch_optimizers import LEARNING_RATE, WEIGHT_DECAY

SPACE = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
DEFAULTS = {"lr": 3e-3, "weight_decay": 0.01}


def _aro(model: nn.Module, hyperparameters: Hyperparameters, **settings: Any) -> Optimizer:
    lr, weight_decay = hyperparameters["lr"], hyperparameters["weight_decay"]
    return ARO(
        matrix_groups(model),
        lr=lr,
        weight_decay=weight_decay,
        adamw=adamw_options(lr, hyperparameters),
        **settings,
    )


ARMS = (
    Arm(
        name="aro",
        optimizer=lambda model, h: _aro(model, h),
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="aro",
        description="ARO-Sinkhorn: row and column normalisation in a frame turned by QR",
    ),
    Arm(
        name="aro-sign",
        optimizer=lambda model, h: _aro(model, h, base="sign"),
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="aro",
        description="ARO with the sign as its base rule",
    ),
    Arm(
        name="aro-polar",
        optimizer=lambda model, h: _aro(model, h, policy="polar"),
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="aro",
        description="ARO-Sinkhorn, the frame turned by the polar factor",
    ),
    Arm(
        name="aro-eigen",
        optimizer=lambda model, h: _aro(model, h, policy="eigen"),
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="aro",
        description="Sinkhorn in the eigenbasis of the momentum",
    ),
    Arm(
        name="sinkhorn",
        optimizer=lambda model, h: _aro(model, h, policy="none"),
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="aro",
        description="Row and column normalisation of the momentum, without rotation",
    ),
)
