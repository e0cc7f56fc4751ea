"""AuON in its published forms, and the controls that tell what each of its parts does.

All act on hidden matrices, with AdamW on the rest. Forms whose update has a size of its own share one
learning rate with that AdamW, matched in RMS. The un-normalised forms are linear in the gradient, so
there AdamW keeps a fixed rate and the tuned one is the matrices' alone: two free dimensions either way.
"""

from __future__ import annotations

from typing import Any

from optuna.distributions import FloatDistribution
from torch import nn
from torch.optim import Optimizer

from weightlab.optim import AuON, HybridAuON
from weightlab.trial.arm import Arm, Hyperparameters
from weightlab.trial.arms._groups import adamw_options, matrix_groups
from weightlab.trial.arms.torch_optimizers import LEARNING_RATE, WEIGHT_DECAY

MATCHED_SPACE = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
MATCHED_DEFAULTS = {"lr": 3e-3, "weight_decay": 0.01}
LINEAR_SPACE = {
    "lr": FloatDistribution(1e-2, 3.0, log=True),
    "weight_decay": FloatDistribution(1e-5, 1e-2, log=True),
}
LINEAR_DEFAULTS = {"lr": 0.24, "weight_decay": 1e-4, "adamw_lr": 3e-3}


def _matched(
    model: nn.Module, hyperparameters: Hyperparameters, method: type[AuON], **settings: Any
) -> Optimizer:
    lr, weight_decay = hyperparameters["lr"], hyperparameters["weight_decay"]
    return method(
        matrix_groups(model),
        lr=lr,
        weight_decay=weight_decay,
        adjust_lr="match_rms_adamw",
        adamw=adamw_options(lr, hyperparameters),
        **settings,
    )


def _linear(model: nn.Module, hyperparameters: Hyperparameters, gamma: float) -> Optimizer:
    return AuON(
        matrix_groups(model),
        lr=hyperparameters["lr"],
        weight_decay=hyperparameters["weight_decay"],
        gamma=gamma,
        normalize=False,
        adamw=adamw_options(hyperparameters["adamw_lr"], hyperparameters),
    )


ARMS = (
    Arm(
        name="auon",
        optimizer=lambda model, h: _matched(model, h, AuON, gamma=1.0),
        search_space=MATCHED_SPACE,
        defaults=MATCHED_DEFAULTS,
        paper="auon",
        description="AuON of the paper's first version: momentum over its norm and the cosh brake",
    ),
    Arm(
        name="normalized-sgd",
        optimizer=lambda model, h: _matched(model, h, AuON, gamma=0.0),
        search_space=MATCHED_SPACE,
        defaults=MATCHED_DEFAULTS,
        paper="auon",
        description="AuON without its brake: momentum over its norm",
    ),
    Arm(
        name="auon-code",
        optimizer=lambda model, h: _linear(model, h, gamma=1.5),
        search_space=LINEAR_SPACE,
        defaults=LINEAR_DEFAULTS,
        paper="auon",
        description="AuON of the official code: momentum over the cosh brake, not normalised",
    ),
    Arm(
        name="ema-nesterov-sgd",
        optimizer=lambda model, h: _linear(model, h, gamma=0.0),
        search_space=LINEAR_SPACE,
        defaults=LINEAR_DEFAULTS,
        paper="auon",
        description="The official code's AuON without its brake: SGD with averaged Nesterov momentum",
    ),
    Arm(
        name="auon-hybrid-1",
        optimizer=lambda model, h: _matched(model, h, HybridAuON, gamma=1.0, ns_steps=1),
        search_space=MATCHED_SPACE,
        defaults=MATCHED_DEFAULTS,
        paper="auon",
        description="Hybrid-AuON of the paper: one Newton-Schulz step, then the brake",
    ),
    Arm(
        name="auon-hybrid-5",
        optimizer=lambda model, h: _matched(model, h, HybridAuON, gamma=1.5, ns_steps=5),
        search_space=MATCHED_SPACE,
        defaults=MATCHED_DEFAULTS,
        paper="auon",
        description="Hybrid-AuON of the official code: five Newton-Schulz steps, then the brake",
    ),
)
