from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightlab.merge import Permutation, PermutationSpec
from weightlab.papers import reproduce
from weightlab.papers._matched_digits import (
    BATCH,
    SPEC,
    accuracy,
    between,
    images,
    large_share,
    network,
    part,
    trained,
)
from weightlab.papers.weight_matching import CLAIMS, _cuts, _nearer, below, judge


class TestJudges:
    def test_held_needs_every_interval_above_its_bound(self):
        assert judge(((0.6, 0.8), 0.5)) == "held"
        assert judge(((0.6, 0.8), 0.5), ((1.0, 1.2), 0.9)) == "held"
        assert judge(((0.6, 0.8), 0.5), ((0.8, 1.2), 0.9)) == "inconclusive"

    def test_one_interval_below_its_bound_is_enough_for_not_held(self):
        assert judge(((0.6, 0.8), 0.5), ((0.7, 0.8), 0.9)) == "not held"
        assert judge(((0.4, 0.6), 0.5), ((0.7, 0.8), 0.9)) == "not held"

    def test_below_turns_the_condition_round(self):
        assert judge(below((0.1, 0.2), 0.35)) == "held"
        assert judge(below((0.4, 0.5), 0.35)) == "not held"
        assert judge(below((0.3, 0.5), 0.35)) == "inconclusive"


class TestProtocol:
    def test_specification_is_that_of_the_network(self):
        (params,) = trained(6, (0,), 1)
        inferred = PermutationSpec.from_model(network(params), torch.zeros(2, 64))
        names = dict(zip(inferred.groups, SPEC.groups, strict=True))
        assert {
            name: tuple(axis and names[axis] for axis in axes) for name, axes in inferred.axes.items()
        } == SPEC.axes

    def test_networks_of_a_stack_know_nothing_of_each_other(self):
        alone, among = trained(6, (5,), 1)[0], trained(6, (3, 5), 1)[1]
        for name, tensor in alone.items():
            torch.testing.assert_close(among[name], tensor, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("weight_decay", [0.0, 0.1])
    def test_training_is_that_of_a_plain_loop(self, weight_decay: float):
        generator = torch.Generator().manual_seed(4)
        layers = []
        for fan_in, fan_out in itertools.pairwise((64, 6, 6, 6, 10)):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
            for parameter in layers[-2].parameters():
                drawn = torch.rand(parameter.shape, generator=generator)
                parameter.data = (2 * drawn - 1) / fan_in**0.5
        model = nn.Sequential(*layers[:-1])
        x, y = images(test=False)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=weight_decay)
        for batch in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        (found,) = trained(6, (4,), 1, lr=0.01, weight_decay=weight_decay)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)

    def test_parts_make_the_whole(self):
        (params,) = trained(9, (0,), 1)
        large, small = part(params, large=True), part(params, large=False)
        ranks = 0
        for name, tensor in params.items():
            if tensor.ndim == 1:
                assert torch.equal(large[name], tensor)
                assert torch.equal(small[name], tensor)
                continue
            torch.testing.assert_close(large[name] + small[name], tensor, rtol=0, atol=1e-6)
            assert abs(float((large[name] * small[name]).sum())) < 1e-5
            ranks += int(torch.linalg.matrix_rank(large[name], rtol=1e-4))
        assert large_share(params) == pytest.approx(ranks / 36)

    def test_a_network_is_connected_with_itself(self):
        (params,) = trained(6, (0,), 1)
        hidden = Permutation.random(SPEC.group_sizes(params), generator=torch.Generator().manual_seed(0))
        found = between(params, params)
        assert (found.barrier, found.distance) == (pytest.approx(0, abs=1e-6), 0)
        assert (found.large, found.all) == (pytest.approx(1), pytest.approx(1))
        away = between(params, params, hidden)
        assert away.line[0] == pytest.approx(away.line[-1])
        assert away.distance > 0
        back = between(params, params, hidden.compose(hidden.inverse()))
        assert _cuts([away], [back]) == [pytest.approx(1, abs=1e-3)]
        assert _nearer([away], [back]) == [1]

    def test_networks_learn(self):
        (params,) = trained(64, (0,), 8)
        assert accuracy(params) > 0.8


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("smoke")
    (outcome,) = reproduce.reproduce(["weight-matching"], "smoke", folder / "record", work=folder / "work")
    assert outcome["failed"] == []
    return {claim["name"]: claim for claim in outcome["claims"]}


def test_every_claim_comes_with_a_figure_and_a_table(smoke: dict[str, Any]):
    assert list(smoke) == [claim.name for claim in CLAIMS]
    for claim in smoke.values():
        assert claim["figure"]["series"]
        assert claim["table"]
        low, high = claim["interval"]
        assert low <= claim["value"] <= high


def test_matching_brings_networks_nearer_and_chance_does_not(smoke: dict[str, Any]):
    rows = {row["permutation"]: row for row in smoke["barrier-not-distance"]["table"]}
    assert rows["none"]["distance gone"] == 0
    assert rows["matched weights"]["distance gone"] > 0.1
    assert rows["random"]["distance gone"] < 0.05


def test_search_from_a_starts_where_weights_match(smoke: dict[str, Any]):
    rows = {row["permutation"]: row for row in smoke["straight-through"]["table"]}
    assert rows["straight through"]["distance gone"] > 0.9 * rows["matched weights"]["distance gone"]
