from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightlab.merge import (
    Permutation,
    PermutationSpec,
    apply_permutation,
    interpolate,
    loss_barrier,
    ste_matching,
    weight_matching,
)

SPEC = PermutationSpec({
    "0.weight": ("h1", None), "0.bias": ("h1",), "2.weight": ("h2", "h1"), "2.bias": ("h2",), "4.weight": (None, "h2"),
})  # fmt: skip


def build(seed: int, *, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 3))
    return nn.Sequential(*layers).to(dtype)


def batches(count: int = 2, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count * 20, 4, generator=generator, dtype=dtype)
    y = (x[:, 0] > 0).long() + (x[:, 1] > x[:, 2]).long()
    return list(zip(x.split(20), y.split(20), strict=True))


def fitted(seed: int) -> nn.Sequential:
    model = build(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        for x, y in batches():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def midpoint_loss(a: nn.Module, b: nn.Module, perm: Permutation) -> float:
    middle = interpolate(a.state_dict(), apply_permutation(SPEC, perm, b.state_dict()), 0.5)
    losses = [F.cross_entropy(torch.func.functional_call(a, middle, x), y) for x, y in batches()]
    return float(torch.stack(losses).mean())


def plain_search(
    a: nn.Sequential, b: nn.Sequential, steps: int, lr: float, momentum: float
) -> list[Permutation]:
    """The algorithm with a network at the midpoint and PyTorch's SGD on the free one; one batch."""
    free, middle = copy.deepcopy(b), copy.deepcopy(a)
    optimizer = torch.optim.SGD(free.parameters(), lr=lr, momentum=momentum)
    x, y = batches(1)[0]
    perm = Permutation.identity(SPEC.group_sizes(a.state_dict()))
    seen = [perm]
    for _ in range(steps):
        middle.load_state_dict(
            interpolate(a.state_dict(), apply_permutation(SPEC, perm, b.state_dict()), 0.5)
        )
        middle.zero_grad()
        F.cross_entropy(middle(x), y).backward()
        for parameter, at in zip(free.parameters(), middle.parameters(), strict=True):
            assert at.grad is not None
            parameter.grad = at.grad / 2
        optimizer.step()
        perm = weight_matching(
            free.state_dict(),
            b.state_dict(),
            SPEC,
            init=perm,
            n_restarts=1,
            generator=torch.Generator().manual_seed(0),
        )
        seen.append(perm)
    return seen


def test_against_the_algorithm_as_written():
    a, b = fitted(0), fitted(1)
    x, y = batches(1)[0]
    found = ste_matching(
        a,
        b,
        [(x, y)],
        SPEC,
        steps=12,
        lr=0.3,
        momentum=0.8,
        init=Permutation.identity(SPEC.group_sizes(a.state_dict())),
        generator=torch.Generator().manual_seed(0),
    )
    losses = []
    for perm in plain_search(a, b, 12, 0.3, 0.8):
        middle = interpolate(a.state_dict(), apply_permutation(SPEC, perm, b.state_dict()), 0.5)
        losses.append(float(F.cross_entropy(torch.func.functional_call(a, middle, x), y)))
    assert found.loss == pytest.approx(min(losses), rel=1e-12)
    assert min(losses) < losses[0]


def test_loss_is_that_of_the_average_and_no_higher_than_at_the_start():
    a, b = fitted(0), fitted(1)
    first = weight_matching(a.state_dict(), b.state_dict(), SPEC, generator=torch.Generator().manual_seed(0))
    found = ste_matching(a, b, batches(), SPEC, steps=30, lr=0.1, generator=torch.Generator().manual_seed(0))
    assert found.loss == pytest.approx(midpoint_loss(a, b, found), rel=1e-12)
    assert found.loss <= midpoint_loss(a, b, first)
    moved = apply_permutation(SPEC, found, b.state_dict())
    squares = sum((x - moved[name]).square().sum() for name, x in a.state_dict().items())
    assert found.distance**2 == pytest.approx(float(squares), rel=1e-12)
    assert loss_barrier(a, a.state_dict(), moved, batches(), [0.5]).losses[1] == pytest.approx(found.loss)


def test_a_copy_is_recognised_and_stays():
    a = fitted(0)
    hidden = Permutation.random(SPEC.group_sizes(a.state_dict()), generator=torch.Generator().manual_seed(0))
    b = copy.deepcopy(a)
    b.load_state_dict(apply_permutation(SPEC, hidden, a.state_dict()))
    found = ste_matching(a, b, batches(), SPEC, steps=4)
    assert found.compose(hidden).is_identity()
    assert found.distance == 0


def test_models_are_left_as_they_were():
    a, b = build(0), build(1)
    a.train()
    a[2].weight.requires_grad_(False)
    before = [copy.deepcopy(model.state_dict()) for model in (a, b)]
    ste_matching(a, b, batches(), SPEC, steps=2, lr=1.0)
    assert a.training
    assert all(parameter.grad is None for parameter in a.parameters())
    assert not a[2].weight.requires_grad
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(state[name], x) for name, x in model.state_dict().items())


def test_result_depends_on_the_generator_alone():
    a, b = fitted(0), fitted(1)
    runs = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        runs.append(
            ste_matching(a, b, batches(), SPEC, steps=5, lr=1.0, generator=torch.Generator().manual_seed(7))
        )
    assert runs[0].loss == runs[1].loss
    assert all(torch.equal(runs[0].indices[g], runs[1].indices[g]) for g in runs[0].indices)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.table(x)))


def test_tied_weights_and_running_statistics():
    torch.manual_seed(0)
    a, b = Tied().double(), Tied().double()
    x, y = torch.arange(7), torch.arange(7).roll(1)
    spec = PermutationSpec.from_model(a, x)
    found = ste_matching(a, b, [(x, y)], spec, steps=5, lr=1.0)
    assert found.loss > 0
    assert [len(index) for index in found.indices.values()] == [6]


def test_bfloat16():
    a, b = (build(seed, dtype=torch.bfloat16) for seed in (0, 1))
    found = ste_matching(a, b, batches(dtype=torch.bfloat16), SPEC, steps=3)
    assert found.loss > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, r"lr must be positive, got 0.0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"init": Permutation({"h3": torch.arange(2)})}, "the specification has no group 'h3'"),
        ({"loss": lambda x, y: x.sum() * torch.nan}, "the loss of the average is not finite on this data"),
    ],
)
def test_bad_options(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ste_matching(build(0), build(1), batches(), SPEC, **options)


def test_bad_data_and_models():
    with pytest.raises(ValueError, match="loader has no batches"):
        ste_matching(build(0), build(1), [], SPEC)
    with pytest.raises(ValueError, match="loader has no batches"):
        ste_matching(build(0), build(1), iter(batches()), SPEC)
    with pytest.raises(
        ValueError, match=r"0.weight has shape \(10, 4\) in params_a and \(5, 4\) in params_b"
    ):
        ste_matching(build(0), nn.Sequential(nn.Linear(4, 5)), batches(), SPEC)
