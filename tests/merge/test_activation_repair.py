from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from weightlab.merge import interpolate, repair_


def mlp(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def conv(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 2), nn.Flatten(), nn.Linear(36, 3)
    ).double()


X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).double()
IMAGES = torch.randn(20, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()


def statistics(model: nn.Sequential, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    found = []
    for layer in model:
        x = layer(x).detach()
        if hasattr(layer, "weight"):
            flat = x.transpose(0, 1).flatten(1)
            found.append((flat.mean(1), flat.std(1)))
    return found


@pytest.mark.parametrize(("build", "x"), [(mlp, X), (conv, IMAGES)], ids=["linear", "conv"])
@pytest.mark.parametrize("lam", [0.5, 0.2])
def test_outputs_vary_as_those_of_the_parents_do(build, x: Tensor, lam: float):
    parents = build(0), build(1)
    a, b = (parent.state_dict() for parent in parents)
    model = build(2).train()
    model.load_state_dict(interpolate(a, b, lam))
    assert repair_(model, a, b, [(x, "labels")], lam) == ["0", "2", "4"]
    assert model.training
    for own, left, right in zip(*(statistics(m, x) for m in (model, *parents)), strict=True):
        for mine, first, second in zip(own, left, right, strict=True):
            assert torch.allclose(mine, (1 - lam) * first + lam * second, atol=1e-10)


def test_a_network_is_its_own_repair():
    model = mlp(0)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    repair_(model, state, state, [X])
    assert all(torch.allclose(x, state[name], atol=1e-12) for name, x in model.state_dict().items())


def test_ends_are_the_parents():
    a, b = mlp(0).state_dict(), mlp(1).state_dict()
    model = mlp(2)
    for lam, parent in ((0, a), (1, b)):
        model.load_state_dict(parent)
        repair_(model, a, b, [X], lam)
        assert all(torch.allclose(x, parent[name], atol=1e-10) for name, x in model.state_dict().items())


def test_layers_without_bias_constant_outputs_and_other_shapes():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.free, self.dead, self.idle = nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.dead(self.free(x))

    model = Model()
    parent = {name: x.clone() for name, x in model.state_dict().items()}
    other = {**parent, "dead.bias": parent["dead.bias"] + 2}
    with torch.no_grad():
        model.dead.weight.zero_()
    x = torch.randn(6, 3, 4)
    assert repair_(model, parent, other, [x]) == ["dead"]
    assert torch.equal(model.dead.weight, torch.zeros(4, 4))
    # Its mean is right even so.
    expected = nn.functional.linear(
        x @ parent["free.weight"].T, parent["dead.weight"], parent["dead.bias"] + 1
    )
    assert torch.allclose(model(x).mean((0, 1)), expected.mean((0, 1)), atol=1e-6)
    assert torch.equal(model.idle.weight, parent["idle.weight"])


def test_bad_input_leaves_the_model_as_it_was():
    a, b = mlp(0).state_dict(), mlp(1).state_dict()
    model = mlp(2)
    kept = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"lam must lie in \[0, 1\], got 2"):
        repair_(model, a, b, [X], 2)
    with pytest.raises(ValueError, match=r"0\.bias is only in params_a"):
        repair_(model, a, {name: x for name, x in b.items() if name != "0.bias"}, [X])
    with pytest.raises(ValueError, match="which a generator cannot be"):
        repair_(model, a, b, (x for x in [X]))
    with pytest.raises(ValueError, match="the output of 0 has values that are not finite"):
        repair_(model, a, b, [X.new_full((3, 4), torch.inf)])
    with pytest.raises(ValueError, match="the output of 0 has seen one value"):
        repair_(model, a, b, [X[:1]])
    assert all(torch.equal(x, kept[name]) for name, x in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
