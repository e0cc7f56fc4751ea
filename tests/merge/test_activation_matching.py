from __future__ import annotations

import copy

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from weightlab.merge import Permutation, PermutationSpec, activation_matching, apply_permutation


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.inner = nn.Conv2d(5, 4, 3, padding=1, groups=1)
        self.outer = nn.Conv2d(4, 5, 1)
        self.mix = nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.head = nn.Linear(5 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.outer(F.relu(self.inner(x)))
        return self.head(self.mix(x).flatten(1))


@pytest.mark.parametrize("correlation", [False, True])
@pytest.mark.parametrize("build", [
    Residual, lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 7), nn.Linear(7, 2)),
])  # fmt: skip
def test_known_permutation_is_found_in_one_pass(build, correlation: bool):
    torch.manual_seed(0)
    model = build().double()
    data = [torch.randn(6, 1, 4, 4, dtype=torch.float64) for _ in range(3)]
    spec = PermutationSpec.from_model(model, data[0])
    hidden = Permutation.random(spec.group_sizes(model.state_dict()))
    other = copy.deepcopy(model)
    other.load_state_dict(apply_permutation(spec, hidden, model.state_dict()))
    model.train()
    before = copy.deepcopy(model.state_dict())
    found = activation_matching(model, other, [(x, None) for x in data], spec, correlation=correlation)
    assert found.indices.keys() == hidden.indices.keys()
    assert found.compose(hidden).is_identity()
    assert model.training
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize("correlation", [False, True])
def test_against_all_activations_at_once(correlation: bool):
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2)).double() for _ in range(2))
    x = torch.randn(40, 3, dtype=torch.float64) + 1
    za, zb = a[0](x).detach().T, b[0](x).detach().T
    similarity = torch.corrcoef(torch.cat([za, zb]))[:7, 7:] if correlation else za @ zb.T
    best = linear_sum_assignment(similarity.numpy(), maximize=True)[1]
    spec = PermutationSpec({"0.weight": ("h", None), "0.bias": ("h",), "2.weight": (None, "h")})
    found = activation_matching(a, b, x.split(9), spec, correlation=correlation)
    assert found.indices["h"].tolist() == best.tolist()


def test_units_that_never_change_do_no_harm():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1] = 0
    spec = PermutationSpec({"0.weight": ("h", None), "0.bias": ("h",), "1.weight": (None, "h")})
    found = activation_matching(model, model, [torch.randn(9, 3)], spec, correlation=True)
    assert found.is_identity()


def test_bad_input():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    spec = PermutationSpec({"0.weight": ("h", None), "0.bias": ("h",), "1.weight": (None, "h")})
    with pytest.raises(ValueError, match="loader has no batches"):
        activation_matching(model, model, [], spec)
    with pytest.raises(ValueError, match="activations of 0 are not finite on this data"):
        activation_matching(model, model, [torch.full((1, 3), torch.inf)], spec)
    with pytest.raises(ValueError, match=r"0.weight has shape \(4, 3\) in params_a and \(5, 3\) in params_b"):
        activation_matching(model, nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), [], spec)
