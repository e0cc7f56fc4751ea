"""Hidden matrices near orthogonality: by a penalty, strict or with a tolerance, and by a parametrization.

AdamW trains all. The penalty's weight is tuned in place of weight decay, which pulls matrices away from orthogonality; where
there is no penalty, weight decay acts on the matrix underneath. Two free dimensions either way.
"""

from __future__ import annotations

import torch
from optuna.distributions import FloatDistribution
from torch import Tensor, nn

from weightlab.nn import OrthogonalityPenalty, relaxed_orthogonal
from weightlab.nn.orthogonality_penalty import Gate
from weightlab.optim import split_named_parameters
from weightlab.trial.arm import Arm, Hyperparameters
from weightlab.trial.arms.torch_optimizers import LEARNING_RATE, WEIGHT_DECAY, adamw

PENALIZED = {"lr": LEARNING_RATE, "penalty_weight": FloatDistribution(1e-4, 1e-1, log=True)}
PENALIZED_DEFAULTS = {"lr": 3e-3, "penalty_weight": 3e-3, "weight_decay": 0.0}
TOL = 0.2
"""λ for a direction: λ/√d."""


def _hidden(model: nn.Module) -> list[Tensor]:
    return [p for _, p in split_named_parameters(model)[0] if p.ndim == 2]


def _penalty(model: nn.Module, hyperparameters: Hyperparameters, gate: Gate = "hinge2") -> Tensor:
    penalty = OrthogonalityPenalty(hyperparameters["tol"], gate, relative=True)
    return hyperparameters["penalty_weight"] * torch.stack([penalty(w) for w in _hidden(model)]).sum()


def _parametrized(model: nn.Module, hyperparameters: Hyperparameters) -> nn.Module:
    for name in [name for name, p in split_named_parameters(model)[0] if p.ndim == 2]:
        owner, _, attribute = name.rpartition(".")
        relaxed_orthogonal(model.get_submodule(owner), attribute, tol=hyperparameters["tol"], relative=True)
    return model


ARMS = (
    Arm(
        name="orthogonality-penalty",
        optimizer=adamw,
        penalty=_penalty,
        search_space=PENALIZED,
        defaults={**PENALIZED_DEFAULTS, "tol": 0.0},
        paper="lambda-orthogonality",
        description="AdamW, hidden matrices drawn to orthogonality by the squared deviation",
    ),
    Arm(
        name="lambda-orthogonality",
        optimizer=adamw,
        penalty=_penalty,
        search_space=PENALIZED,
        defaults={**PENALIZED_DEFAULTS, "tol": TOL},
        paper="lambda-orthogonality",
        description="AdamW, hidden matrices drawn to within a tolerance of orthogonality by a squared hinge",
    ),
    Arm(
        name="lambda-orthogonality-gated",
        optimizer=adamw,
        penalty=lambda model, h: _penalty(model, h, "sigmoid"),
        search_space=PENALIZED,
        defaults={**PENALIZED_DEFAULTS, "tol": TOL},
        paper="lambda-orthogonality",
        description="AdamW, hidden matrices drawn to within a tolerance of orthogonality by a smooth gate",
    ),
    Arm(
        name="relaxed-orthogonal",
        optimizer=adamw,
        transform=_parametrized,
        search_space={"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
        defaults={"lr": 3e-3, "weight_decay": 0.01, "tol": TOL},
        paper="lambda-orthogonality",
        description="AdamW, hidden matrices held within a tolerance of orthogonality by a parametrization",
    ),
)
