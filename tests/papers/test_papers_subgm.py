from __future__ import annotations

from typing import Any

import pytest
import torch

from weightlab.papers import reproduce
from weightlab.papers.subgm import (
    CLAIMS,
    SIZES,
    _absolute_deviations,
    _descend,
    _Problems,
    _problems,
    falls_per_hundred,
    judge_agnostic,
    judge_minimum,
    judge_robust,
)


class TestJudges:
    """Each verdict, on numbers made to deserve it."""

    good, lost = [1e-5, 2e-5, 3e-5], [0.6, 0.7, 0.8]

    def test_robust_needs_a_small_error_a_baseline_that_fails_and_an_escape(self):
        assert judge_robust(self.good, self.lost, True) == "held"
        assert judge_robust(self.good, self.lost, False) == "not held"
        assert judge_robust(self.lost, self.lost, True) == "not held"
        assert judge_robust(self.good, self.good, True) == "not held"
        assert judge_robust([1e-5, 1e-2, 1e-4], self.lost, True) == "inconclusive"
        assert judge_robust(self.good, [0.1, 0.9, 0.4], True) == "inconclusive"

    def test_agnostic_needs_every_ratio_near_one_and_fails_on_one(self):
        near, far, unsure = (1.0, 0.9, 1.1), (2.0, 1.6, 2.4), (1.0, 0.5, 2.0)
        assert judge_agnostic([near, near]) == "held"
        assert judge_agnostic([near, far]) == "not held"
        assert judge_agnostic([near, (0.5, 0.4, 0.6)]) == "not held"
        assert judge_agnostic([near, unsure]) == "inconclusive"

    def test_minimum_counts_only_if_another_matrix_fits_better_on_every_seed(self):
        errors, truth, below = [1e-4, 2e-4, 2e-4, 3e-4], [1.6, 1.5, 1.6, 1.5], [0.1, 0.2, 0.1, 0.2]
        assert judge_minimum(errors, below, truth) == "held"
        assert judge_minimum([0.9, 1.0, 0.8, 0.9], below, truth) == "not held"
        assert judge_minimum([1e-4, 0.9, 1e-4, 0.9], below, truth) == "inconclusive"
        assert judge_minimum(errors, [0.1, 1.5, 0.1, 0.2], truth) == "inconclusive"

    @pytest.mark.parametrize("power", [0.5, 1.0])
    def test_fall_is_read_off_a_power_law(self, power: float):
        errors = {alpha: [factor * alpha**power for factor in (1.0, 3.0)] for alpha in (1e-1, 1e-3, 1e-6)}
        assert falls_per_hundred(errors) == pytest.approx([100**power] * 2)


class TestProtocol:
    def test_outliers_of_another_size_are_the_same_outliers(self):
        small, large = (_problems(6, 2, 50, [3, 4], "cpu", outliers=0.2, size=size) for size in (1.0, 1e3))
        assert torch.equal(small.operators, large.operators)
        clean = (small.operators * small.truths[:, None]).sum((-2, -1))
        noise = small.y - clean
        torch.testing.assert_close(large.y - clean, 1e3 * noise, rtol=1e-9, atol=1e-9)
        assert 0.05 < (noise.abs() > 1e-9).double().mean() < 0.4

    def test_truths_have_the_rank_and_unit_eigenvalues(self):
        values = torch.linalg.eigvalsh(_problems(6, 2, 5, [0], "cpu").truths[0])
        torch.testing.assert_close(values, torch.tensor([0.0] * 4 + [1.0] * 2).double(), atol=1e-12, rtol=0)

    def test_least_squares_converges_where_it_should(self):
        problems = _problems(6, 2, 240, [0, 1], "cpu")
        errors, X = _descend(problems, 2, [(0.3, 1.0), (0.3, 1e-3)], 400)
        assert errors.shape == (401, 2, 2)
        assert (errors[-1] < 1e-6).all()
        torch.testing.assert_close(errors[-1], problems.errors(X))
        assert (errors[0, :, 1] > 0.999).all()

    def test_absolute_deviations_find_a_matrix_of_any_rank_among_outliers(self):
        problems = _problems(6, 6, 120, [0], "cpu", outliers=0.2)
        assert max(_absolute_deviations(problems)) < 1e-5

    def test_error_is_relative(self):
        truths = 3 * torch.eye(2).expand(1, 2, 2)
        problems = _Problems(truths, truths, truths)
        assert problems.errors(1.5 * truths).item() == pytest.approx(0.5)
        assert problems.errors((1.5 * truths)[:, None].expand(1, 4, 2, 2)).shape == (1, 4)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("smoke")
    (outcome,) = reproduce.reproduce(["subgm"], "smoke", folder / "record", work=folder / "work")
    assert outcome["failed"] == []
    return {claim["name"]: claim for claim in outcome["claims"]}


def test_every_claim_comes_with_a_figure_and_a_table(smoke: dict[str, Any]):
    assert list(smoke) == [claim.name for claim in CLAIMS]
    for claim in smoke.values():
        assert claim["figure"]["series"]
        assert claim["table"]
        low, high = claim["interval"]
        assert low <= claim["value"] <= high


def test_subgm_beats_least_squares_among_outliers_and_only_there(smoke: dict[str, Any]):
    rows = {(row["setting"], row["outliers"]): row["relative error"] for row in smoke["robust"]["table"]}
    assert rows["SubGM", 0.2] < 0.1 * rows["least squares, tuned", 0.2]
    assert smoke["gaussian-noise"]["value"] > 1


def test_a_smaller_start_leaves_a_smaller_error(smoke: dict[str, Any]):
    errors = [
        row["relative error"]
        for row in smoke["small-start"]["table"]
        if row["setting"] == f"rank {SIZES['smoke'].dim}"
    ]
    assert errors[-1] < errors[0]


def test_a_better_fit_than_the_truth_is_exhibited(smoke: dict[str, Any]):
    for row in smoke["not-the-minimum"]["table"]:
        assert row["loss of another matrix"] < row["loss of the truth"]
