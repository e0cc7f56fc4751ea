"""ROOT, the same without each of its two changes, and without both, which is Muon on the same engine.

All act on hidden matrices, with AdamW on the rest, and share one learning rate with it, matched in RMS.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from weightlab.optim import ROOT
from weightlab.trial.arm import Arm, Hyperparameters
from weightlab.trial.arms._groups import adamw_options, matrix_groups
from weightlab.trial.arms.torch_optimizers import LEARNING_RATE, WEIGHT_DECAY

SPACE = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
DEFAULTS = {"lr": 3e-3, "weight_decay": 0.01}


def _root(model: nn.Module, hyperparameters: Hyperparameters, **settings: Any) -> Optimizer:
    return ROOT(
        matrix_groups(model),
        lr=hyperparameters["lr"],
        weight_decay=hyperparameters["weight_decay"],
        adamw=adamw_options(hyperparameters["lr"], hyperparameters),
        **settings,
    )


ARMS = (
    Arm(
        name="root",
        optimizer=lambda model, h: _root(model, h),
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="root",
        description="ROOT: momentum clipped at its 0.9 quantile, Newton-Schulz with coefficients by shape",
    ),
    Arm(
        name="root-no-clip",
        optimizer=lambda model, h: _root(model, h, clip_quantile=None),
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="root",
        description="ROOT without clipping: Muon with coefficients by shape",
    ),
    Arm(
        name="root-no-fit",
        optimizer=lambda model, h: _root(model, h, coefficients="muon"),
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="root",
        description="ROOT with Muon's coefficients: Muon on clipped momentum",
    ),
    Arm(
        name="muon-ns",
        optimizer=lambda model, h: _root(model, h, clip_quantile=None, coefficients="muon"),
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="root",
        description="ROOT without both: Muon on the same engine, in the parameters' precision",
    ),
)
