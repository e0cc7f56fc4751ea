import math

import pytest
import torch
from torch import nn

from weightlab.linalg import orthogonality_deviation
from weightlab.trial import registry

NAMES = ["orthogonality-penalty", "lambda-orthogonality", "lambda-orthogonality-gated", "relaxed-orthogonal"]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.mark.parametrize("name", NAMES)
def test_dimensions_are_those_of_the_baseline(name):
    assert len(registry.arm(name).search_space) == len(registry.arm("adamw").search_space)


@pytest.mark.parametrize("name", NAMES[:3])
def test_penalties_are_of_hidden_matrices_alone(name):
    arm, net = registry.arm(name), model()
    hyperparameters = {**arm.defaults, "penalty_weight": 0.5}
    penalty = arm.penalty(net, hyperparameters)
    expected = 0.0
    for layer in (net[0], net[2]):
        k = min(layer.weight.shape)
        D = orthogonality_deviation(layer.weight).item()
        excess = D - arm.defaults["tol"] * math.sqrt(k)
        expected += D / (1 + math.exp(-10 * excess)) if "gated" in name else max(0.0, excess) ** 2
    assert penalty.item() == pytest.approx(0.5 * expected, rel=1e-4)
    penalty.backward()
    assert net[4].weight.grad is None
    assert net[0].bias.grad is None


def test_the_parametrization_holds_hidden_matrices_within_the_tolerance():
    arm = registry.arm("relaxed-orthogonal")
    net = arm.transform(model(), arm.defaults)
    optimizer = arm.optimizer(net, {**arm.defaults, "lr": 0.05})
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), torch.arange(32) % 3).backward()
        optimizer.step()
    for layer, k in ((net[0], 6), (net[2], 16)):
        assert orthogonality_deviation(layer.weight).item() == pytest.approx(0.2 * math.sqrt(k), abs=1e-4)
    assert not nn.utils.parametrize.is_parametrized(net[4])
