"""Your own data and model as a task: weightlab trial --task examples/my_task.py:task --arms adamw,sgd"""

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn import functional as F


class Tumours:
    name, metric, mode = "tumours", "error", "min"
    batch_size, steps, minimal_effect = 32, 150, 0.01

    def __init__(self):
        x, y = (torch.tensor(part, dtype=torch.float32) for part in load_breast_cancer(return_X_y=True))
        x = (x - x[::2].mean(0)) / x[::2].std(0)
        self.data = {"train": (x[::2], y[::2]), "validation": (x[1::4], y[1::4]), "test": (x[3::4], y[3::4])}

    def build(self, generator):  # PyTorch's global generator is seeded as well, so defaults are fine.
        return nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(0))

    def batches(self, split, generator):  # One epoch; it is asked for again when it ends.
        x, y = self.data[split]
        for index in torch.randperm(len(y), generator=generator).split(self.batch_size)[:-1]:
            yield x[index], y[index]

    def loss(self, model, batch):
        return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    def evaluate(self, model, split):
        x, y = (part.to(next(model.parameters()).device) for part in self.data[split])
        return {"error": ((model(x) > 0) != y).float().mean().item()}


task = Tumours
