from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from weightlab.linalg import linear_assignment
from weightlab.merge import Permutation, PermutationSpec, apply_permutation, weight_matching


def mlp_spec(layers: int) -> PermutationSpec:
    """Tensors w1, b1, ... of a net of `layers` weight matrices with hidden groups h1, h2, ..."""
    groups = [None, *(f"h{i}" for i in range(1, layers)), None]
    axes: dict[str, tuple] = {}
    for i, (inner, outer) in enumerate(itertools.pairwise(groups), start=1):
        axes[f"w{i}"], axes[f"b{i}"] = (outer, inner), (outer,)
    return PermutationSpec(axes)


def mlp_params(*widths: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for i, (inner, outer) in enumerate(itertools.pairwise(widths), start=1):
        params[f"w{i}"] = torch.randn(outer, inner, generator=generator, dtype=dtype)
        params[f"b{i}"] = torch.randn(outer, generator=generator, dtype=dtype)
    return params


def squared_distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(sum((a[name].double() - b[name].double()).square().sum() for name in a))


@pytest.mark.parametrize("seed", range(5))
def test_one_hidden_layer_is_solved_exactly(seed: int):
    spec, a, b = mlp_spec(2), mlp_params(3, 5, 2, seed=seed), mlp_params(3, 5, 2, seed=seed + 100)
    found = weight_matching(a, b, spec)
    best = min(
        squared_distance(a, apply_permutation(spec, Permutation({"h1": torch.tensor(p)}), b))
        for p in itertools.permutations(range(5))
    )
    assert found.distance**2 == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_known_permutation_of_three_layers_is_found_with_restarts(seed: int):
    spec, a = mlp_spec(4), mlp_params(8, 24, 20, 16, 4, seed=seed)
    hidden = Permutation.random(spec.group_sizes(a), generator=torch.Generator().manual_seed(seed))
    b = apply_permutation(spec, hidden, a)
    found = weight_matching(a, b, spec, n_restarts=20, generator=torch.Generator().manual_seed(seed))
    assert found.distance == 0
    assert found.compose(hidden).is_identity()


def test_equal_networks_give_the_identity():
    spec, a = mlp_spec(4), mlp_params(4, 6, 6, 5, 3)
    found = weight_matching(a, a, spec)
    assert found.is_identity()
    assert found.distance == 0
    assert found.sweeps == 1
    assert found.objective == pytest.approx(sum(float(x.square().sum()) for x in a.values()))


def plain_descent(
    a: dict[str, Tensor], b: dict[str, Tensor], spec: PermutationSpec, generator: torch.Generator
) -> tuple[dict[str, Tensor], list[float]]:
    """The algorithm as it is written: everything anew at every visit."""
    groups = list(spec.groups)
    indices = dict(Permutation.identity(spec.group_sizes(a)).indices)
    distances = [squared_distance(a, b)]
    for _ in range(100):
        progress = False
        for i in torch.randperm(len(groups), generator=generator).tolist():
            others = Permutation({g: index for g, index in indices.items() if g != groups[i]})
            moved = apply_permutation(spec, others, b)
            similarity = torch.zeros(len(indices[groups[i]]), len(indices[groups[i]]), dtype=torch.float64)
            for name, axes in spec.axes.items():
                if groups[i] in axes:
                    x, y = (
                        p[name].movedim(axes.index(groups[i]), 0).flatten(1)
                        if p[name].ndim > 1
                        else p[name][:, None]
                        for p in (a, moved)
                    )
                    similarity += x @ y.T
            new = linear_assignment(similarity).columns
            gain = (
                similarity.gather(1, new[:, None]).sum()
                - similarity.gather(1, indices[groups[i]][:, None]).sum()
            )
            if gain > 1e-12:
                indices[groups[i]], progress = new, True
            distances.append(squared_distance(a, apply_permutation(spec, Permutation(indices), b)))
        if not progress:
            break
    return indices, distances


@pytest.mark.parametrize("seed", range(4))
def test_shortcuts_leave_the_result_what_it_is(seed: int):
    widths = (5, 19, 18, 17, 3)  # wide enough that some visits move a part of the units
    spec, a, b = mlp_spec(4), mlp_params(*widths, seed=seed), mlp_params(*widths, seed=seed + 50)
    found = weight_matching(
        a,
        b,
        spec,
        n_restarts=1,
        init=Permutation.identity(spec.group_sizes(a)),
        generator=torch.Generator().manual_seed(seed),
    )
    indices, distances = plain_descent(a, b, spec, torch.Generator().manual_seed(seed))
    assert all(torch.equal(found.indices[g], indices[g]) for g in indices)
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(distances))
    moved = apply_permutation(spec, found, b)
    assert found.distance**2 == pytest.approx(squared_distance(a, moved), rel=1e-12)


@pytest.mark.parametrize("init", [None, Permutation({})])
def test_more_sweeps_are_never_worse(init: Permutation | None):
    spec, a, b = mlp_spec(4), mlp_params(5, 9, 8, 7, 3), mlp_params(5, 9, 8, 7, 3, seed=1)
    by_sweeps = [
        weight_matching(
            a, b, spec, n_restarts=1, max_sweeps=n, init=init, generator=torch.Generator().manual_seed(0)
        ).objective
        for n in (1, 2, 100)
    ]
    assert by_sweeps == sorted(by_sweeps)
    assert by_sweeps[0] > sum(float((a[n] * b[n]).sum()) for n in a)


@pytest.mark.parametrize("seed", range(4))
def test_result_is_where_no_group_can_gain(seed: int):
    widths = (5, 19, 18, 17, 3)
    spec, a, b = mlp_spec(4), mlp_params(*widths, seed=seed), mlp_params(*widths, seed=seed + 50)
    found = weight_matching(a, b, spec, generator=torch.Generator().manual_seed(seed))
    again = weight_matching(a, b, spec, init=found, n_restarts=1)
    assert (again.objective, again.sweeps) == (found.objective, 1)


def test_start_grown_from_the_ends_is_better_than_the_identity():
    widths, seeds = (6, 30, 30, 30, 4), range(12)
    spec = mlp_spec(4)
    grown, identity = (
        [
            weight_matching(
                mlp_params(*widths, seed=seed),
                mlp_params(*widths, seed=seed + 50),
                spec,
                n_restarts=1,
                init=init,
                generator=torch.Generator().manual_seed(seed),
            ).objective
            for seed in seeds
        ]
        for init in (None, Permutation({}))
    )
    assert sum(grown) > sum(identity)


def test_grown_start_solves_an_exact_copy_at_once():
    spec, a = mlp_spec(6), mlp_params(8, 24, 20, 30, 16, 25, 4)
    hidden = Permutation.random(spec.group_sizes(a), generator=torch.Generator().manual_seed(0))
    found = weight_matching(a, apply_permutation(spec, hidden, a), spec, n_restarts=1)
    assert (found.distance, found.sweeps) == (0, 1)


def test_never_farther_than_without_permutation():
    spec, a, b = mlp_spec(3), mlp_params(5, 20, 20, 5), mlp_params(5, 20, 20, 5, seed=1)
    # What is fixed says nothing, and leads away from the layer that is the same in both.
    a["w2"] *= 100
    b["w2"] = a["w2"].clone()
    found = weight_matching(a, b, spec, generator=torch.Generator().manual_seed(0))
    assert found.is_identity()
    assert found.distance**2 == pytest.approx(squared_distance(a, b))


def test_start_is_kept_when_it_is_the_best():
    spec, a = mlp_spec(4), mlp_params(8, 24, 20, 16, 4)
    hidden = Permutation.random(spec.group_sizes(a), generator=torch.Generator().manual_seed(0))
    found = weight_matching(a, apply_permutation(spec, hidden, a), spec, init=hidden.inverse(), n_restarts=1)
    assert (found.distance, found.sweeps) == (0, 1)


def test_result_does_not_depend_on_the_order_of_names():
    spec, a, b = mlp_spec(4), mlp_params(5, 9, 8, 7, 3), mlp_params(5, 9, 8, 7, 3, seed=1)
    turned = PermutationSpec(dict(reversed(spec.axes.items())))
    first = weight_matching(a, b, spec, generator=torch.Generator().manual_seed(3))
    second = weight_matching(dict(reversed(a.items())), b, turned, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(first.indices[g], second.indices[g]) for g in first.indices)


def test_network_with_norms_convolutions_and_blocks_is_recovered():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Flatten(),
        nn.Linear(96, 5),
    )
    spec = PermutationSpec.from_model(model, torch.randn(2, 1, 8, 8))
    a = model.state_dict()
    a["1.running_mean"] = torch.arange(6.0)
    hidden = Permutation.random(spec.group_sizes(a))
    b = apply_permutation(spec, hidden, a)
    found = weight_matching(a, b, spec)
    assert found.distance == 0
    assert torch.equal(apply_permutation(spec, found, b)["1.running_mean"], a["1.running_mean"])


def test_ties_and_groups_of_one_end():
    spec = mlp_spec(4)
    ones = {name: torch.ones_like(x) for name, x in mlp_params(3, 4, 1, 4, 2).items()}
    found = weight_matching(ones, ones, spec)
    assert found.sweeps == 1
    assert found.is_identity()


def test_mixed_dtypes_and_strides():
    spec, a = mlp_spec(3), mlp_params(4, 6, 5, 3, dtype=torch.bfloat16)
    hidden = Permutation.random(spec.group_sizes(a))
    b = {name: x.double() for name, x in apply_permutation(spec, hidden, a).items()}
    b["w2"] = b["w2"].T.contiguous().T
    found = weight_matching(a, b, spec, n_restarts=10)
    assert found.compose(hidden).is_identity()


def test_tied_weights_count_once():
    spec, a, b = mlp_spec(2), mlp_params(3, 5, 2), mlp_params(3, 5, 2, seed=1)
    alone = weight_matching(a, b, spec)
    both = PermutationSpec({**spec.axes, "tied": spec.axes["w1"]})
    tied = weight_matching({**a, "tied": a["w1"]}, {**b, "tied": b["w1"]}, both)
    assert (tied.objective, tied.distance) == (alone.objective, alone.distance)
    copied = weight_matching({**a, "tied": a["w1"]}, {**b, "tied": b["w1"].clone()}, both)
    assert copied.distance > alone.distance


def test_bad_input():
    spec, a = mlp_spec(2), mlp_params(3, 4, 2)
    with pytest.raises(ValueError, match=r"w1 has shape \(4, 3\) in params_a and \(4, 2\) in params_b"):
        weight_matching(a, {**a, "w1": torch.zeros(4, 2)}, spec)
    with pytest.raises(ValueError, match="w3 is only in params_b"):
        weight_matching(a, {**a, "w3": torch.zeros(2)}, spec)
    with pytest.raises(ValueError, match="b1 of params_b has entries that are not finite"):
        weight_matching(a, {**a, "b1": torch.full((4,), torch.inf)}, spec)
    with pytest.raises(ValueError, match="n_restarts must be at least 1, got 0"):
        weight_matching(a, a, spec, n_restarts=0)
    with pytest.raises(ValueError, match="group 'h1' has 4 units, its permutation 3"):
        weight_matching(a, a, spec, init=Permutation({"h1": torch.arange(3)}))
