"""Your own optimizer as an arm: weightlab trial --task digits-mlp --arms adamw,examples/my_arm.py:arm"""

import torch
from optuna.distributions import FloatDistribution

from weightlab.trial import Arm


class SignMomentum(torch.optim.Optimizer):
    """Step by the sign of the momentum, with decoupled weight decay."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 0.1)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(buffer.sign(), alpha=group["lr"])
        return loss


arm = Arm(
    name="sign-momentum",
    optimizer=lambda model, hp: SignMomentum(model.parameters(), hp["lr"], hp["weight_decay"]),
    search_space={  # As many free dimensions as the baseline has.
        "lr": FloatDistribution(1e-4, 1e-2, log=True),
        "weight_decay": FloatDistribution(1e-3, 0.3, log=True),
    },
)
