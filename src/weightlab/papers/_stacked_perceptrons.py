"""Many small perceptrons trained at once, each on its own part of one data set, with its own learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

HIDDEN = 128
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


@dataclass(frozen=True)
class Training:
    """One perceptron's.

    Attributes:
        indices: Examples to train on, int64.
        lr: Peak learning rate.
        seed: Of initial weights and order.
    """

    indices: Tensor
    lr: float
    seed: int


def train_stacked(
    inputs: Tensor,
    targets: Tensor,
    trainings: Sequence[Training],
    *,
    classes: int,
    steps: int,
    batch_size: int,
    tell: Callable[[float], None] = lambda fraction: None,
) -> list[Tensor]:
    """Train perceptrons with one hidden layer of ReLU by SGD with Nesterov momentum 0.9 and weight decay 5e-4.

    The learning rate falls to 0 along a cosine. Weights start as `nn.Linear` leaves them. A batch goes on into the next
    epoch where an epoch ends.

    Args:
        inputs: `(N, d)`.
        targets: Classes `(N,)`, or for each training `(M, N)`.
        trainings: `M` of them.
        classes: Number of classes.
        steps: Optimizer steps.
        batch_size: Examples in a batch.
        tell: Called with the fraction that is done.

    Returns:
        Weights and biases, `(M, d, hidden)`, `(M, 1, hidden)`, `(M, hidden, classes)`, `(M, 1, classes)`.
    """
    labels = F.one_hot(targets, classes).float().expand(len(trainings), -1, -1)
    orders = torch.stack([_order(training, steps * batch_size) for training in trainings])
    lr = torch.tensor([training.lr for training in trainings])[:, None, None]
    parameters = _start([training.seed for training in trainings], inputs.shape[1], classes)
    momenta = [torch.zeros_like(parameter) for parameter in parameters]
    models = torch.arange(len(trainings))[:, None]
    for step in range(steps):
        chosen = orders[:, step * batch_size : (step + 1) * batch_size].long()
        gradients = _gradients(parameters, inputs[chosen], labels[models, chosen])
        factor = lr * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for parameter, momentum, gradient in zip(parameters, momenta, gradients, strict=True):
            gradient.add_(parameter, alpha=WEIGHT_DECAY)
            momentum.mul_(MOMENTUM).add_(gradient)
            parameter.sub_(factor * gradient.add_(momentum, alpha=MOMENTUM))
        if step % 50 == 0:
            tell(step / steps)
    return parameters


def logits(parameters: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Return what the perceptrons say, `(M, n, classes)`, of inputs `(n, d)` or `(M, n, d)`."""
    first, first_bias, second, second_bias = parameters
    return (inputs @ first + first_bias).relu() @ second + second_bias


def _order(training: Training, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(2 * training.seed + 1)
    size = len(training.indices)
    epochs = math.ceil(count / size)
    order = torch.cat([torch.randperm(size, generator=generator) for _ in range(epochs)])[:count]
    return training.indices[order].to(torch.int32)


def _start(seeds: Sequence[int], features: int, classes: int) -> list[Tensor]:
    stacks: list[list[Tensor]] = [[], [], [], []]
    for seed in seeds:
        generator = torch.Generator().manual_seed(2 * seed)
        for place, (fan_in, fan_out) in enumerate(((features, HIDDEN), (HIDDEN, classes))):
            bound = fan_in**-0.5
            for part, rows in enumerate((fan_in, 1)):
                drawn = torch.rand(rows, fan_out, generator=generator)
                stacks[2 * place + part].append((2 * drawn - 1) * bound)
    return [torch.stack(stack) for stack in stacks]


def _gradients(parameters: Sequence[Tensor], x: Tensor, labels: Tensor) -> list[Tensor]:
    first, first_bias, second, second_bias = parameters
    hidden = torch.baddbmm(first_bias, x, first).relu_()
    error = torch.baddbmm(second_bias, hidden, second).softmax(-1).sub_(labels).div_(x.shape[1])
    outer = (error.mT @ hidden).mT
    inner = (error @ second.mT).mul_(hidden.sign_())
    return [x.mT @ inner, inner.sum(1, keepdim=True), outer, error.sum(1, keepdim=True)]
