from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from weightlab.exceptions import TaskError
from weightlab.inspect import erg_count
from weightlab.papers import reproduce
from weightlab.papers._setol_task import count_by_products, gaussian_spectrum, kendall, measure, train
from weightlab.papers.schema import ClaimContext
from weightlab.papers.setol import CLAIMS, crossing, judge_above, judge_at_one_rate, judge_rivals


class TestJudges:
    def test_mean_over_seeds_must_clear_the_threshold(self):
        assert judge_above([0.8, 0.9, 0.85], 0.5) == "held"
        assert judge_above([0.1, 0.2, 0.15], 0.5) == "not held"
        assert judge_above([0.1, 0.9, 0.5], 0.5) == "inconclusive"

    def test_one_rival_as_good_is_enough_to_lose(self):
        alpha, weak, noisy = [0.9, 0.8, 0.9], [0.1, 0.0, 0.1], [0.9, 0.1, -0.9]
        assert judge_rivals(alpha, {"weak": weak}) == "held"
        assert judge_rivals(alpha, {"weak": weak, "same": alpha}) == "not held"
        assert judge_rivals(alpha, {"weak": weak, "reversed": [-x for x in alpha]}) == "not held"
        assert judge_rivals(alpha, {"weak": weak, "noisy": noisy}) == "inconclusive"

    def test_at_one_rate_no_correlation_is_needed_to_lose(self):
        assert judge_at_one_rate([0.3, 0.4, 0.5, 0.4]) == "held"
        assert judge_at_one_rate([0.1, -0.1, 0.05, 0.0]) == "not held"
        assert judge_at_one_rate([0.6, -0.2, 0.5, 0.1]) == "inconclusive"

    def test_crossing_is_the_first_rate_under_two_that_all_networks_bear(self):
        alphas, errors = np.array([[2.5, 2.1, 1.8, 1.5], [2.6, 2.0, 1.9, 1.5]]), np.full((2, 4), 0.03)
        assert crossing(alphas, errors) == 2
        errors[0, 2] = 0.9
        assert crossing(alphas, errors) is None
        assert crossing(alphas + 1, np.full((2, 4), 0.03)) is None
        assert crossing(alphas - 1, np.full((2, 4), 0.03)) is None


class TestMeasures:
    def test_rank_correlation_is_scipys(self):
        rng = np.random.default_rng(0)
        for _ in range(20):
            a, b = rng.integers(0, 4, (2, 7)).astype(float)
            expected = float(kendalltau(a, b).statistic)
            assert kendall(a, b) == pytest.approx(0.0 if math.isnan(expected) else expected)

    def test_spectra_are_those_of_gaussian_matrices(self):
        n, aspect = 200, 3
        dense = torch.randn(600, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = torch.linalg.svdvals(dense).square().flip(0).numpy()
        found = np.mean([gaussian_spectrum(n, aspect, seed) for seed in range(5)], 0)
        np.testing.assert_allclose(found, expected, rtol=0.1)
        assert found.sum() == pytest.approx(n * aspect * n, rel=0.01)

    def test_products_and_logarithms_agree_until_float64_ends(self):
        for n, aspect in ((50, 1), (300, 4), (1000, 1)):
            evals = gaussian_spectrum(n, aspect, 0)
            assert count_by_products(evals) == erg_count(torch.from_numpy(evals)).k
        wide = gaussian_spectrum(4096, 1, 0)
        assert count_by_products(wide) < erg_count(torch.from_numpy(wide)).k

    def test_a_network_does_not_depend_on_those_beside_it(self):
        rates, seeds = (1e-3, 4e-3, 1.6e-2), (3, 5)
        starts, ends, errors = train(rates, seeds, 1, lambda done: None)
        alone_starts, alone_ends, alone_errors = train(rates[1:2], seeds[1:], 1, lambda done: None)
        for layer in range(3):
            assert torch.equal(starts[layer][1, 0], starts[layer][1, 2])
            assert torch.equal(starts[layer][1, 1], alone_starts[layer][0, 0])
            torch.testing.assert_close(ends[layer][1, 1], alone_ends[layer][0, 0], rtol=1e-4, atol=1e-5)
        assert errors[1, 1] == pytest.approx(alone_errors[0, 0], abs=0.005)
        assert (errors[:, 2] < errors[:, 0]).all()

    def test_layers_are_measured_in_place(self):
        start = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(0))
        end = start * torch.arange(1.0, 7.0).reshape(2, 3, 1, 1)
        found = measure(start, end)
        assert found["alpha"] == pytest.approx(found["alpha at the start"])
        growth = found["log norm"] - found["log norm"][0, 0] - 2 * np.log10(np.arange(1, 7).reshape(2, 3))
        norms = start.double().square().sum((-2, -1)).log10()
        assert growth == pytest.approx((norms - norms[0, 0]).numpy())
        assert found["distance from start"][0, 0] == 0


def test_networks_that_are_not_at_hand_are_no_evidence(monkeypatch, tmp_path):
    def missing(repository: str) -> None:
        raise TaskError(f"no data for {repository}")

    monkeypatch.setattr("weightlab.tasks.data.model_file", missing)
    claim = next(claim for claim in CLAIMS if claim.name == "alpha-orders-resnets")
    result = claim.run(ClaimContext("smoke", tmp_path, tmp_path))
    assert result.verdict == "inconclusive"
    assert "no data for akamaster/resnet20-cifar10" in result.measured


def test_smoke_measures_every_claim(tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTLAB_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (outcome,) = reproduce.reproduce(["setol"], "smoke", tmp_path / "record", work=tmp_path / "work")
    assert outcome["failed"] == []
    assert [claim["name"] for claim in outcome["claims"]] == [claim.name for claim in CLAIMS]
    assert all(claim["table"] for claim in outcome["claims"] if claim["name"] != "alpha-orders-resnets")
