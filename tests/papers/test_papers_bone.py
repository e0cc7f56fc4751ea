from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightlab.adapters import bone_weight
from weightlab.papers import bone as paper
from weightlab.papers import reproduce
from weightlab.papers.bone import CLAIMS, RANKS, SIZES, TRAINED, half, judge, log_ratio
from weightlab.trial import registry
from weightlab.trial.arms.bone_controls import GuidedBlocks
from weightlab.trial.result import SeedRun
from weightlab.trial.spec import CurvePoint


class TestJudge:
    @pytest.mark.parametrize(
        ("intervals", "verdict"),
        [
            ([(-0.03, -0.01), (-0.9, -0.2)], "held"),
            ([(-0.03, -0.01), (-0.9, 0.2)], "inconclusive"),
            ([(-0.03, -0.01), (-0.004, 0.2)], "not held"),
            ([(-0.03, 0.01), (-math.inf, math.inf)], "inconclusive"),
        ],
    )
    def test_all_have_to_lie_below(self, intervals: list[tuple[float, float]], verdict: str):
        assert judge(intervals, -0.005) == verdict


def run(losses: list[float | None], status: Any = "ok") -> SeedRun:
    curve = [CurvePoint(0, 0.0, None, 1.0)]
    curve += [CurvePoint(10 * (i + 1), 0.0, loss, 1.0) for i, loss in enumerate(losses)]
    return SeedRun(seed=0, score=0.0, status=status, curve=curve)


class TestHalves:
    def test_means(self):
        assert half(run([4.0, 2.0, 1.0, 0.5]), 40) == (3.0, 0.75)

    def test_a_run_that_failed_has_infinite_loss(self):
        assert half(run([4.0, 2.0]), 40) == (3.0, math.inf)
        assert half(run([4.0, 2.0, 1.0, 0.5], "diverged"), 40) == (math.inf, math.inf)

    def test_ratios_with_infinite_losses(self):
        assert log_ratio(2.0, 1.0) == pytest.approx(math.log(2))
        assert log_ratio(math.inf, 1.0) == math.inf
        assert log_ratio(1.0, math.inf) == -math.inf
        assert log_ratio(math.inf, math.inf) == 0.0


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [64, 256, 256, 10]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def started(name: str) -> tuple[nn.Module, Any]:
    """The model as the arm of the claims starts with it, and the arm."""
    arm = paper._arm(name)
    hyperparameters = {**arm.defaults, "lr": 1e-2}
    assert arm.transform is not None
    model = arm.transform(perceptron(), hyperparameters)
    if arm.init is not None:
        with torch.no_grad():
            arm.init(model, hyperparameters, torch.Generator().manual_seed(0))
    return model, arm


class TestArms:
    @pytest.mark.parametrize("name", RANKS)
    def test_trained_numbers_are_as_said_and_nearly_equal(self, name: str):
        model, _ = started(name)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == RANKS[name] * TRAINED[name]
        assert trained == pytest.approx(RANKS[paper.AFFINE] * TRAINED[paper.AFFINE], rel=0.02)

    @pytest.mark.parametrize("name", RANKS)
    def test_all_start_at_the_base(self, name: str):
        x = torch.randn(5, 64)
        torch.testing.assert_close(started(name)[0](x), perceptron()(x), rtol=1e-4, atol=1e-5)

    def test_all_are_tuned_alike(self):
        assert len({str(paper._arm(name).search_space) for name in RANKS}) == 1
        assert len({paper._arm(name).optimizer for name in RANKS}) == 1
        assert {paper._arm(name).defaults["weight_decay"] for name in RANKS} == {0.0}


class TestControls:
    @pytest.mark.parametrize(("name", "plain"), [("bone-guide-only", False), ("bone-random-guide", True)])
    def test_update(self, name: str, plain: bool):
        arm = registry.arm(name)
        model = perceptron()
        weight = model[2].weight.detach().clone()
        model = arm.transform(model, arm.defaults)  # type: ignore[misc]
        (blocks,) = [m for m in model[2].modules() if isinstance(m, GuidedBlocks)]  # type: ignore[index]
        if arm.init is not None:
            arm.init(model, arm.defaults, torch.Generator().manual_seed(1))
            assert blocks.guide.norm() == pytest.approx(weight.norm())
            assert F.cosine_similarity(blocks.guide.flatten(), weight.flatten(), 0).abs() < 0.05
        else:
            assert torch.equal(blocks.guide, weight)
        nn.init.normal_(blocks.blocks, std=0.1)
        guided = bone_weight(blocks.guide, blocks.blocks) - blocks.guide
        tiled = blocks.blocks.reshape(256, 8).repeat(1, 32)
        expected = weight + (guided if plain else guided - tiled)
        torch.testing.assert_close(model[2].weight, expected)  # type: ignore[index]

    def test_random_guides_follow_the_seed_alone(self):
        arm = registry.arm("bone-random-guide")
        guides = []
        for seed in (1, 1, 2):
            model = arm.transform(perceptron(), arm.defaults)  # type: ignore[misc]
            arm.init(model, arm.defaults, torch.Generator().manual_seed(seed))  # type: ignore[misc]
            guides.append(next(m.guide for m in model.modules() if isinstance(m, GuidedBlocks)))
        assert torch.equal(guides[0], guides[1])
        assert not torch.equal(guides[0], guides[2])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("smoke")
    (outcome,) = reproduce.reproduce(["bone"], "smoke", folder / "record", work=folder / "work")
    assert outcome["failed"] == []
    recorded = json.loads((folder / "record" / "bone.json").read_text())["scales"]["smoke"]["claims"]
    return {claim["name"]: claim for claim in recorded}


class TestSmoke:
    def test_records_every_claim_with_table_and_figure(self, smoke: dict[str, Any]):
        assert list(smoke) == [claim.name for claim in CLAIMS]
        for claim in smoke.values():
            assert {row["arm"] for row in claim["table"]} == set(RANKS)
            assert len(claim["figure"]["series"]) == len(RANKS)
            assert len(claim["seeds"]) == SIZES["smoke"].seeds

    def test_same_runs_serve_all_claims(self, smoke: dict[str, Any]):
        tables = [claim["table"] for claim in smoke.values()]
        assert tables[0] == tables[1] == tables[2]

    def test_differences_in_the_table_are_to_the_affine_form(self, smoke: dict[str, Any]):
        rows = {row["arm"]: row for row in smoke["final-error"]["table"]}
        for row in rows.values():
            minus = rows[paper.AFFINE]["test error, %"] - row["test error, %"]
            assert row["affine minus it, points"] == pytest.approx(minus)
