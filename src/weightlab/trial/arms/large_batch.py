"""The plain regime of "Train longer, generalize better", and ghost batch norm within it.

How large a batch is, and how long training lasts, belong to the task; square-root scaling is
`train.scale_lr` on the learning rate, which a tuned arm finds by itself.
"""

from __future__ import annotations

from optuna.distributions import FloatDistribution
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer

from weightlab.nn import GhostBatchNorm
from weightlab.trial.arm import Arm, Hyperparameters

SPACE = {
    "lr": FloatDistribution(3e-3, 3.0, log=True),
    "weight_decay": FloatDistribution(1e-5, 1e-2, log=True),
}
DEFAULTS = {"lr": 0.1, "weight_decay": 1e-4, "clip": 5.0}


def clipped_sgd(model: nn.Module, hyperparameters: Hyperparameters) -> Optimizer:
    """Build SGD with momentum 0.9 that clips the gradient's global norm before each step."""
    optimizer = SGD(
        model.parameters(),
        lr=hyperparameters["lr"],
        weight_decay=hyperparameters["weight_decay"],
        momentum=0.9,
        foreach=True,
    )

    def clip(optimizer: Optimizer, args: object, kwargs: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        clip_grad_norm_(parameters, hyperparameters["clip"], foreach=True)

    optimizer.register_step_pre_hook(clip)
    return optimizer


def drops(step: int, steps: int, hyperparameters: Hyperparameters) -> float:
    """Learning-rate factor: a tenth from half of the steps on, a hundredth from three quarters on.

    Example:
        >>> [drops(step, 8, {}) for step in range(8)]
        [1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    """
    return 1.0 if 2 * step < steps else 0.1 if 4 * step < 3 * steps else 0.01


def with_ghosts(model: nn.Module, hyperparameters: Hyperparameters) -> nn.Module:
    """Turn the model's batch norm layers into ghost batch norm.

    Raises:
        ValueError: If it has none.
    """
    model = GhostBatchNorm.convert(model, hyperparameters["ghost_size"])
    if not any(isinstance(module, GhostBatchNorm) for module in model.modules()):
        raise ValueError(
            "the model has no batch norm layer to make ghosts in; take a task that has, e.g. cifar10-resnet"
        )
    return model


ARMS = (
    Arm(
        name="clipped-sgd",
        optimizer=clipped_sgd,
        schedule=drops,
        search_space=SPACE,
        defaults=DEFAULTS,
        paper="ghost-batch-norm",
        description="SGD with momentum 0.9, clipped gradients, rate dropped at 50 and 75 %",
    ),
    Arm(
        name="ghost-bn",
        optimizer=clipped_sgd,
        schedule=drops,
        transform=with_ghosts,
        search_space=SPACE,
        defaults={**DEFAULTS, "ghost_size": 32},
        paper="ghost-batch-norm",
        description="clipped-sgd with batch norm over ghosts of 32",
    ),
)
