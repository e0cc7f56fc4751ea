from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from weightlab.merge import (
    ManyMerge,
    Permutation,
    PermutationSpec,
    apply_permutation,
    merge_many,
    weight_matching,
)


def build(seed: int, hidden: tuple[int, ...] = (12,)) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise((5, *hidden, 3)):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def spec_of(model: nn.Module) -> PermutationSpec:
    return PermutationSpec.from_model(model, torch.randn(2, 5).double())


def relabelled(spec: PermutationSpec, state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return apply_permutation(spec, Permutation.random(spec.group_sizes(state), generator=generator), state)


def moved(
    found: ManyMerge, spec: PermutationSpec, states: list[dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    return [apply_permutation(spec, p, s) for p, s in zip(found.permutations, states, strict=True)]


def pair_sum(states: list[dict[str, Tensor]]) -> float:
    return sum(float((a[name] * b[name]).sum()) for a, b in itertools.combinations(states, 2) for name in a)


@pytest.mark.parametrize("scheme", ["mean", "star"])
def test_relabelled_copies_merge_to_the_original(scheme: str):
    model = build(0)
    spec, state = spec_of(model), model.state_dict()
    copies = [relabelled(spec, state, seed) for seed in range(3)]
    for reference in (0, 2):
        found = merge_many([state, *copies], spec, scheme=scheme, reference=reference)
        original = [state, *copies][reference]
        assert all(torch.equal(x, original[name]) for name, x in found.params.items())
        assert found.distance == 0
        assert found.permutations[reference].is_identity()


@pytest.mark.parametrize("scheme", ["mean", "star"])
def test_labels_of_the_others_do_not_matter(scheme: str):
    # One hidden layer: every assignment is solved exactly.
    states = [build(seed).state_dict() for seed in range(4)]
    spec = spec_of(build(0))
    first = merge_many(states, spec, scheme=scheme, generator=torch.Generator().manual_seed(0))
    other = [states[0], *(relabelled(spec, state, seed) for seed, state in enumerate(states[1:]))]
    second = merge_many(other, spec, scheme=scheme, generator=torch.Generator().manual_seed(0))
    assert all(torch.allclose(x, second.params[name], atol=1e-14) for name, x in first.params.items())
    assert first.objective == pytest.approx(second.objective, rel=1e-12)


@pytest.mark.parametrize("scheme", ["mean", "star"])
def test_what_is_reported_is_what_the_permutations_give(scheme: str):
    states = [build(seed, (7, 9)).state_dict() for seed in range(3)]
    spec = spec_of(build(0, (7, 9)))
    found = merge_many(states, spec, scheme=scheme, weights=[1, 2, 1])
    aligned = moved(found, spec, states)
    for name, x in found.params.items():
        assert torch.allclose(x, (aligned[0][name] + 2 * aligned[1][name] + aligned[2][name]) / 4, atol=1e-14)
    assert found.objective == pytest.approx(pair_sum(aligned), rel=1e-10)
    squares = sum(
        float((state[name] - sum(s[name] for s in aligned) / 3).square().sum())
        for state in aligned
        for name in state
    )
    assert found.distance == pytest.approx((squares / 3) ** 0.5, rel=1e-10)
    assert all(torch.equal(aligned[0][name], x) for name, x in states[0].items())


def test_mean_goes_on_where_the_star_ends_and_stops_at_a_fixed_point():
    states = [build(seed).state_dict() for seed in range(4)]
    spec = spec_of(build(0))
    star = merge_many(states, spec, scheme="star")
    mean = merge_many(states, spec)
    assert star.rounds == 1
    assert mean.objective > star.objective > pair_sum(states)
    # Nobody gains by being matched to the mean of the others again.
    aligned = moved(mean, spec, states)
    for i, state in enumerate(aligned):
        others = [s for j, s in enumerate(aligned) if j != i]
        target = {name: sum(s[name] for s in others) / 3 for name in state}
        assert weight_matching(target, state, spec).is_identity()


def test_permuted_models_are_the_same_functions():
    models = [build(seed, (7, 9)) for seed in range(3)]
    spec = spec_of(models[0])
    found = merge_many(models, spec)
    x = torch.randn(6, 5).double()
    for model, p in zip(models, found.permutations, strict=True):
        state = apply_permutation(spec, p, model.state_dict())
        assert torch.allclose(torch.func.functional_call(model, state, (x,)), model(x), atol=1e-12)


def test_two_models_are_a_matching_and_an_average():
    a, b = build(0).state_dict(), build(1).state_dict()
    spec = spec_of(build(0))
    found = merge_many([a, b], spec)
    match = weight_matching(a, b, spec)
    assert all(torch.equal(index, match.indices[g]) for g, index in found.permutations[1].indices.items())
    assert found.objective == pytest.approx(match.objective)
    assert found.distance == pytest.approx(match.distance / 2)


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))


def test_tied_and_half_precision_tensors_and_integers():
    models = [Tied(seed).bfloat16() for seed in range(3)]
    spec = PermutationSpec.from_model(models[0], torch.tensor([[1, 2, 3]]))
    assert spec.groups
    found = merge_many(models, spec)
    # One tensor, counted once, and the two names agree.
    aligned = [{"w": s["head.weight"].double()} for s in moved(found, spec, [m.state_dict() for m in models])]
    assert found.objective == pytest.approx(pair_sum(aligned), rel=1e-6)
    assert torch.equal(found.params["head.weight"], found.params["embedding.weight"])
    assert found.params["head.weight"].dtype == torch.bfloat16
    norm = [{"n": torch.tensor(i), "w": torch.ones(2) * i} for i in range(3)]
    assert merge_many(norm, PermutationSpec({"w": ("h",)})).params["n"].item() == 0


def test_same_generator_same_result():
    states = [build(seed, (7, 9, 8)).state_dict() for seed in range(3)]
    spec = spec_of(build(0, (7, 9, 8)))
    first, second = (merge_many(states, spec, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(x, second.params[name]) for name, x in first.params.items())


def test_bad_input():
    states = [build(seed).state_dict() for seed in range(2)]
    spec = spec_of(build(0))
    with pytest.raises(ValueError, match="two models or more, got 1"):
        merge_many(states[:1], spec)
    with pytest.raises(ValueError, match="number of a model, 0 to 1, got 2"):
        merge_many(states, spec, reference=2)
    with pytest.raises(ValueError, match="'mean' or 'star', got 'ring'"):
        merge_many(states, spec, scheme="ring")
    with pytest.raises(ValueError, match="max_rounds must be at least 1"):
        merge_many(states, spec, max_rounds=0)
    with pytest.raises(ValueError, match="3 weights for 2 models"):
        merge_many(states, spec, weights=[1, 1, 1])
    with pytest.raises(ValueError, match=r"0\.weight has shape"):
        merge_many([states[0], build(0, (13,)).state_dict()], spec)
