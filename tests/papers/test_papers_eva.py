from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightlab.papers import reproduce
from weightlab.papers.eva import (
    ARMS,
    CLAIMS,
    attained,
    gradient_moments,
    judge_above,
    judge_all,
    judge_better,
    judge_cheaper,
)


class Regression:
    """As much of a task as gradients need."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(model(x), y)


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(7, 5, generator=generator).double() + 0.5,
            torch.randn(7, 2, generator=generator).double(),
        )
        for _ in range(count)
    ]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()


class TestGradientMoments:
    def test_they_give_the_gradient_of_an_up_projection_at_zero(self):
        model, task, data = network(), Regression(), batches()
        moments = gradient_moments(model, ["0", "2"], task, data)  # type: ignore[arg-type]
        A = torch.linalg.qr(torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).double()).Q.T
        total = 0.0
        for x, y in data:
            for row in range(len(x)):
                B = torch.zeros(6, 2, dtype=torch.float64, requires_grad=True)
                # One row at a time through the adapter, the loss over the whole batch.
                mask = torch.zeros(len(x), 1, dtype=torch.float64)
                mask[row] = 1
                hidden = model[0](x) + mask * (x @ A.T @ B.T)
                F.mse_loss(model[2](model[1](hidden)), y).backward()
                assert B.grad is not None
                total += float(B.grad.square().sum())
        assert float((A @ moments["0"] @ A.T).trace()) == pytest.approx(total)
        assert not any(module._forward_hooks for module in model.modules())

    def test_share_is_one_for_the_best_rows_and_what_random_rows_expect(self):
        (moments, *_) = gradient_moments(network(), ["0"], Regression(), batches()).values()  # type: ignore[arg-type]
        best = torch.linalg.eigh(moments).eigenvectors[:, -2:].T
        assert attained(best, moments) == pytest.approx(1)
        generator = torch.Generator().manual_seed(0)
        drawn = [
            attained(torch.linalg.qr(torch.randn(5, 2, generator=generator).double()).Q.T, moments)
            for _ in range(4000)
        ]
        expected = 2 / 5 * moments.trace() / torch.linalg.eigvalsh(moments)[-2:].sum()
        assert sum(drawn) / len(drawn) == pytest.approx(float(expected), rel=0.03)
        assert max(drawn) <= 1


class TestJudges:
    """Each verdict, on intervals made to deserve it."""

    def test_every_task_must_clear_the_threshold(self):
        above, below, across = (0.92, 0.95), (0.8, 0.85), (0.85, 0.95)
        assert judge_above([above, above], 0.9) == "held"
        assert judge_above([above, below], 0.9) == "not held"
        assert judge_above([across, below], 0.9) == "not held"
        assert judge_above([above, across], 0.9) == "inconclusive"

    @pytest.mark.parametrize(
        ("early", "final", "verdict"),
        [
            ((-0.2, -0.03), (-0.5, 0.9), "held"),
            ((-0.2, -0.01), (-0.5, 0.9), "inconclusive"),
            ((-0.01, 0.2), (-0.5, 0.9), "not held"),
            ((-0.2, -0.03), (0.5, 1.5), "inconclusive"),
            ((-0.2, -0.03), (1.1, 1.5), "not held"),
        ],
    )
    def test_faster_and_no_worse(self, early: Any, final: Any, verdict: str):
        assert judge_better(early, final) == verdict

    @pytest.mark.parametrize(
        ("parameters", "final", "verdict"),
        [
            ((-0.2, -0.1), (-0.5, 0.9), "held"),
            ((0.1, 0.2), (-0.5, 0.9), "not held"),
            ((-0.2, 0.1), (-0.5, 0.9), "inconclusive"),
            ((-0.2, -0.1), (1.2, 1.9), "not held"),
        ],
    )
    def test_cheaper_and_no_worse(self, parameters: Any, final: Any, verdict: str):
        assert judge_cheaper(parameters, final) == verdict

    def test_all_tasks_decide(self):
        assert judge_all(["held", "held"]) == "held"
        assert judge_all(["held", "inconclusive"]) == "inconclusive"
        assert judge_all(["inconclusive", "not held"]) == "not held"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("smoke")
    (outcome,) = reproduce.reproduce(["eva"], "smoke", folder / "record", work=folder / "work")
    assert outcome["failed"] == []
    return {"folder": folder, "claims": {claim["name"]: claim for claim in outcome["claims"]}}


class TestSmoke:
    def test_writes_a_strict_record_of_all_claims(self, smoke: dict[str, Any]):
        def refuse(constant: str) -> None:
            raise AssertionError(constant)

        text = (smoke["folder"] / "record" / "eva.json").read_text()
        recorded = json.loads(text, parse_constant=refuse)["scales"]["smoke"]["claims"]
        assert [claim["name"] for claim in recorded] == [claim.name for claim in CLAIMS]
        assert all(claim["table"] for claim in recorded)

    def test_shares_are_shares_and_data_beat_chance(self, smoke: dict[str, Any]):
        rows = {row["rows of A"]: row["share"] for row in smoke["claims"]["gradient-signal"]["table"]}
        assert 0 <= rows["last components"] < rows["random"] < rows["EVA"] <= 1
        assert rows["EVA"] <= rows["not centred"] <= 1

    def test_every_arm_is_trained(self, smoke: dict[str, Any]):
        claim = smoke["claims"]["beats-random-rows"]
        assert [row["arm"] for row in claim["table"]] == list(ARMS)
        assert {line["name"] for line in claim["figure"]["series"]} == set(ARMS)
        assert all(len(line["x"]) == 4 for line in claim["figure"]["series"])

    def test_parameters_at_rho_one_are_those_of_the_layers(self, smoke: dict[str, Any]):
        rows = smoke["claims"]["redistribution"]["table"]
        assert rows[0]["parameters"] == 8 * (64 + 256 + 256 + 256)
        assert rows[1]["parameters"] != rows[0]["parameters"]
