import json
import math
from typing import Any

import pytest
import torch

from weightlab.papers import orthogonal_adaptation as paper
from weightlab.papers import reproduce
from weightlab.papers.orthogonal_adaptation import (
    ARMS,
    CLAIMS,
    DISJOINT,
    GAUSSIAN,
    HALF,
    KEYS,
    LORA,
    SAME,
    SIZES,
    TILED,
    down_projections,
    judge,
    paired,
)


def products(arm: str, n: int = 96, r: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Gram matrix of each concept's rows, and ‖BᵢᵀBⱼ‖ of all pairs."""
    A = down_projections(arm, n, r, 4, seed=0, layer="0").double()
    return A @ A.mT, (A[:, None] @ A.mT).flatten(2).norm(dim=2)


class TestDownProjections:
    @pytest.mark.parametrize("arm", [DISJOINT, KEYS, HALF, SAME, TILED])
    def test_rows_are_orthonormal(self, arm: str):
        assert torch.allclose(products(arm)[0], torch.eye(8, dtype=torch.float64), atol=1e-6)

    @pytest.mark.parametrize(("arm", "shared"), [(DISJOINT, 0), (HALF, 4), (SAME, 8), (TILED, 8)])
    def test_every_pair_shares_what_the_arm_says(self, arm: str, shared: int):
        overlaps = products(arm)[1]
        pairs = ~torch.eye(4, dtype=torch.bool)
        expected = torch.full((12,), math.sqrt(shared), dtype=torch.float64)
        assert torch.allclose(overlaps[pairs], expected, atol=1e-6)

    def test_random_ones_share_by_chance(self):
        for arm in (KEYS, GAUSSIAN, LORA):
            overlaps = products(arm)[1]
            pairs = overlaps[~torch.eye(4, dtype=torch.bool)]
            assert pairs.max() < 0.8 * overlaps.diagonal().min()
            assert pairs.max() > 0.1

    def test_principal_directions_are_disjoint_and_catch_more(self):
        base = paper._pretrained(32, 40, 0)
        x = paper._digits("train")[0]
        (dealt, *_) = paper._principal(base, 4, 4)
        gram = dealt.flatten(0, 1) @ dealt.flatten(0, 1).mT
        assert torch.allclose(gram, torch.eye(16), atol=1e-5)
        energies = (x @ dealt.mT).square().sum((1, 2))
        random = (x @ down_projections(DISJOINT, 576, 4, 4, 0, "0").mT).square().sum((1, 2))
        assert energies.min() > 3 * random.max()

    def test_unknown_arms_are_refused(self):
        with pytest.raises(ValueError, match="unknown arm 'bone'"):
            down_projections("bone", 8, 2, 2, 0, "0")


class TestRuns:
    size = SIZES["smoke"]

    def train(self, arm: str, lr: float = 1e-2) -> paper._Adapters:
        return paper._train(self.size, 8, 5, [(arm, lr)], 2, lambda part: None)

    def test_frozen_arms_train_one_factor(self):
        start = down_projections(DISJOINT, 576, 8, 4, 5, "0")[:2]
        frozen = self.train(DISJOINT)
        assert torch.equal(frozen.A[0], start)
        assert all(B.abs().sum() > 0 for B in frozen.B)
        lora = self.train(LORA)
        assert not torch.equal(lora.A[0], down_projections(LORA, 576, 8, 4, 5, "0")[:2])

    def test_arms_trained_side_by_side_are_those_trained_alone(self):
        together = paper._train(self.size, 8, 5, [(LORA, 1e-2), (DISJOINT, 3e-3)], 2, lambda part: None)
        for index, alone in enumerate((self.train(LORA), self.train(DISJOINT, 3e-3))):
            own = together.take(torch.arange(2 * index, 2 * index + 2))
            for a, b in zip(own.B, alone.B, strict=True):
                assert torch.allclose(a, b, atol=1e-4)

    def test_first_step_is_adams(self):
        one = paper._train(
            paper._Size(
                width=16, pretrain=1, steps=1, ranks=(4,), merged=(2,), seeds=1, tuning=1, lrs=(1e-2,)
            ),
            4,
            0,
            [(SAME, 1e-2)],
            2,
            lambda part: None,
        )
        # Adam moves every entry by the learning rate, in the direction against its gradient.
        moved = one.B[-1][one.B[-1] != 0]
        assert torch.allclose(moved.abs(), torch.full_like(moved, 1e-2), rtol=1e-3)

    def test_a_merge_of_one_is_the_adapter_itself(self):
        base = paper._pretrained(self.size.width, self.size.pretrain, 5)
        adapters = self.train(DISJOINT, 3e-2)
        alone = paper._accuracy(base, adapters, 5, 2, "test")
        first = adapters.take(torch.arange(1))
        assert paper._merged_accuracy(base, first, 1.0, 5, "test") == pytest.approx(float(alone[0]), abs=0.01)

    def test_marks_differ_by_concept_and_nothing_else(self):
        images = paper._digits("test")[0][:3]
        marked = paper._marked(images, 4, 0).unflatten(-1, (24, 24))
        assert torch.equal(marked[:, :, 9:], images.unflatten(-1, (24, 24))[:, 9:].expand(4, -1, -1, -1))
        corners = marked[:, :, :9, :9]
        assert torch.equal(corners[:, 0], corners[:, 2])
        assert len({tuple(corner.flatten().tolist()) for corner in corners[:, 0]}) == 4

    def test_crosstalk_is_that_of_the_room(self):
        from peft import LoraConfig, get_peft_model
        from torch import nn

        from weightlab.adapters.interference import crosstalk
        from weightlab.adapters.lora_layers import factors, lora_layers

        base = paper._pretrained(self.size.width, self.size.pretrain, 5)
        adapters = self.train(LORA, 3e-2)
        layers: list[nn.Module] = []
        for W, bias in zip(*base, strict=True):
            linear = nn.Linear(W.shape[1], W.shape[0])
            linear.weight.data, linear.bias.data = W.clone(), bias.clone()
            layers += [linear, nn.ReLU()]
        config = LoraConfig(r=8, lora_alpha=8, target_modules=["0", "2", "4"])
        model = get_peft_model(nn.Sequential(*layers[:-1]), config, "0")
        model.add_adapter("1", config)
        for name in "01":
            for index, layer in enumerate(lora_layers(model, name).values()):
                for factor, value in zip(factors(layer, name), (adapters.A, adapters.B), strict=True):
                    factor.data.copy_(value[index][int(name)])
        x = paper._marked(paper._digits("test")[0], 2, 5)
        reports = [crosstalk(model, "0", "1", x[0]), crosstalk(model, "1", "0", x[1])]
        measured = paper._interference(base, adapters, 5)
        for name, values in (
            ("product", [report.product for report in reports]),
            ("leak", [report.leak for report in reports]),
            ("relative leak", [report.relative_leak for report in reports]),
        ):
            assert measured[name] == pytest.approx(sum(values) / 2, rel=1e-3)


class TestJudge:
    def test_intervals_must_clear_the_threshold(self):
        assert judge((0.02, 0.05), 0.01) == "held"
        assert judge((-0.02, 0.005), 0.01) == "not held"
        assert judge((0.0, 0.05), 0.01) == "inconclusive"

    def test_differences_are_paired(self):
        mean, (low, high) = paired([0.5, 0.7, 0.9], [0.4, 0.6, 0.8])
        assert mean == pytest.approx(0.1)
        assert high - low < 1e-9


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("smoke")
    (outcome,) = reproduce.reproduce(
        ["orthogonal-adaptation"], "smoke", folder / "record", work=folder / "work"
    )
    assert outcome["failed"] == []
    text = (folder / "record" / "orthogonal-adaptation.json").read_text()
    return {claim["name"]: claim for claim in json.loads(text)["scales"]["smoke"]["claims"]}


class TestSmoke:
    def test_all_claims_stand_on_the_same_runs(self, smoke: dict[str, Any]):
        assert list(smoke) == [claim.name for claim in CLAIMS]
        tables = [claim["table"] for claim in smoke.values()]
        assert all(table == tables[0] for table in tables)
        assert [row["arm"] for row in tables[0]] == list(ARMS)

    def test_differences_are_those_of_the_table(self, smoke: dict[str, Any]):
        table = {row["arm"]: row for row in smoke["better-than-lora"]["table"]}
        for name, column, other in (
            ("freezing-costs-little", "alone", LORA),
            ("better-than-lora", "4 merged", LORA),
            ("orthogonality-matters", "4 merged", SAME),
        ):
            expected = table[DISJOINT][column] - table[other][column]
            assert 100 * smoke[name]["value"] == pytest.approx(expected, abs=0.02)

    def test_disjoint_columns_have_a_product_of_zero_and_a_leak(self, smoke: dict[str, Any]):
        table = {row["arm"]: row for row in smoke["less-crosstalk"]["table"]}
        assert table[DISJOINT]["product"] == 0
        assert table[SAME]["product"] > 0.1
        assert table[DISJOINT]["relative leak"] > 0.3
