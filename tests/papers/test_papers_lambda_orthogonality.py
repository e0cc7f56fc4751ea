import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightlab.linalg import orthogonality_deviation
from weightlab.merge import retrieval_report
from weightlab.merge.trained_maps import Maps
from weightlab.papers import _compatible_digits as digits
from weightlab.papers import reproduce
from weightlab.papers.lambda_orthogonality import (
    CLAIMS,
    DROP,
    GAIN,
    GRAM,
    SIZES,
    WITHIN,
    Estimate,
    Study,
    judge_below,
    judge_gain,
)


class TestJudging:
    @pytest.mark.parametrize(
        ("bounds", "verdict"),
        [
            ([(-1, 0.4), (0.1, 0.49)], "held"),
            ([(-1, 0.4), (0.1, 0.6)], "inconclusive"),
            ([(-1, 0.4), (0.51, 0.6)], "not held"),
        ],
    )
    def test_all_below(self, bounds, verdict):
        assert judge_below([Estimate((a + b) / 2, a, b) for a, b in bounds], 0.5) == verdict

    @pytest.mark.parametrize(
        ("low", "high", "verdict"),
        [(0.001, 0.002, "held"), (-0.001, 0.02, "inconclusive"), (-0.01, 0.004, "not held")],
    )
    def test_gain(self, low, high, verdict):
        assert judge_gain(Estimate((low + high) / 2, low, high)) == verdict

    def test_differences_are_paired(self):
        found = Study({"t": {"a": {"self": [0.5, 0.9]}, "b": {"self": [0.4, 0.8]}}}, {"t": {}}, 1.0)
        difference = found.difference("t", ("a", "self"), ("b", "self"))
        assert difference == pytest.approx((0.1, 0.1, 0.1))
        assert difference.points() == "+10.00 points (+10.00 to +10.00)"

    def test_thresholds_are_as_said(self):
        assert (DROP, GAIN, GRAM, WITHIN) == (0.005, 0.005, 0.1, 0.1)
        said = {claim.name: claim.threshold for claim in CLAIMS}
        assert "below 0.5 points" in said["preservation"]
        assert "below -0.5 points" in said["affine-loses"]
        assert "above 0;" in said["adaptation"]
        assert "above 0.1" in said["bias"]
        assert "0.9 and 1.1" in said["tolerance"]
        assert SIZES["cpu"].seeds >= 10


class TestEncoders:
    def test_parts_share_nothing_and_have_all_classes(self):
        parts = digits.parts()
        assert sum(len(part.labels) for part in parts.values()) == 1797
        rows = {name: {tuple(row) for row in part.pixels.tolist()} for name, part in parts.items()}
        assert not rows["gallery"] & rows["test"]
        assert not rows["gallery"] & rows["tuning"]
        assert all(len(part.labels.unique()) == 10 for part in parts.values())

    def test_seeds_train_as_they_would_alone(self):
        part = digits.parts()["gallery"]
        arguments = {"classes": 4, "hidden": (16,), "steps": 5, "weight_decay": 0.1}
        both = digits.encoders(part, seeds=[3, 4], **arguments)(part.pixels[:20])
        alone = digits.encoders(part, seeds=[4], **arguments)(part.pixels[:20])
        torch.testing.assert_close(both[1], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both.norm(dim=-1), torch.ones(2, 20))

    def test_training_is_pytorchs(self):
        part = digits.parts()["gallery"]
        encode = digits.encoders(part, classes=10, hidden=(8,), seeds=[0], steps=1, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        sizes = [64, 8, digits.DIMENSIONS, 10]
        layers = []
        for inner, outer in itertools.pairwise(sizes):
            layer = nn.Linear(inner, outer)
            bound = inner**-0.5
            with torch.no_grad():
                layer.weight.copy_(torch.empty(inner, outer).uniform_(-bound, bound, generator=generator).T)
                layer.bias.copy_(torch.empty(1, outer).uniform_(-bound, bound, generator=generator)[0])
            layers += [layer, nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
        rows = torch.randint(len(part.labels), (128,), generator=generator)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        F.cross_entropy(model(part.pixels[rows]), part.labels[rows]).backward()
        optimizer.step()
        expected = F.normalize(model[:-2](part.pixels[:5]).detach(), dim=1)
        torch.testing.assert_close(encode(part.pixels[:5])[0], expected, rtol=1e-4, atol=1e-5)


class TestMaps:
    def pairs(self):
        return digits.pairs(digits.Target(4, 0.01), [0, 1], steps=20)

    def test_measures_are_those_of_retrieval(self):
        data = self.pairs()
        W = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))
        found = digits.measure(Maps(W), data, "test", 4)
        y, items = data.labels["test"], data.labels["gallery"]
        for i in range(2):
            query, gallery = data.new["test"][i] @ W[i].T, data.new["gallery"][i] @ W[i].T
            old = data.old["gallery"][i]
            assert found["cross"][i] == pytest.approx(retrieval_report(query, old, y, items).cmc[1])
            own = retrieval_report(query, gallery, y, items)
            assert found["self"][i] == pytest.approx(own.cmc[1])
            late = retrieval_report(query[y >= 4], gallery, y[y >= 4], items)
            assert found["unseen"][i] == pytest.approx(late.cmc[1])
            assert found["deviation"][i] == pytest.approx(float(orthogonality_deviation(W[i])))

    def test_no_map_changes_nothing(self):
        found = digits.measure(None, self.pairs(), "test", 4)
        assert found["gram"] == [0.0, 0.0]
        assert found["deviation"] == [0.0, 0.0]

    def test_arms_are_what_they_say(self):
        data = self.pairs()

        def ends(arm):
            maps = digits.fit(arm, data, lr=0.01, steps=8, generator=torch.Generator().manual_seed(0))
            return maps, digits.measure(maps, data, "tuning", 4)

        rotation, found = ends(digits.Arm(0.0))
        assert max(found["gram"]) < 1e-5
        assert rotation.b is None
        shifted, found = ends(digits.Arm(0.0, bias=True))
        assert max(found["deviation"]) < 1e-5
        assert min(found["gram"]) > 1e-3
        assert shifted.b is not None
        _, found = ends(digits.Arm(0.1))
        assert max(found["deviation"]) <= 0.1 + 1e-5
        _, found = ends(digits.Arm())
        assert min(found["deviation"]) > 0.1

    def test_repeated_pairs_are_blocks(self):
        data = self.pairs()
        twice = digits.repeated(data, 2)
        assert torch.equal(twice.new["test"], torch.cat([data.new["test"]] * 2))

    def test_the_hinge_arrives_at_its_tolerance(self):
        (end,) = digits.arrived("hinge2", 100.0, 1, 400)
        assert end == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("name", [claim.name for claim in CLAIMS])
def test_claims_come_to_a_verdict(name, tmp_path):
    (claim,) = (claim for claim in CLAIMS if claim.name == name)
    result = claim.run(reproduce.ClaimContext(scale="smoke", out=tmp_path, store=tmp_path / "store"))
    assert result.verdict in ("held", "not held", "inconclusive")
    assert result.interval is not None
    low, high = result.interval
    assert low <= result.value <= high
    assert all(math.isfinite(x) for x in (low, high))
    json.dumps(result.to_dict(), allow_nan=False, default=list)
    assert result.figure is not None
    assert result.table
