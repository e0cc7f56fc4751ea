from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightlab.train import MultiplicativeGradientNoise, adapt_regime, scale_lr


class TestScaleLR:
    def test_square_root_of_the_paper_s_ratio(self):
        assert scale_lr(1.0, 4096, 128) == pytest.approx(5.656854249492381)

    @pytest.mark.parametrize("rule", ["sqrt", "linear"])
    def test_composes_and_inverts(self, rule: Any):
        once = scale_lr(scale_lr(0.1, 512, 32, rule), 2048, 512, rule)
        assert once == pytest.approx(scale_lr(0.1, 2048, 32, rule))
        assert scale_lr(once, 32, 2048, rule) == pytest.approx(0.1)
        assert scale_lr(0.1, 64, 64, rule) == 0.1

    @pytest.mark.parametrize("rule", ["sqrt", "linear"])
    def test_keeps_the_moment_that_its_rule_is_for(self, rule: Any):
        """Covariance of one update for sqrt, mean displacement of one epoch for linear, on gradients by hand."""
        gradients = torch.randn(1024, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

        def moment(batch: int) -> torch.Tensor:
            lr = scale_lr(0.1, batch, 8, rule)
            if rule == "linear":
                return lr * gradients.mean(0) * (1024 / batch)
            return lr**2 / batch * gradients.T @ gradients / 1024

        torch.testing.assert_close(moment(8), moment(256))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0.0, 2, 1), "lr must be above 0, got 0.0"),
            ((math.nan, 2, 1), "lr must be above 0, got nan"),
            ((0.1, 0, 1), "batch must be at least 1, got 0"),
            ((0.1, 2, -1), "ref_batch must be at least 1, got -1"),
            ((0.1, 2, 1, "cubic"), "rule must be .* got 'cubic'"),
        ],
    )
    def test_bad_input(self, arguments: Any, message: str):
        with pytest.raises(ValueError, match=message):
            scale_lr(*arguments)


class TestAdaptRegime:
    def test_multiplies_every_epoch_by_the_ratio_rounded_up(self):
        assert adapt_regime([81, 122, 164], 200, 1000, 128) == ((648, 976, 1312), 1600)

    @pytest.mark.parametrize("batch", [64, 128])
    def test_batches_up_to_the_reference_keep_it(self, batch: int):
        assert adapt_regime([10, 20], 30, batch, 128) == ((10, 20), 30)

    def test_makes_at_least_as_many_updates_as_the_reference(self):
        examples = 10_000
        for batch in (129, 500, 1024):
            _, epochs = adapt_regime([], 7, batch, 128)
            assert epochs * examples / batch >= 7 * examples / 128

    def test_drives_a_scheduler(self):
        milestones, total = adapt_regime([2, 3], 4, 64, 32)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)
        rates = []
        for _ in range(total):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx([1.0] * 4 + [0.1] * 2 + [0.01] * 2)

    @pytest.mark.parametrize(
        ("milestones", "total", "message"),
        [
            ([3, 2], 5, "must ascend"),
            ([6], 5, "total=5"),
            ([-1], 5, "ascend from 0"),
            ([], 0, "total must be"),
        ],
    )
    def test_bad_input(self, milestones: list[int], total: int, message: str):
        with pytest.raises(ValueError, match=message):
            adapt_regime(milestones, total, 64, 32)


class TestMultiplicativeGradientNoise:
    def test_large_batch_gradient_has_the_small_batch_s_covariance(self):
        """Where the mean gradient vanishes; by many draws, against the covariance computed from single gradients."""
        generator = torch.Generator().manual_seed(0)
        gradients = torch.randn(64, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 3.0])
        gradients -= gradients.mean(0)
        criterion = MultiplicativeGradientNoise(64, 4, generator)
        draws = []
        for _ in range(4000):
            batch = gradients[torch.randint(64, (64,), generator=generator)]
            weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            criterion(batch @ weight).backward()
            draws.append(weight.grad)
        drawn = torch.stack(draws)
        expected = gradients.T @ gradients / 64 / 4
        assert drawn.mean(0).abs().max() < 4 * expected.diagonal().max().sqrt() / math.sqrt(4000)
        torch.testing.assert_close(drawn.T.cov(), expected, rtol=0.1, atol=0.1)

    def test_is_the_plain_mean_without_a_ratio_and_in_evaluation(self):
        losses = torch.rand(6)
        assert MultiplicativeGradientNoise(6, 6)(losses) == losses.mean()
        assert MultiplicativeGradientNoise(6, 2).eval()(losses) == losses.mean()

    def test_draws_from_its_generator_alone(self):
        losses = F.cross_entropy(torch.randn(5, 3), torch.zeros(5, dtype=torch.long), reduction="none")
        values = [
            MultiplicativeGradientNoise(5, 1, torch.Generator().manual_seed(seed))(losses)
            for seed in (1, 1, 2)
        ]
        assert values[0] == values[1] != values[2]

    def test_bad_input(self):
        with pytest.raises(ValueError, match="ref_batch=8 is above batch=4"):
            MultiplicativeGradientNoise(4, 8)
        with pytest.raises(ValueError, match=r"shape \(B,\), got \(\).*reduction"):
            MultiplicativeGradientNoise(4, 2)(torch.tensor(1.0))
