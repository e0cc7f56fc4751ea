"""Lion and SOAP from the package `pytorch_optimizer`: what a user would otherwise reach for.

The package (extra `bench`) is imported when an optimizer is built, so listing arms never needs it.
Both act on all parameters with the settings that the package and the papers call default, and have
AdamW's two free dimensions.
"""

from __future__ import annotations

from optuna.distributions import FloatDistribution
from torch import nn
from torch.optim import Optimizer

from weightlab._lazy import require
from weightlab.trial.arm import Arm, Hyperparameters
from weightlab.trial.arms.torch_optimizers import LEARNING_RATE, WEIGHT_DECAY

# A step of signs moves every entry by the learning rate, AdamW's typically by a fraction of it. Lion's
# paper therefore advises learning rates 3 to 10 times lower than AdamW's and decay larger by as much,
# which keeps their product; 5 lies in the middle of that range on a log scale.
LION_FACTOR = 5.0


def lion(model: nn.Module, hyperparameters: Hyperparameters) -> Optimizer:
    """Build Lion (Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675) on all parameters."""
    return require("pytorch_optimizer", "bench").Lion(
        model.parameters(),
        lr=hyperparameters["lr"],
        weight_decay=hyperparameters["weight_decay"],
        betas=(0.9, 0.99),
    )


def soap(model: nn.Module, hyperparameters: Hyperparameters) -> Optimizer:
    """Build SOAP (SOAP: Improving and Stabilizing Shampoo using Adam, arXiv 2409.11321) on all parameters.

    Vectors take its Adam. As in the authors' code, the first step only collects statistics and
    moves nothing.
    """
    return require("pytorch_optimizer", "bench").SOAP(
        model.parameters(),
        lr=hyperparameters["lr"],
        weight_decay=hyperparameters["weight_decay"],
        betas=(0.95, 0.95),
        precondition_frequency=10,
    )


ARMS = (
    Arm(
        name="lion",
        optimizer=lion,
        search_space={
            "lr": FloatDistribution(
                LEARNING_RATE.low / LION_FACTOR, LEARNING_RATE.high / LION_FACTOR, log=True
            ),
            "weight_decay": FloatDistribution(
                WEIGHT_DECAY.low * LION_FACTOR, WEIGHT_DECAY.high * LION_FACTOR, log=True
            ),
        },
        defaults={"lr": 6e-4, "weight_decay": 0.05},
        requires=("pytorch_optimizer",),
        description="Lion of pytorch_optimizer, betas (0.9, 0.99)",
    ),
    Arm(
        name="soap",
        optimizer=soap,
        search_space={"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
        defaults={"lr": 3e-3, "weight_decay": 0.01},
        requires=("pytorch_optimizer",),
        description="SOAP of pytorch_optimizer, betas (0.95, 0.95), eigenbases renewed every 10 steps",
    ),
)
