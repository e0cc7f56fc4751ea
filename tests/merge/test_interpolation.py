from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightlab.merge import Permutation, PermutationSpec, apply_permutation, interpolate, loss_barrier


def pair() -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    build = lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()  # noqa: E731
    model = build()
    return model, build().state_dict(), build().state_dict()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, generator=generator).double(), torch.randint(3, (n,), generator=generator))
        for n in (5, 2)
    ]


def test_ends_are_exact_and_the_middle_is_the_mean():
    _, a, b = pair()
    assert all(torch.equal(x, a[name]) for name, x in interpolate(a, b, 0).items())
    assert all(torch.equal(x, b[name]) for name, x in interpolate(a, b, 1).items())
    middle = interpolate(a, b, 0.5)
    assert all(torch.allclose(middle[name], (a[name] + b[name]) / 2, atol=1e-15) for name in a)
    assert list(middle) == list(a)


def test_integers_and_dtypes_are_those_of_the_first():
    a = {"n": torch.tensor(3), "w": torch.zeros(2, dtype=torch.bfloat16)}
    b = {"n": torch.tensor(7), "w": torch.ones(2)}
    out = interpolate(a, b, 0.5)
    assert out["n"].item() == 3
    assert out["w"].dtype == torch.bfloat16
    assert out["w"].tolist() == [0.5, 0.5]


def test_barrier_by_hand():
    model, a, b = pair()
    found = loss_barrier(model, a, b, batches(), 5)
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    losses = []
    for i in range(5):
        model.load_state_dict({name: a[name] + i / 4 * (b[name] - a[name]) for name in a})
        losses.append(F.cross_entropy(model(x), y).item())
    assert found.lambdas == (0, 0.25, 0.5, 0.75, 1)
    assert found.losses == pytest.approx(losses, rel=1e-12)
    excess = [loss - ((1 - i / 4) * losses[0] + i / 4 * losses[-1]) for i, loss in enumerate(losses)]
    assert found.barrier == pytest.approx(max(0, *excess), rel=1e-9, abs=1e-12)


def test_barrier_with_itself_is_zero_and_never_negative():
    model, a, _ = pair()
    assert loss_barrier(model, a, a, batches()).barrier == pytest.approx(0, abs=1e-14)
    # A convex loss of the weights lies below the chord everywhere inside.
    linear = nn.Linear(4, 3).double()
    start = linear.state_dict()
    other = {name: 3 * torch.randn_like(x) for name, x in start.items()}
    convex = loss_barrier(linear, start, other, batches(), [0.3, 0.5])
    assert convex.lambdas == (0, 0.3, 0.5, 1)
    assert convex.barrier == 0
    assert convex.at in (0, 1)


def test_a_permuted_copy_has_a_barrier_until_it_is_matched():
    model, a, _ = pair()
    a = {name: 5 * x for name, x in a.items()}
    spec = PermutationSpec.from_model(model, batches()[0][0])
    perm = Permutation({group: torch.arange(6).roll(1) for group in spec.groups})
    b = apply_permutation(spec, perm, a)
    x = batches()[0][0]
    targets = torch.func.functional_call(model, a, (x,)).argmax(1)
    assert loss_barrier(model, a, b, [(x, targets)]).barrier > 0.1
    back = apply_permutation(spec, perm.inverse(), b)
    assert loss_barrier(model, a, back, [(x, targets)]).barrier == 0


def test_all_points_see_the_same_batches_and_the_model_stays_as_it_was():
    model, a, b = pair()
    model.append(nn.Dropout(0.5)).train()
    kept = {name: x.clone() for name, x in model.state_dict().items()}

    def once() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches()

    assert loss_barrier(model, a, b, once(), 3) == loss_barrier(model, a, b, batches(), 3)
    assert model.training
    assert all(torch.equal(x, kept[name]) for name, x in model.state_dict().items())


def test_own_loss_and_nan():
    model, a, b = pair()
    x = batches()[0][0]
    target = torch.func.functional_call(model, a, (x,))
    found = loss_barrier(model, a, b, [(x, target)], 3, loss=F.mse_loss)
    assert found.losses[0] == 0
    broken = {name: torch.full_like(x, torch.nan) for name, x in b.items()}
    assert math.isnan(loss_barrier(model, a, broken, batches(), 3).barrier)


def test_bad_input():
    model, a, b = pair()
    with pytest.raises(ValueError, match="lam must be finite, got nan"):
        interpolate(a, b, math.nan)
    with pytest.raises(ValueError, match=r"0\.weight is only in params_a"):
        interpolate(a, {}, 0.5)
    with pytest.raises(ValueError, match="at least 2 points, got 1"):
        loss_barrier(model, a, b, batches(), 1)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got \[0.5, 1.5\]"):
        loss_barrier(model, a, b, batches(), [0.5, 1.5])
    with pytest.raises(ValueError, match="loader has no batches"):
        loss_barrier(model, a, b, [])
