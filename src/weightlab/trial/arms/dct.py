"""AdamW and orthogonalised momentum in a quarter of each hidden matrix's dimensions, by choice of basis.

The AdamW arms differ in the basis alone: cosines, the gradient's singular vectors (at every step, and at every
200th as GaLore has it), a fixed rotation, coordinates. All have the baseline's betas; AdamW on the rest has the
same learning rate and weight decay.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from weightlab.optim import DCTAdamW, Trion
from weightlab.trial.arm import Arm, Hyperparameters
from weightlab.trial.arms._groups import adamw_options, matrix_groups
from weightlab.trial.arms.torch_optimizers import LEARNING_RATE, WEIGHT_DECAY

SPACE = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
DEFAULTS = {"lr": 3e-3, "weight_decay": 0.01, "rank": 0.25}


def _low_rank_adamw(model: nn.Module, hyperparameters: Hyperparameters, **settings: Any) -> Optimizer:
    return DCTAdamW(
        matrix_groups(model),
        lr=hyperparameters["lr"],
        betas=(0.9, 0.95),
        weight_decay=hyperparameters["weight_decay"],
        rank=hyperparameters["rank"],
        adamw=adamw_options(hyperparameters["lr"], hyperparameters),
        **settings,
    )


def _trion(model: nn.Module, hyperparameters: Hyperparameters) -> Optimizer:
    lr = hyperparameters["lr"]
    return Trion(
        matrix_groups(model),
        lr=lr,
        weight_decay=hyperparameters["weight_decay"],
        rank=hyperparameters["rank"],
        adjust_lr="match_rms_adamw",
        adamw=adamw_options(lr, hyperparameters),
    )


ARMS = (
    Arm(
        name="dct-adamw",
        optimizer=lambda model, h: _low_rank_adamw(model, h),
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="svd-free-dct",
        description="AdamW in the quarter of the cosine basis that fits the gradient best, chosen at every step",
    ),
    Arm(
        name="dct-adamw-feedback",
        optimizer=lambda model, h: _low_rank_adamw(model, h, error_feedback="int8"),
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="svd-free-dct",
        description="The same with what was dropped added to the next gradient, kept in 8 bits",
    ),
    Arm(
        name="svd-adamw",
        optimizer=lambda model, h: _low_rank_adamw(model, h, basis="svd"),
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="svd-free-dct",
        description="AdamW along a quarter of the gradient's singular vectors, by an SVD at every step",
    ),
    Arm(
        name="svd-adamw-200",
        optimizer=lambda model, h: _low_rank_adamw(model, h, basis="svd", update_gap=200),
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="svd-free-dct",
        description="The same with an SVD at every 200th step, as in GaLore",
    ),
    Arm(
        name="random-basis-adamw",
        optimizer=lambda model, h: _low_rank_adamw(model, h, basis="random"),
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="svd-free-dct",
        description="Control: dct-adamw with a fixed random rotation instead of cosines",
    ),
    Arm(
        name="identity-basis-adamw",
        optimizer=lambda model, h: _low_rank_adamw(model, h, basis="identity"),
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="svd-free-dct",
        description="Control: dct-adamw with coordinates instead of cosines",
    ),
    Arm(
        name="trion",
        optimizer=_trion,
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="svd-free-dct",
        description="Trion: momentum orthogonalised in the quarter of the cosine basis that fits it best",
    ),
)
