from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from weightlab.papers import reproduce
from weightlab.papers.auon import CLAIMS, SIZES, judge_brake, judge_comparable, judge_cosh, slope

HIDDEN_ENTRIES = 64 * 64


class TestJudges:
    """Each verdict, on numbers made to deserve it."""

    def test_cosh_does_not_matter_when_every_setting_agrees_within_a_hundredth(self):
        verdict, table = judge_cosh({"a": ([1e-4, -1e-4, 0.0], 0.1), "b": ([0.0, 0.0, 0.0], 2.0)})
        assert verdict == "not held"
        assert [row["setting"] for row in table] == ["a", "b"]
        assert table[0]["low"] < 0 < table[0]["high"]

    @pytest.mark.parametrize("sign", [1, -1])
    def test_cosh_matters_when_one_setting_differs_either_way(self, sign: int):
        verdict, _ = judge_cosh({"a": ([0.0, 0.0, 0.0], 1.0), "b": ([sign * 0.1] * 3, 1.0)})
        assert verdict == "held"

    def test_several_settings_are_held_to_a_stricter_level(self):
        differences = [0.02, 0.04, 0.06, 0.08]
        alone, _ = judge_cosh({"a": (differences, 1.0)})
        among, _ = judge_cosh({"a": (differences, 1.0), **{str(i): ([0.0] * 4, 1.0) for i in range(9)}})
        assert (alone, among) == ("inconclusive", "inconclusive")
        differences = [0.04, 0.05, 0.06, 0.07]
        alone, _ = judge_cosh({"a": (differences, 1.0)})
        among, _ = judge_cosh({"a": (differences, 1.0), **{str(i): ([0.0] * 4, 1.0) for i in range(99)}})
        assert (alone, among) == ("held", "inconclusive")

    def test_noise_wider_than_the_margin_settles_nothing(self):
        assert judge_cosh({"a": ([0.5, -0.5, 0.3], 1.0)})[0] == "inconclusive"

    def test_comparable_needs_every_task_and_fails_on_one(self):
        near, far, unsure = (2.0, 0.0, -0.1, 0.1), (1.0, 0.2, 0.1, 0.3), (1.0, 0.05, 0.0, 0.1)
        better = (1.0, -0.5, -0.6, -0.4)
        assert judge_comparable([near, better]) == "held"
        assert judge_comparable([near, far]) == "not held"
        assert judge_comparable([near, unsure]) == "inconclusive"

    def test_brake_holds_if_either_form_brakes_and_fails_if_neither_does(self):
        assert judge_brake([(0.5, 0.6), (0.999, 1.0)]) == "held"
        assert judge_brake([(0.999, 1.0), (0.995, 1.0)]) == "not held"
        assert judge_brake([(0.999, 1.0), (0.93, 0.97)]) == "inconclusive"

    @pytest.mark.parametrize("power", [2.0, 3.0])
    def test_slope_is_the_power_of_the_law(self, power: float):
        sides = [128, 256, 512]
        rounds = [[scale * side**power for side in sides] for scale in (1.0, 1.5, 0.7)]
        assert slope(sides, rounds) == pytest.approx((power, power, power))

    def test_slope_has_a_t_interval_over_rounds(self):
        rounds = [[2.0**1, 4.0**1], [2.0**2, 4.0**2], [2.0**3, 4.0**3]]
        mean, low, high = slope([2, 4], rounds)
        half = 4.302652729911275 / math.sqrt(
            3
        )  # t quantile of 2 degrees of freedom times the error of the mean
        assert (mean, low, high) == pytest.approx((2.0, 2.0 - half, 2.0 + half))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("smoke")
    (outcome,) = reproduce.reproduce(["auon"], "smoke", folder / "record", work=folder / "work")
    assert outcome["failed"] == []
    return {"folder": folder, "claims": {claim["name"]: claim for claim in outcome["claims"]}}


class TestSmoke:
    def test_writes_a_strict_record_of_all_claims(self, smoke: dict[str, Any]):
        def refuse(constant: str) -> None:
            raise AssertionError(constant)

        text = (smoke["folder"] / "record" / "auon.json").read_text()
        recorded = json.loads(text, parse_constant=refuse)["scales"]["smoke"]["claims"]
        assert [claim["name"] for claim in recorded] == [claim.name for claim in CLAIMS]
        assert all(claim["figure"]["series"] and claim["table"] for claim in recorded)

    def test_cosh_changes_no_loss_by_more_than_its_own_size_suggests(self, smoke: dict[str, Any]):
        claim = smoke["claims"]["cosh-matters"]
        assert claim["verdict"] == "not held"
        assert len(claim["table"]) == sum(map(len, SIZES["smoke"].rates.values()))
        assert all(abs(row["difference"]) < 1e-3 for row in claim["table"])

    def test_brake_is_what_its_bounds_say(self, smoke: dict[str, Any]):
        claim = smoke["claims"]["emergency-brake"]
        assert claim["verdict"] == "not held"
        for row, gamma in zip(claim["table"], (1.0, 1.5), strict=True):
            taken = 1 - row["update norm, with cosh over without"]
            low, high = gamma**2 / (2 * HIDDEN_ENTRIES), math.sinh(gamma) ** 2 / (2 * HIDDEN_ENTRIES)
            assert 0.9 * low < taken < 1.1 * high
        paper, code = (row["update norm, outlier step over step before"] for row in claim["table"])
        assert paper == pytest.approx(1, rel=1e-3)
        assert code > 10

    def test_every_arm_is_tuned_and_compared_with_adamw(self, smoke: dict[str, Any]):
        table = smoke["claims"]["comparable-to-adamw"]["table"]
        assert [row["arm"] for row in table if row["task"] == "docs-gpt"] == ["adamw", "auon"]
        for row in table:
            assert row["low"] <= row["ratio to adamw"] <= row["high"]
            assert "lr" in row["tuned"]

    def test_every_size_is_timed(self, smoke: dict[str, Any]):
        times = {(row["step"], row["side"]): row["ms"] for row in smoke["claims"]["linear-time"]["table"]}
        size = SIZES["smoke"]
        expected = {("AuON", side) for side in size.auon_sides}
        assert set(times) == expected | {("Newton-Schulz", side) for side in size.newton_schulz_sides}
        assert min(times.values()) > 0


def test_trials_answer_from_their_store(smoke: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    from weightlab.trial.engines.local import LocalEngine

    def refuse(self: LocalEngine, job: object) -> None:
        raise AssertionError("ran again")

    monkeypatch.setattr(LocalEngine, "submit", refuse)
    (store,) = Path(smoke["folder"] / "work").glob("*/trials.sqlite")
    context = reproduce.ClaimContext(scale="smoke", out=smoke["folder"], store=store)
    trial_claims = [claim for claim in CLAIMS if claim.name in ("cosh-matters", "comparable-to-adamw")]
    for claim in trial_claims:
        again = claim.run(context)
        before = smoke["claims"][claim.name]
        assert again.verdict == before["verdict"]
        assert again.value == before["value"]
        assert again.cost == pytest.approx(before["cost"])
