import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weightlab.inspect import el2n, example_loss, logit_margin, prediction_margin

ALL = (el2n, prediction_margin, logit_margin, example_loss)


def drawn(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator)


class TestClosedForms:
    @pytest.mark.parametrize("classes", [2, 3, 10, 1000])
    def test_uniform(self, classes: int):
        logits, target = torch.full((1, classes), 7.0, dtype=torch.float64), torch.tensor([classes - 1])
        assert el2n(logits, target).item() == pytest.approx(math.sqrt(1 - 1 / classes), rel=1e-12)
        assert example_loss(logits, target).item() == pytest.approx(math.log(classes), rel=1e-12)
        assert prediction_margin(logits, target).item() == pytest.approx(0, abs=1e-15)
        assert logit_margin(logits, target).item() == 0

    def test_perfect_and_confidently_wrong(self):
        logits = torch.tensor([[200.0, 0.0, 0.0], [200.0, 0.0, 0.0]])
        targets = torch.tensor([0, 1])
        torch.testing.assert_close(el2n(logits, targets), torch.tensor([0.0, math.sqrt(2)]))
        torch.testing.assert_close(prediction_margin(logits, targets), torch.tensor([-1.0, 1.0]))
        torch.testing.assert_close(logit_margin(logits, targets), torch.tensor([200.0, -200.0]))

    def test_learned_examples_do_not_tie(self):
        logits = torch.tensor([[40.0, 0.0], [41.0, 0.0], [80.0, 0.0]])
        scores = el2n(logits, torch.zeros(3, dtype=torch.int64))
        expected = math.sqrt(2) * torch.sigmoid(torch.tensor([-40.0, -41.0, -80.0], dtype=torch.float64))
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=0)


class TestReference:
    @given(seed=st.integers(0, 10_000), classes=st.integers(2, 12))
    def test_as_defined(self, seed: int, classes: int):
        logits, targets = drawn(seed, 3, 5, classes)
        p = logits.exp() / logits.exp().sum(-1, keepdim=True)
        y = torch.nn.functional.one_hot(targets, classes).double()
        own, rest = (p * y).sum(-1), p - 2 * y
        torch.testing.assert_close(el2n(logits, targets), ((p - y) ** 2).sum(-1).sqrt())
        torch.testing.assert_close(prediction_margin(logits, targets), rest.amax(-1) - own)
        torch.testing.assert_close(example_loss(logits, targets), -own.log())
        others = (logits - 1e9 * y).amax(-1)
        torch.testing.assert_close(logit_margin(logits, targets), (logits * y).sum(-1) - others)

    @given(seed=st.integers(0, 10_000), classes=st.integers(2, 12))
    def test_official_sum_margin_and_l1_error_rank_as_the_loss(self, seed: int, classes: int):
        logits, targets = drawn(seed, 6, classes)
        p = logits.softmax(-1)
        own = p.gather(1, targets[:, None])
        torch.testing.assert_close((p - own).sum(1), 1 - classes * own[:, 0])
        y = torch.nn.functional.one_hot(targets, classes)
        torch.testing.assert_close((p - y).abs().sum(1), 2 * (1 - own[:, 0]))

    def test_last_layers_gradient_is_el2n_times_the_features(self):
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(1, 6, dtype=torch.float64, generator=generator)
        layer = torch.nn.Linear(6, 4, dtype=torch.float64)
        torch.nn.functional.cross_entropy(layer(features), torch.tensor([2])).backward()
        assert layer.weight.grad is not None
        assert layer.bias.grad is not None
        norm = (layer.weight.grad.square().sum() + layer.bias.grad.square().sum()).sqrt()
        expected = el2n(layer(features), torch.tensor([2])) * (features.square().sum() + 1).sqrt()
        torch.testing.assert_close(norm, expected[0])

    def test_gradcheck(self):
        logits, targets = drawn(3, 4, 3)
        logits.requires_grad_()
        for score in ALL:
            assert torch.autograd.gradcheck(lambda z, score=score: score(z, targets), logits)


class TestForms:
    @pytest.mark.parametrize("score", ALL)
    def test_targets_broadcast_over_runs(self, score):
        logits, targets = drawn(0, 3, 5, 4)
        expected = torch.stack([score(run, targets[0]) for run in logits])
        assert torch.equal(score(logits, targets[0]), expected)

    @pytest.mark.parametrize("score", ALL)
    def test_one_example_and_none(self, score):
        logits, targets = drawn(0, 5, 4)
        torch.testing.assert_close(score(logits[2], targets[2]), score(logits, targets)[2])
        assert score(logits[:0], targets[:0]).shape == (0,)

    @pytest.mark.parametrize("score", ALL)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_float32(self, score, dtype: torch.dtype):
        logits, targets = drawn(1, 5, 4)
        half = (10 * logits).to(dtype)
        assert torch.equal(score(half, targets), score(half.float(), targets))

    @pytest.mark.parametrize("score", ALL)
    def test_not_contiguous(self, score):
        logits, targets = drawn(1, 4, 5)
        strided = logits.mT.contiguous().mT
        assert not strided.is_contiguous()
        assert torch.equal(score(strided, targets), score(logits, targets))

    @pytest.mark.parametrize("score", ALL)
    def test_compiles_in_one_graph(self, score):
        logits, targets = drawn(1, 4, 5)
        compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logits, targets), score(logits, targets))


class TestBadInput:
    @pytest.mark.parametrize("score", ALL)
    @pytest.mark.parametrize(
        ("logits", "targets", "error", "message"),
        [
            (torch.zeros(2, 3), torch.tensor([0, -1]), ValueError, r"in \[0, 3\), got -1"),
            (torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, r"in \[0, 3\), got 3"),
            (torch.zeros(2, 1), torch.tensor([0, 0]), ValueError, "at least 2 classes"),
            (torch.zeros(2, 3), torch.tensor([0, 0, 0]), ValueError, r"shape \(2,\), got \(3,\)"),
            (torch.zeros(2, 3), torch.tensor([0.0, 0.0]), TypeError, "integer classes, got torch.float32"),
            (torch.zeros(2, 3).int(), torch.tensor([0, 0]), TypeError, "floating, got torch.int32"),
        ],
    )
    def test_refused(self, score, logits: Tensor, targets: Tensor, error: type[Exception], message: str):
        with pytest.raises(error, match=message):
            score(logits, targets)
