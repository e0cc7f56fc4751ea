"""Langevin sampling, and the controls that tell what its noise does.

A trial scores the last sample, not the average over many that sampling is for: expect the arm at
temperature 1 to lose to its own control without noise. It shows what one sample costs.

The number of data, which sets the size of the noise, is that of the digits. Another task needs an arm of
its own with its own number.
"""

from __future__ import annotations

from optuna.distributions import FloatDistribution
from torch import nn
from torch.optim import Optimizer

from weightlab.optim import SGLD
from weightlab.optim.sgld import Preconditioner
from weightlab.trial.arm import Arm, Hyperparameters

LEARNING_RATE = FloatDistribution(1e-2, 3.0, log=True)
PRIOR = FloatDistribution(1e-4, 1e-1, log=True)
DEFAULTS = {"lr": 0.1, "weight_decay": 1e-3, "n_data": 1085}


def _sgld(
    model: nn.Module, hyperparameters: Hyperparameters, preconditioner: Preconditioner = None
) -> Optimizer:
    return SGLD(
        model.parameters(),
        lr=hyperparameters["lr"],
        n_data=hyperparameters["n_data"],
        temperature=hyperparameters["temperature"],
        weight_decay=hyperparameters["weight_decay"],
        preconditioner=preconditioner,
    )


ARMS = (
    Arm(
        name="sgld",
        optimizer=_sgld,
        search_space={"lr": LEARNING_RATE, "weight_decay": PRIOR},
        defaults={**DEFAULTS, "temperature": 1.0},
        paper="universality-lens",
        description="Langevin dynamics at temperature 1: one sample of the posterior given the digits",
    ),
    Arm(
        name="sgld-tempered",
        optimizer=_sgld,
        search_space={"lr": LEARNING_RATE, "temperature": FloatDistribution(1e-5, 1.0, log=True)},
        defaults=DEFAULTS,
        paper="universality-lens",
        description="Langevin dynamics with its temperature tuned, weight decay fixed",
    ),
    Arm(
        name="sgld-cold",
        optimizer=_sgld,
        search_space={"lr": LEARNING_RATE, "weight_decay": PRIOR},
        defaults={**DEFAULTS, "temperature": 0.0},
        paper="universality-lens",
        description="Langevin dynamics without its noise: plain SGD",
    ),
    Arm(
        name="psgld",
        optimizer=lambda model, h: _sgld(model, h, "rmsprop"),
        search_space={"lr": FloatDistribution(1e-5, 1e-2, log=True), "weight_decay": PRIOR},
        defaults={**DEFAULTS, "lr": 1e-3, "temperature": 1.0},
        paper="universality-lens",
        description="Langevin dynamics preconditioned as in RMSprop, at temperature 1",
    ),
)
