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


def _arm(name: str, description: str, **settings: Any) -> Arm:
    def optimizer(model: nn.Module, hyperparameters: Hyperparameters) -> Optimizer:
        lr, weight_decay = hyperparameters["lr"], hyperparameters["weight_decay"]
        return ARO(
            matrix_groups(model),
            lr=lr,
            weight_decay=weight_decay,
            adamw=adamw_options(lr, hyperparameters),
            **settings,
        )

    return Arm(
        name=name,
        optimizer=optimizer,
        search_space={"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
        defaults={"lr": 3e-3, "weight_decay": 0.01},
        paper="aro",
        description=description,
    )


ARMS = (
    _arm("aro", "ARO-Sinkhorn: row and column normalisation in a frame turned by QR"),
    _arm("aro-sign", "ARO with the sign as its base rule", base="sign"),
    _arm("aro-polar", "ARO-Sinkhorn, the frame turned by the polar factor", policy="polar"),
    _arm("aro-eigen", "Sinkhorn in the eigenbasis of the momentum", policy="eigen"),
    _arm("sinkhorn", "Row and column normalisation of the momentum, without rotation", policy="none"),
)
