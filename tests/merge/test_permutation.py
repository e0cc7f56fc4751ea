from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from weightlab.merge import Permutation, PermutationSpec, apply_permutation, check_equivalence

SPEC = PermutationSpec({"0.weight": ("h", None), "0.bias": ("h",), "2.weight": (None, "h")})


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


permutations = st.permutations(range(6)).map(lambda p: Permutation({"h": torch.tensor(p)}))


@given(permutations, permutations)
def test_composition_and_inverse_act_as_they_should(p: Permutation, q: Permutation):
    spec = PermutationSpec({"x": (None, (2, "h", 3))})
    x = {"x": torch.arange(2.0 * 36).view(2, 36)}
    one_by_one = apply_permutation(spec, p, apply_permutation(spec, q, x))
    assert torch.equal(apply_permutation(spec, p.compose(q), x)["x"], one_by_one["x"])
    back = apply_permutation(spec, p.inverse(), apply_permutation(spec, p, x))
    assert torch.equal(back["x"], x["x"])
    assert p.compose(p.inverse()).is_identity()


def test_row_of_the_result_is_the_row_that_the_index_names():
    x = torch.randn(4, 3)
    index = torch.tensor([2, 0, 3, 1])
    out = apply_permutation(PermutationSpec({"x": ("h", None)}), Permutation({"h": index}), {"x": x})
    assert torch.equal(out["x"], x[index])


def test_blocks_and_repeats():
    spec = PermutationSpec({"x": ((2, "h", 2),)})
    out = apply_permutation(spec, Permutation({"h": torch.tensor([1, 0])}), {"x": torch.arange(8)})
    assert out["x"].tolist() == [2, 3, 0, 1, 6, 7, 4, 5]


def test_result_keeps_order_dtype_and_what_is_not_moved():
    state = {"free": torch.ones(2), "x": torch.randn(3, 4).T.to(torch.bfloat16), "n": torch.tensor(3)}
    spec = PermutationSpec({"x": (None, "h"), "n": ()})
    kept = state["x"].clone()
    out = apply_permutation(spec, Permutation({"h": torch.tensor([2, 1, 0])}), state)
    assert list(out) == list(state)
    assert out["free"] is state["free"]
    assert out["x"].dtype == torch.bfloat16
    assert torch.equal(out["x"], kept.flip(1))
    assert torch.equal(state["x"], kept)


def test_group_of_one_unit():
    out = apply_permutation(SPEC_ONE, Permutation({"h": torch.tensor([0])}), {"x": torch.ones(1, 2)})
    assert torch.equal(out["x"], torch.ones(1, 2))


SPEC_ONE = PermutationSpec({"x": ("h", None)})


def test_wrong_specification_is_caught_by_the_check():
    wrong = PermutationSpec({"0.weight": ("h", None), "2.weight": (None, "h")})
    perm = Permutation({"h": torch.arange(8).roll(1)})
    model, x = mlp(), torch.randn(5, 3)
    with pytest.raises(ValueError, match="the specification ties too little"):
        check_equivalence(model, perm, x, spec=wrong)
    assert check_equivalence(model, perm, x, spec=SPEC) < 1e-6


def test_check_refuses_outputs_that_are_not_finite():
    with pytest.raises(ValueError, match="not finite on this batch"):
        check_equivalence(mlp(), Permutation({}), torch.full((1, 3), torch.nan), spec=SPEC)


def test_bad_permutations():
    with pytest.raises(ValueError, match=r"indices of group 'h' are no permutation: \[0, 0\]"):
        Permutation({"h": torch.tensor([0, 0])})
    with pytest.raises(ValueError, match="no group 'g'; it has"):
        apply_permutation(SPEC, Permutation({"g": torch.arange(8)}), mlp().state_dict())
    with pytest.raises(ValueError, match="group 'h' has 8 units, its permutation 7"):
        apply_permutation(SPEC, Permutation({"h": torch.arange(7)}), mlp().state_dict())
    with pytest.raises(ValueError, match="different groups cannot be composed"):
        Permutation({"g": torch.arange(2)}).compose(Permutation({"h": torch.arange(2)}))


def test_random_permutations_follow_the_generator():
    draws = [
        Permutation.random({"h": 20}, generator=torch.Generator().manual_seed(1)).indices["h"]
        for _ in range(2)
    ]
    assert torch.equal(*draws)
