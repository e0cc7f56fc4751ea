"""Optimizers that PyTorch brings: the baselines."""

from __future__ import annotations

from optuna.distributions import FloatDistribution
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from weightlab.optim import split_named_parameters
from weightlab.trial.arm import Arm, Hyperparameters

LEARNING_RATE = FloatDistribution(5e-4, 5e-2, log=True)
WEIGHT_DECAY = FloatDistribution(1e-3, 0.3, log=True)


def adamw(model: nn.Module, hyperparameters: Hyperparameters) -> Optimizer:
    """Build AdamW on all parameters."""
    return AdamW(
        model.parameters(),
        lr=hyperparameters["lr"],
        weight_decay=hyperparameters["weight_decay"],
        betas=(0.9, 0.95),
        foreach=True,
    )


def sgd(model: nn.Module, hyperparameters: Hyperparameters) -> Optimizer:
    """Build SGD with Nesterov momentum on all parameters."""
    return SGD(
        model.parameters(),
        lr=hyperparameters["lr"],
        weight_decay=hyperparameters["weight_decay"],
        momentum=0.9,
        nesterov=True,
        foreach=True,
    )


def muon(model: nn.Module, hyperparameters: Hyperparameters) -> list[Optimizer]:
    """Build Muon on hidden matrices and AdamW on the rest, at one learning rate (updates matched in RMS)."""
    named_matrices, named_others = split_named_parameters(model)
    matrices = [p for _, p in named_matrices if p.ndim == 2]
    others = [p for _, p in named_others] + [p for _, p in named_matrices if p.ndim != 2]
    settings = {"lr": hyperparameters["lr"], "weight_decay": hyperparameters["weight_decay"]}
    optimizers: list[Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, momentum=0.95, adjust_lr_fn="match_rms_adamw", **settings))
    if others:
        optimizers.append(AdamW(others, betas=(0.9, 0.95), foreach=True, **settings))
    return optimizers


ARMS = (
    Arm(
        name="adamw",
        optimizer=adamw,
        search_space={"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
        defaults={"lr": 3e-3, "weight_decay": 0.01},
        description="torch.optim.AdamW, betas (0.9, 0.95)",
    ),
    Arm(
        name="sgd",
        optimizer=sgd,
        search_space={
            "lr": FloatDistribution(3e-3, 1.0, log=True),
            "weight_decay": FloatDistribution(1e-5, 1e-2, log=True),
        },
        defaults={"lr": 0.1, "weight_decay": 1e-4},
        description="torch.optim.SGD, Nesterov momentum 0.9",
    ),
    Arm(
        name="muon",
        optimizer=muon,
        search_space={"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
        defaults={"lr": 3e-3, "weight_decay": 0.01},
        description="torch.optim.Muon on hidden matrices, AdamW on the rest",
    ),
)
