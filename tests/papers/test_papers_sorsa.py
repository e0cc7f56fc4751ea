from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from weightlab.adapters import SorsaConfig
from weightlab.papers import reproduce
from weightlab.papers._sorsa_task import factor_metrics, log_condition
from weightlab.papers.sorsa import CLAIMS, GAMMA, SIZES, judge


class TestJudge:
    def test_all_parts_must_hold(self):
        assert judge([True, True], [False, False]) == "held"
        assert judge([True, False], [False, False]) == "inconclusive"

    def test_one_refuted_part_refutes(self):
        assert judge([True, False], [False, True]) == "not held"


class TestFactors:
    def test_condition_is_that_of_the_product(self):
        generator = torch.Generator().manual_seed(0)
        left = torch.randn(9, 3, generator=generator, dtype=torch.float64)
        right = torch.randn(3, 7, generator=generator, dtype=torch.float64)
        values = torch.linalg.svdvals(left @ right)
        expected = (values[0] / values[2]).log10().float()
        torch.testing.assert_close(log_condition(left, right), expected)

    def test_a_lost_rank_is_finite(self):
        assert log_condition(torch.ones(4, 2), torch.ones(2, 5)) == pytest.approx(12)

    def test_means_over_layers_of_a_start(self):
        from peft import get_peft_model

        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
        conditions = []
        for layer in base:
            values = torch.linalg.svdvals(layer.weight.detach())[:2]
            conditions.append(float((values[0] / values[1]).log10()))
        model = get_peft_model(base, SorsaConfig(r=2, target_modules=["0", "1"]))
        metrics = factor_metrics(model)
        assert metrics["condition"] == pytest.approx(sum(conditions) / 2, rel=1e-4)
        assert metrics["deviation"] < 1e-5

    def test_other_models_have_none(self):
        assert factor_metrics(nn.Linear(2, 2)) == {}


def test_thresholds_are_as_said():
    assert all("0.95" in CLAIMS[i].threshold for i in (0, 1, 2))
    assert "0.1" in CLAIMS[3].threshold
    assert set(GAMMA.values()) == {1e-3, 1e-2}
    assert SIZES["cpu"][2] >= 5


def test_smoke_run_gives_a_record(tmp_path: Any):
    (outcome,) = reproduce.reproduce(["sorsa"], "smoke", tmp_path / "record", work=tmp_path / "work")
    assert outcome["failed"] == []
    record = json.loads((tmp_path / "record" / "sorsa.json").read_text())
    found = {claim["name"]: claim for claim in record["scales"]["smoke"]["claims"]}
    assert set(found) == {claim.name for claim in CLAIMS}
    table = found["preservation"]["table"]
    assert [row["arm"] for row in table] == [
        "LoRA",
        "PiSSA",
        "SORSA, no regulariser",
        "SORSA",
        "SORSA, gamma 0.01",
    ]
    trained = {row["arm"]: row["trained"] for row in table}
    assert trained["SORSA"] == trained["LoRA"] + 16 == 8 * (64 + 256 + 256 + 256) + 16
    assert all((row["condition"] is None) == ("SORSA" not in row["arm"]) for row in table)
