"""A regression task whose runs take milliseconds, with the faults that a trial must survive on demand."""

import torch
from optuna.distributions import FloatDistribution
from torch import nn

from weightlab.tasks.base import Task
from weightlab.trial import Arm


class Regression(Task):
    """Fit a noisy linear map; 4 inputs, squared error."""

    metric = "error"
    mode = "min"
    batch_size = 8
    steps = 12
    minimal_effect = 1e-3

    def __init__(self, name="regression", mode="min"):
        self.name = name
        self.mode = mode
        generator = torch.Generator().manual_seed(7)
        self._x = torch.randn(96, 4, generator=generator)
        self._y = self._x @ torch.tensor([1.0, -2.0, 3.0, 0.5]) + 0.1 * torch.randn(96, generator=generator)
        self._splits = {"train": slice(0, 64), "validation": slice(64, 80), "test": slice(80, 96)}

    def build(self, generator):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))

    def batches(self, split, generator):
        where = self._splits[split]
        x, y = self._x[where], self._y[where]
        for rows in torch.randperm(len(x), generator=generator).split(self.batch_size):
            yield x[rows], y[rows]

    def loss(self, model, batch):
        x, y = batch
        return (model(x).squeeze(1) - y).square().mean()

    def evaluate(self, model, split):
        where = self._splits[split]
        error = (model(self._x[where]).squeeze(1) - self._y[where]).square().mean().item()
        return {"error": error if self.mode == "min" else -error, "other": 1.0}


def sgd_arm(name="sgd", factor=1.0, **changes):
    """SGD whose learning rate is the drawn one times `factor`."""
    return Arm(
        name=name,
        optimizer=lambda model, h: torch.optim.SGD(model.parameters(), lr=factor * h["lr"]),
        search_space={"lr": FloatDistribution(1e-3, 1e-1, log=True)},
        defaults={"lr": 1e-2},
        **changes,
    )


task = Regression()
arm = sgd_arm("slow", factor=0.1)
