from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from weightlab.optim import ROOT
from weightlab.papers import reproduce
from weightlab.papers.root import (
    CLAIMS,
    FITTED,
    MUON,
    PUBLISHED,
    add_outliers,
    judge_loss,
    judge_precision,
    judge_robustness,
)


class TestJudges:
    """Each verdict, on numbers made to deserve it."""

    def test_precision_must_hold_in_every_cell(self):
        good = {MUON: [0.2, 0.22, 0.21], FITTED: [0.1, 0.11, 0.1]}
        bad = {MUON: [0.2, 0.22, 0.21], FITTED: [0.4, 0.41, 0.4]}
        unsure = {MUON: [0.2, 0.22, 0.21], FITTED: [0.1, 0.9, 0.2]}
        verdict, table = judge_precision({("a", "1"): good, ("a", "4"): good}, FITTED)
        assert verdict == "held"
        assert table[0]["over Muon"] == pytest.approx((0.1 * 0.11 * 0.1 / (0.2 * 0.22 * 0.21)) ** (1 / 3))
        assert judge_precision({("a", "1"): good, ("a", "4"): bad}, FITTED)[0] == "not held"
        assert judge_precision({("a", "1"): good, ("a", "4"): unsure}, FITTED)[0] == "inconclusive"

    def test_robustness(self):
        muon = [1.0, 1.1, 0.9]
        better, worse = [0.5, 0.6, 0.4], [1.0, 1.11, 0.89]
        verdict, compared = judge_robustness({"muon-ns": muon, "root-no-fit": worse, "root": better})
        assert verdict == "held"
        assert compared["root"]["over Muon"] == pytest.approx(math.exp(-0.5))
        assert judge_robustness({"muon-ns": muon, "root-no-fit": better, "root": worse})[0] == "not held"
        assert judge_robustness({"muon-ns": muon, "root": [0.0, 2.0, 1.0]})[0] == "inconclusive"

    def test_loss_must_be_lower_on_every_task(self):
        lower, level, unsure = (2.0, -0.2, -0.3, -0.1), (2.0, 0.0, -0.01, 0.01), (2.0, 0.0, -0.1, 0.1)
        assert judge_loss([lower, lower]) == "held"
        assert judge_loss([lower, level]) == "not held"
        assert judge_loss([lower, unsure]) == "inconclusive"


def test_outliers_strike_the_matrices_at_the_stated_rate_and_alike_for_equal_seeds():
    def corrupted():
        torch.manual_seed(3)
        layer = torch.nn.Linear(300, 200)
        optimizer = add_outliers(ROOT(layer.named_parameters()))
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return layer.weight.grad.clone(), layer.bias.grad.clone()

    weight, bias = corrupted()
    assert torch.equal(bias, torch.ones_like(bias))
    assert set(weight.unique().tolist()) == {1.0, 100.0}
    assert (weight == 100).double().mean().item() == pytest.approx(1e-3, rel=0.5)
    assert torch.equal(weight, corrupted()[0])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("smoke")
    (outcome,) = reproduce.reproduce(["root"], "smoke", folder / "record", work=folder / "work")
    assert outcome["failed"] == []
    text = (folder / "record" / "root.json").read_text()
    recorded = json.loads(text)["scales"]["smoke"]["claims"]
    assert [claim["name"] for claim in recorded] == [claim.name for claim in CLAIMS]
    return {claim["name"]: claim for claim in recorded}


class TestSmoke:
    def test_fits_are_precise_on_what_they_are_fitted_to(self, smoke: dict[str, Any]):
        table = smoke["fitted-precision"]["table"]
        gaussian = [row for row in table if row["spectrum"] == "Gaussian"]
        assert [row["aspect ratio"] for row in gaussian] == ["1", "1.5", "4", "8"]
        for row in gaussian:
            assert row[FITTED] < row[PUBLISHED] < row[MUON]
        assert {row["aspect ratio"] for row in table if row["spectrum"] == "harvested"} == {"1", "3", "4"}

    def test_both_precision_claims_judge_the_same_measurements(self, smoke: dict[str, Any]):
        fitted, published = (smoke[name]["table"] for name in ("fitted-precision", "published-precision"))
        for row, other in zip(fitted, published, strict=True):
            assert row[FITTED] == other[FITTED]
            assert other["low"] <= other["over Muon"] <= other["high"]
        assert smoke["published-precision"]["value"] == max(row["over Muon"] for row in published)

    def test_clipping_shields_from_outliers(self, smoke: dict[str, Any]):
        rows = {row["arm"]: row for row in smoke["outlier-robustness"]["table"]}
        assert list(rows) == ["muon-ns", "root-no-fit", "root"]
        assert rows["root"]["ratio"] < rows["muon-ns"]["ratio"]

    def test_losses_are_compared_on_both_tasks(self, smoke: dict[str, Any]):
        rows = smoke["lower-loss"]["table"]
        everything = ["muon-ns", "root", "root-no-clip", "root-no-fit"]
        assert [row["arm"] for row in rows] == [*everything, *everything[:2]]
        for row in rows:
            assert row["low"] <= row["ratio to Muon"] <= row["high"]

    def test_figures_can_be_drawn(self, smoke: dict[str, Any]):
        for claim in smoke.values():
            assert claim["figure"]["series"]
