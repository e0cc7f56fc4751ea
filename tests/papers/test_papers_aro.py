from __future__ import annotations

import math
from typing import Any

import pytest

from weightlab.papers import reproduce
from weightlab.papers.aro import ARMS, CLAIMS, judge_ratio, largest_fall, step_ratio, steps_to
from weightlab.trial.spec import CurvePoint


def curve(*losses: float) -> list[CurvePoint]:
    return [CurvePoint(10 * i, 0.0, None, loss) for i, loss in enumerate(losses)]


class TestStepRatio:
    def test_lines_join_evaluations(self):
        assert steps_to(curve(3.0, 2.0, 1.0), 1.5) == 15.0
        assert steps_to(curve(3.0, 2.0, 1.0), 3.0) == 0.0
        assert steps_to(curve(3.0, 2.0, 1.0), 0.5) == math.inf

    def test_the_first_time_counts(self):
        assert steps_to(curve(3.0, 1.0, 2.0, 0.5), 1.0) == 10.0

    def test_twice_as_fast_is_two_and_the_other_way_round_a_half(self):
        slow, fast = curve(4.0, 3.0, 2.0, 1.0, 0.0), curve(4.0, 2.0, 0.0, -2.0, -4.0)
        assert step_ratio(slow, fast) == 2.0
        assert step_ratio(fast, slow) == 0.5

    def test_a_curve_ties_with_itself_even_if_it_rises_at_the_end(self):
        bumpy = curve(4.0, 1.0, 2.0)
        assert step_ratio(bumpy, bumpy) == 1.0

    @pytest.mark.parametrize("lost", [curve(4.0, math.nan), curve(4.0, math.inf), []])
    def test_a_run_without_an_end_has_lost(self, lost: list[CurvePoint]):
        assert step_ratio(curve(4.0, 3.0), lost) == 0.0
        assert step_ratio(lost, curve(4.0, 3.0)) == math.inf


class TestJudges:
    def test_the_interval_of_the_geometric_mean_decides(self):
        assert judge_ratio([1.2, 1.21, 1.19], 1.15)[0] == "held"
        assert judge_ratio([1.0, 1.01, 0.99], 1.15)[0] == "not held"
        assert judge_ratio([1.0, 1.5, 1.2], 1.15)[0] == "inconclusive"
        _, mean, (low, high) = judge_ratio([2.0, 0.5], 1.0)
        assert mean == pytest.approx(1.0)
        assert low * high == pytest.approx(1.0)

    def test_a_lost_run_never_holds(self):
        assert judge_ratio([2.0, 2.0, 0.0], 1.15)[0] == "not held"
        assert judge_ratio([2.0, 2.0, math.inf], 1.15)[0] == "inconclusive"

    def test_deepest_fall_is_relative_and_between_neighbours(self):
        assert largest_fall([[1.0, 2.0, 1.5, 3.0], [4.0, 3.6]]) == pytest.approx(0.25)
        assert largest_fall([[1.0, 2.0, 2.0]]) == 0.0


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("smoke")
    (outcome,) = reproduce.reproduce(["aro"], "smoke", folder / "record", work=folder / "work")
    assert outcome["failed"] == []
    return {claim["name"]: claim for claim in outcome["claims"]}


class TestSmoke:
    def test_every_claim_has_an_outcome_with_figure_and_table(self, smoke: dict[str, Any]):
        assert list(smoke) == [claim.name for claim in CLAIMS]
        assert all(claim["figure"]["series"] and claim["table"] for claim in smoke.values())

    @pytest.mark.parametrize(
        ("name", "baseline"),
        [("rotation-beats-none", "sinkhorn"), ("beats-adamw", "adamw"), ("beats-muon", "muon")],
    )
    def test_all_arms_are_tuned_and_the_baseline_ties_with_itself(
        self, smoke: dict[str, Any], name: str, baseline: str
    ):
        table = smoke[name]["table"]
        assert [row["arm"] for row in table] == list(ARMS)
        assert all("lr" in row["tuned"] for row in table)
        ratios = {row["arm"]: row[f"{baseline}'s steps over its own"] for row in table}
        assert ratios[baseline] == 1.0
        assert smoke[name]["value"] == ratios["aro"]

    def test_training_claims_share_one_trial(self, smoke: dict[str, Any]):
        losses = [
            [row["test loss"] for row in smoke[name]["table"]]
            for name in ("rotation-beats-none", "beats-adamw", "beats-muon")
        ]
        assert losses[0] == losses[1] == losses[2]

    def test_polar_never_falls_and_qr_does(self, smoke: dict[str, Any]):
        assert smoke["polar-never-lowers-rate"]["verdict"] == "held"
        rows = {
            (row["gradient"], row["base rule"], row["policy"]): row
            for row in smoke["qr-raises-rate"]["table"]
        }
        assert len(rows) == 18
        spread = {policy: rows["condition 100", "sign", policy] for policy in ("qr", "polar", "eigen")}
        assert spread["qr"]["deepest fall in a step"] > 0.1
        assert spread["polar"]["J at the end"] > spread["polar"]["J without rotation"]
        # On gradients with spread singular values QR ends near the eigenbasis.
        assert spread["qr"]["J at the end"] == pytest.approx(spread["eigen"]["J at the end"], rel=0.2)
