from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

from weightlab.papers import data_diet as paper
from weightlab.papers import reproduce
from weightlab.papers._stacked_perceptrons import Training, _order, _start, logits, train_stacked
from weightlab.papers.data_diet import ALL, CLAIMS, CLEAN, NOISY, SIZES, TRAIN, detection, judge


class TestJudge:
    @pytest.mark.parametrize(
        ("tests", "verdict"),
        [
            ([((0.1, 0.2), 0.0), ((-0.4, 0.1), -0.5)], "held"),
            ([((0.1, 0.2), 0.0), ((-0.6, 0.1), -0.5)], "inconclusive"),
            ([((0.1, 0.2), 0.0), ((-0.9, -0.6), -0.5)], "not held"),
            ([((-0.1, 0.2), 0.0), ((-0.9, -0.6), -0.5)], "not held"),
            ([((0.0, 0.2), 0.0)], "inconclusive"),
        ],
    )
    def test_all_have_to_lie_above(self, tests: Any, verdict: str):
        assert judge(*tests) == verdict


def test_detection_is_the_area_under_the_roc_curve():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(8, (200,), generator=generator).float()
    wrong = torch.rand(200, generator=generator) < 0.2
    assert detection(scores, wrong) == pytest.approx(roc_auc_score(wrong.numpy(), scores.numpy()))


class TestStackedPerceptrons:
    @pytest.mark.parametrize("shared", [True, False])
    def test_each_is_trained_as_pytorch_would(self, shared: bool):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.rand(50, 6, generator=generator)
        targets = torch.randint(3, (50,) if shared else (2, 50), generator=generator)
        trainings = [Training(torch.arange(5, 40), 0.2, 1), Training(torch.arange(0, 50, 2), 0.05, 7)]
        found = train_stacked(inputs, targets, trainings, classes=3, steps=12, batch_size=8)
        for number, training in enumerate(trainings):
            model = nn.Sequential(nn.Linear(6, 128), nn.ReLU(), nn.Linear(128, 3))
            start = [parameter[0] for parameter in _start([training.seed], 6, 3)]
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), start, strict=True):
                    parameter.copy_(value.T.reshape(parameter.shape))
            optimizer = torch.optim.SGD(
                model.parameters(), lr=training.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
            )
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
            labels = targets if shared else targets[number]
            for batch in _order(training, 96).long().split(8):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
                optimizer.step()
                schedule.step()
            for parameter, values in zip(model.parameters(), found, strict=True):
                torch.testing.assert_close(values[number].T.reshape(parameter.shape), parameter.detach())
            torch.testing.assert_close(logits(found, inputs)[number], model(inputs).detach())

    def test_weights_start_as_those_of_linear_layers(self):
        weight, bias, *_ = _start(range(40), 64, 10)
        assert weight.abs().max() <= 1 / 8
        assert bias.abs().max() <= 1 / 8
        assert weight.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.01)

    def test_an_epoch_sees_each_example_once(self):
        order = _order(Training(torch.arange(10, 20), 0.1, 0), 25)
        assert sorted(order[:10].tolist()) == list(range(10, 20))
        assert sorted(order[10:20].tolist()) == list(range(10, 20))
        assert order[:10].tolist() != order[10:20].tolist()


class TestSplits:
    def test_wrong_labels_are_in_the_training_part_only(self):
        clean, noisy = paper._split(3, 0.0, 2), paper._split(3, 0.1, 2)
        assert torch.equal(clean.train, noisy.train)
        assert len(clean.train) == TRAIN
        assert sorted(torch.cat([clean.train, clean.test]).tolist()) == list(range(1797))
        changed = clean.labels != noisy.labels
        assert int(changed.sum()) == 120
        assert torch.equal(changed[noisy.train], noisy.wrong)
        assert not changed[noisy.test].any()

    def test_subsets(self):
        split = paper._split(3, 0.0, 2)
        scores = dict(zip(split.train.tolist(), split.scores["el2n"].tolist(), strict=True))
        sizes = {name: len(split.subset(arm)) for name, arm in CLEAN.items()}
        assert sizes[ALL] == TRAIN
        assert {size for name, size in sizes.items() if name.startswith("30 %")} == {360}
        hard, easy = (
            set(split.subset(CLEAN[f"50 %, {kind} EL2N"]).tolist()) for kind in ("largest", "smallest")
        )
        assert min(scores[index] for index in hard) >= max(scores[index] for index in easy)
        hardest = set(sorted(scores, key=lambda index: -scores[index])[:60])
        assert hardest <= hard
        assert not hardest & set(split.subset(CLEAN["50 %, largest EL2N but the top 5 %"]).tolist())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("smoke")
    (outcome,) = reproduce.reproduce(["data-diet"], "smoke", folder / "record", work=folder / "work")
    assert outcome["failed"] == []
    recorded = json.loads((folder / "record" / "data-diet.json").read_text())["scales"]["smoke"]["claims"]
    return {claim["name"]: claim for claim in recorded}


class TestSmoke:
    def test_records_every_claim(self, smoke: dict[str, Any]):
        assert list(smoke) == [claim.name for claim in CLAIMS]
        for claim in smoke.values():
            assert len(claim["seeds"]) == SIZES["smoke"].seeds

    @pytest.mark.parametrize(
        ("name", "arms"), [("half-of-the-data", CLEAN), ("offset-on-wrong-labels", NOISY)]
    )
    def test_tables_hold_every_arm(self, smoke: dict[str, Any], name: str, arms: dict[str, Any]):
        rows = {row["trained on"]: row for row in smoke[name]["table"]}
        assert list(rows) == list(arms)
        for row in rows.values():
            gap = row["accuracy, %"] - rows[ALL]["accuracy, %"]
            assert row["minus all, points"] == pytest.approx(gap)
        for line in smoke[name]["figure"]["series"]:
            assert line["y"][-1] == pytest.approx(rows[ALL]["accuracy, %"], rel=1e-4)

    def test_a_loss_is_judged_by_the_mirrored_interval(self, smoke: dict[str, Any]):
        low, high = smoke["reversal"]["interval"]
        expected = "held" if high < 0 else "not held" if low > 0 else "inconclusive"
        assert smoke["reversal"]["verdict"] == expected
