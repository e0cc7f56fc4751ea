"""How arms divide a model: hidden matrices to the method, AdamW for the rest."""

from __future__ import annotations

from torch import nn

from weightlab.optim import split_named_parameters
from weightlab.optim.matrix_optimizer import AdamWOptions
from weightlab.trial.arm import Hyperparameters


def matrix_groups(model: nn.Module) -> list[dict]:
    """Parameter groups for a `MatrixOptimizer`: hidden matrices, and what AdamW moves."""
    matrices, others = split_named_parameters(model)
    groups = [{"params": matrices, "use_matrix_rule": True}, {"params": others, "use_matrix_rule": False}]
    return [group for group in groups if group["params"]]


def adamw_options(lr: float, hyperparameters: Hyperparameters) -> AdamWOptions:
    """Options of the AdamW beside a matrix rule: the baseline's betas, the rule's weight decay."""
    return {"lr": lr, "weight_decay": hyperparameters["weight_decay"], "betas": (0.9, 0.95)}
