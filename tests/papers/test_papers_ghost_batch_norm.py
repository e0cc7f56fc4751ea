from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from weightlab.nn import GhostBatchNorm1d
from weightlab.papers import ghost_batch_norm as paper
from weightlab.papers import reproduce
from weightlab.papers.ghost_batch_norm import (
    CLAIMS,
    LARGE,
    RECIPES,
    SIZES,
    SMALL,
    judge_no_worse,
    judge_walk,
    judge_worse,
    spread,
)
from weightlab.trial.arms.large_batch import ARMS, DEFAULTS, clipped_sgd, drops, with_ghosts


class TestJudges:
    """Each verdict, on numbers made to deserve it."""

    @pytest.mark.parametrize(
        ("interval", "worse", "no_worse"),
        [
            ((0.003, 0.02), "held", "not held"),
            ((-0.02, 0.001), "not held", "held"),
            ((-0.02, 0.02), "inconclusive", "inconclusive"),
            ((0.001, 0.02), "inconclusive", "inconclusive"),
        ],
    )
    def test_differences_must_clear_a_fifth_of_a_point(
        self, interval: tuple[float, float], worse: str, no_worse: str
    ):
        assert judge_worse(interval) == worse
        assert judge_no_worse(interval) == no_worse

    def test_log_must_lead_in_every_setting(self):
        good = {"log": [0.99, 0.98, 0.99], "sqrt": [0.9, 0.91, 0.9], "power": [0.95, 0.95, 0.96]}
        assert judge_walk({"a": good, "b": good}) == "held"
        behind = {**good, "power": [0.999, 0.991, 0.999]}
        assert judge_walk({"a": good, "b": behind}) == "not held"
        unclear = {**good, "power": [1.0, 0.9, 1.0], "log": [0.97, 0.98, 0.9]}
        assert judge_walk({"a": good, "b": unclear}) == "inconclusive"

    def test_many_comparisons_need_stronger_evidence(self):
        behind = {"log": [0.9, 0.9, 0.9], "power": [0.94, 0.95, 0.97]}
        sure = {"log": [0.99] * 3, "power": [0.5] * 3}
        assert judge_walk({"a": behind}) == "not held"
        assert judge_walk({"a": behind, **{str(i): sure for i in range(50)}}) == "inconclusive"

    def test_spread_is_the_mean_absolute_logarithm(self):
        assert spread([1.0, 2.0], [1.0, 2.0]) == 0
        assert spread([1.0, 2.0], [math.e, 2.0]) == pytest.approx(0.5)
        assert spread([1.0, 2.0], [3.0, 6.0]) == pytest.approx(spread([3.0, 6.0], [1.0, 2.0]))


class TestArms:
    def test_rate_drops_at_half_and_three_quarters(self):
        factors = [drops(step, 100, {}) for step in range(100)]
        assert [factors.count(value) for value in (1.0, 0.1, 0.01)] == [50, 25, 25]
        assert factors == sorted(factors, reverse=True)

    @pytest.mark.parametrize(("scale", "moved"), [(1.0, 0.1), (100.0, 0.5)])
    def test_gradients_are_clipped_to_norm_five(self, scale: float, moved: float):
        model = torch.nn.Linear(1, 1, bias=False)
        optimizer = clipped_sgd(model, {**DEFAULTS, "lr": 0.1, "weight_decay": 0.0})
        before = model.weight.item()
        (model.weight * scale).sum().backward()
        optimizer.step()
        assert before - model.weight.item() == pytest.approx(moved, rel=1e-5)

    def test_ghosts_need_batch_norm(self):
        model = with_ghosts(torch.nn.Sequential(torch.nn.BatchNorm1d(2)), {"ghost_size": 4})
        assert isinstance(model[0], GhostBatchNorm1d)
        assert model[0].ghost_size == 4
        with pytest.raises(ValueError, match="no batch norm layer"):
            with_ghosts(torch.nn.Linear(2, 2), {"ghost_size": 4})

    def test_differ_in_the_ghosts_alone(self):
        plain, ghost = ARMS
        assert (
            replace(
                ghost, name=plain.name, description=plain.description, transform=None, defaults=plain.defaults
            )
            == plain
        )


class TestTask:
    def test_labels_are_wrong_as_often_as_said_and_only_in_training(self):
        right, noisy = paper._task(32, 0.0), paper._task(32, 0.2)
        for split in ("validation", "test"):
            assert torch.equal(right.images(split)[1], noisy.images(split)[1])
        wrong = right.images("train")[1] != noisy.images("train")[1]
        assert wrong.float().mean() == pytest.approx(0.2, abs=0.03)
        assert torch.equal(noisy.images("train")[1], noisy.images("train")[1])
        assert len(right.images("test")[1]) == 712

    def test_regime_adaptation_makes_about_as_many_updates(self):
        images = len(paper._task(32, 0.0).images("train")[1])
        for recipe in RECIPES.values():
            updates = recipe.epochs(20) * (images // recipe.batch)
            few = 20 * (images // SMALL)
            assert updates == pytest.approx(
                few if recipe.longer or recipe.batch == SMALL else few / 16, rel=0.05
            )
        assert RECIPES["LB + LR"].lr == pytest.approx(0.1 * math.sqrt(LARGE / SMALL))

    def test_recipes_start_from_the_same_weights(self):
        small, large = (
            paper._task(batch, 0.0).build(torch.Generator().manual_seed(3)) for batch in (SMALL, LARGE)
        )
        for a, b in zip(small.state_dict().values(), large.state_dict().values(), strict=True):
            assert torch.equal(a, b)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("smoke")
    (outcome,) = reproduce.reproduce(["ghost-batch-norm"], "smoke", folder / "record", work=folder / "work")
    assert outcome["failed"] == []
    text = (folder / "record" / "ghost-batch-norm.json").read_text()
    recorded = json.loads(text)["scales"]["smoke"]["claims"]
    return {claim["name"]: claim for claim in recorded}


class TestSmoke:
    def test_records_every_claim_with_table_and_figure(self, smoke: dict[str, Any]):
        assert list(smoke) == [claim.name for claim in CLAIMS]
        assert all(claim["table"] and claim["figure"]["series"] for claim in smoke.values())

    def test_differences_in_the_table_are_to_the_small_batch(self, smoke: dict[str, Any]):
        for name in ("generalisation-gap", "small-ghosts-regularise"):
            table = {row["recipe"]: row for row in smoke[name]["table"]}
            assert set(table) == set(RECIPES)
            small = table["SB"]["test error, %"]
            for row in table.values():
                assert row["minus SB"] == pytest.approx(row["test error, %"] - small)
                assert row["low"] <= row["minus SB"] <= row["high"]

    def test_the_same_runs_serve_all_claims_of_a_setting(self, smoke: dict[str, Any]):
        gap, updates = (smoke[name] for name in ("generalisation-gap", "updates-close-the-gap"))
        assert gap["table"] == updates["table"] != smoke["small-ghosts-regularise"]["table"]

    def test_walks_are_drawn_for_every_batch_size(self, smoke: dict[str, Any]):
        claim = smoke["logarithmic-walk"]
        assert len(claim["table"]) == 6
        for row in claim["table"]:
            assert all(value <= 1 for key, value in row.items() if key.startswith("R²"))
        for line in claim["figure"]["series"]:
            assert line["x"][-1] <= SIZES["smoke"].walk_steps
            assert min(line["low"]) > 0

    def test_walks_of_one_learning_rate_appear_in_both_claims(self, smoke: dict[str, Any]):
        first, second = (
            {line["name"]: line["y"] for line in smoke[name]["figure"]["series"]}
            for name in ("logarithmic-walk", "sqrt-scaling-makes-walks-alike")
        )
        assert {name: second[name] for name in first} == first
