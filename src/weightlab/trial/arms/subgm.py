"""SubGM's step outside the problem it was made for: hidden matrices of any network.

There is no factor and no tiny start here; what remains is a step of a given share of each matrix's own
norm, against a gradient whose size does not count.
"""

from __future__ import annotations

from optuna.distributions import FloatDistribution
from torch import nn
from torch.optim import AdamW, Optimizer

from weightlab.optim import SubGM, split_named_parameters
from weightlab.trial.arm import Arm, Hyperparameters
from weightlab.trial.arms.torch_optimizers import LEARNING_RATE


def subgm(model: nn.Module, hyperparameters: Hyperparameters) -> list[Optimizer]:
    """Build SubGM on hidden matrices, shrinking by the trial's schedule, and AdamW on the rest."""
    named_matrices, named_others = split_named_parameters(model)
    optimizers: list[Optimizer] = []
    if named_matrices:
        optimizers.append(SubGM(named_matrices, lr=hyperparameters["lr"], decay=1.0))
    if named_others:
        optimizers.append(
            AdamW(named_others, lr=hyperparameters["adamw_lr"], betas=(0.9, 0.95), weight_decay=0.01)
        )
    return optimizers


ARMS = (
    Arm(
        name="subgm",
        optimizer=subgm,
        search_space={"lr": FloatDistribution(3e-4, 0.1, log=True), "adamw_lr": LEARNING_RATE},
        defaults={"lr": 0.01, "adamw_lr": 3e-3},
        paper="subgm",
        description="Steps of a share of each hidden matrix's norm; AdamW on the rest",
    ),
)
