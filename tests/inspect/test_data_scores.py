import csv
import io
import math
import warnings

import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from weightlab.exceptions import WeightlabError
from weightlab.inspect import DataScores, data_scores, el2n, rank_correlation, score_examples

N, CLASSES = 60, 3


def blobs(seed: int = 0, n: int = N) -> tuple[Tensor, Tensor]:
    """Three clouds of points; examples 0 to 4 have a wrong label."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % CLASSES
    inputs = 4 * F.one_hot(targets, CLASSES) + 0.7 * torch.randn(n, CLASSES, generator=generator)
    targets[:5] = (targets[:5] + 1) % CLASSES
    return inputs, targets


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(CLASSES, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Linear(CLASSES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, CLASSES)
    )


class Items(Dataset):
    """The points one by one; with `noise`, differently each time."""

    def __init__(self, noise: float = 0.0):
        self.inputs, self.targets = blobs()
        self.noise = noise

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int):
        return self.inputs[index] + self.noise * torch.randn(CLASSES), int(self.targets[index])


QUICK = {"runs": 2, "epochs": 3, "batch_size": 16}
TRAINED = ("el2n", "grand", "margin", "loss", "forgetting", "aum")


class TestScoreExamples:
    def test_are_those_of_the_logits(self):
        model, (inputs, targets) = perceptron(), blobs()
        found = score_examples(model, (inputs, targets), ["el2n", "loss"], batch_size=7)
        logits = model(inputs).detach()
        torch.testing.assert_close(found["el2n"], el2n(logits, targets))
        torch.testing.assert_close(found["loss"], F.cross_entropy(logits, targets, reduction="none"))
        torch.testing.assert_close(found["probabilities"], logits.softmax(-1))
        assert torch.equal(found["targets"], targets)

    def test_grand_is_the_norm_of_the_gradient(self):
        model, (inputs, targets) = normalised().eval(), blobs()
        found = score_examples(model, (inputs, targets), ["grand"])["grand"]
        for index in (0, 7, 59):
            model.zero_grad()
            F.cross_entropy(model(inputs[index : index + 1]), targets[index : index + 1]).backward()
            squares = sum(parameter.grad.square().sum() for parameter in model.parameters())
            torch.testing.assert_close(found[index], squares.sqrt())

    def test_model_is_left_as_it_was(self):
        model = normalised()
        model[1].eval()
        model(blobs()[0]).sum().backward()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        modes = [module.training for module in model.modules()]
        score_examples(model, blobs(), ["el2n", "grand", "margin"])
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert torch.equal(parameter.grad, gradient)
        assert [module.training for module in model.modules()] == modes

    def test_batch_size_and_dropout_do_not_matter(self):
        model = normalised()
        first, second = (score_examples(model, blobs(), batch_size=size)["el2n"] for size in (1, 60))
        torch.testing.assert_close(first, second)

    def test_permuting_the_data_permutes_the_scores(self):
        model, (inputs, targets) = perceptron(), blobs()
        order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
        first = score_examples(model, (inputs, targets))["el2n"]
        second = score_examples(model, (inputs[order], targets[order]))["el2n"]
        torch.testing.assert_close(first[order], second)

    def test_half_precision_models(self):
        model = perceptron().bfloat16()
        inputs, targets = blobs()
        scores = score_examples(model, (inputs.bfloat16(), targets))["el2n"]
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, el2n(model(inputs.bfloat16()), targets).detach())

    def test_refuses_scores_of_a_training(self):
        with pytest.raises(ValueError, match="forgetting is a score of a whole training; data_scores has it"):
            score_examples(perceptron(), blobs(), ["forgetting"])

    def test_names_examples_whose_logits_are_not_finite(self):
        inputs, targets = blobs()
        inputs[17] = torch.nan
        with pytest.raises(ValueError, match="logits of example 17 are not finite"):
            score_examples(perceptron(), (inputs, targets), batch_size=8)

    def test_says_where_a_label_is_out_of_range(self):
        inputs, targets = blobs()
        targets[9] = -1
        with pytest.raises(ValueError, match=r"examples 8 to 15: targets must be in \[0, 3\), got -1"):
            score_examples(perceptron(), (inputs, targets), batch_size=8)


class TestDataScores:
    def test_wrong_labels_are_the_hardest(self):
        found = data_scores(
            perceptron, blobs(), ["el2n", "grand", "margin", "loss", "aum"], runs=3, epochs=30, batch_size=16
        )
        for scores in found.values():
            assert set(scores.order()[:5].tolist()) == set(range(5))
            assert scores.suspicion[:5].min() > scores.suspicion[5:].max()

    def test_a_lone_score_equals_that_among_several(self):
        lone = data_scores(perceptron, blobs(), "margin", **QUICK)
        several = data_scores(perceptron, blobs(), TRAINED, **QUICK)
        assert isinstance(lone, DataScores)
        assert list(several) == list(TRAINED)
        assert torch.equal(lone.per_run, several["margin"].per_run)

    def test_seed_decides_everything(self):
        torch.manual_seed(1)
        first = data_scores(normalised, blobs(), **QUICK)
        state = torch.get_rng_state()
        torch.manual_seed(2)
        second = data_scores(normalised, blobs(), **QUICK)
        other = data_scores(normalised, blobs(), seed=1, **QUICK)
        assert torch.equal(first.per_run, second.per_run)
        assert not torch.equal(first.per_run, other.per_run)
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), state)

    def test_runs_differ_and_do_not_depend_on_how_many_there_are(self):
        two = data_scores(perceptron, blobs(), runs=2, epochs=2)
        three = data_scores(perceptron, blobs(), runs=3, epochs=2)
        assert torch.equal(two.per_run, three.per_run[:2])
        assert not torch.equal(two.per_run[0], two.per_run[1])
        torch.testing.assert_close(three.scores, three.per_run.mean(0))

    @pytest.mark.parametrize("form", [TensorDataset(*blobs()), Items()])
    def test_data_sets_score_as_tensors_do(self, form):
        expected = data_scores(perceptron, blobs(), TRAINED, **QUICK)
        found = data_scores(perceptron, form, TRAINED, **QUICK)
        for name in TRAINED:
            assert torch.equal(found[name].per_run, expected[name].per_run)

    def test_is_the_training_it_says(self):
        """The same by hand: one batch an epoch needs no order."""
        inputs, targets = blobs()
        scores = data_scores(
            lambda: _constant(perceptron()), (inputs, targets), runs=1, epochs=4, batch_size=N
        )
        model = _constant(perceptron())
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        torch.testing.assert_close(scores.scores, el2n(model(inputs), targets).detach())

    def test_each_epoch_sees_each_example_once(self):
        seen: list[int] = []

        def note(batch: Tensor, generator: torch.Generator) -> Tensor:
            seen.append(len(batch))
            return batch

        data_scores(perceptron, blobs(), runs=1, epochs=2, batch_size=59, augment=note)
        assert seen == [30, 30, 30, 30]

    def test_optimizer(self):
        default = data_scores(perceptron, blobs(), lr=0.02, **QUICK)

        def same(model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.SGD(
                model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4
            )

        assert torch.equal(default.per_run, data_scores(perceptron, blobs(), optimizer=same, **QUICK).per_run)

    def test_tells_of_every_batch(self):
        told: list[tuple[int, int, str]] = []
        data_scores(perceptron, blobs(), tell=lambda *what: told.append(what), **QUICK)
        assert {total for _, total, _ in told} == {2 * (3 + 1) * 4}
        assert [done for done, _, _ in told] == [*range(17), *range(16, 33)]
        assert told[-1][2] == "run 2 of 2"


def _constant(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


class TestAugmentation:
    def test_is_trained_on_and_not_scored(self):
        shifted = data_scores(
            lambda: _constant(perceptron()), blobs(), augment=lambda x, generator: x + 5, lr=1e-12, **QUICK
        )
        plain = score_examples(_constant(perceptron()), blobs())["el2n"]
        torch.testing.assert_close(shifted.scores, plain)

    def test_draws_from_the_seed(self):
        def jitter(inputs: Tensor, generator: torch.Generator) -> Tensor:
            return inputs + torch.randn(inputs.shape, generator=generator)

        first, second = (data_scores(perceptron, blobs(), augment=jitter, **QUICK) for _ in range(2))
        assert torch.equal(first.per_run, second.per_run)
        assert not torch.equal(first.per_run, data_scores(perceptron, blobs(), **QUICK).per_run)

    def test_random_data_sets_need_a_view_without_it(self):
        with pytest.raises(ValueError, match=r"gives example 0 differently each time; .*training_view"):
            data_scores(perceptron, Items(noise=0.1), **QUICK)
        first, second = (
            data_scores(perceptron, Items(), training_view=Items(noise=0.1), **QUICK) for _ in range(2)
        )
        assert torch.equal(first.per_run, second.per_run)
        with pytest.raises(ValueError, match="training_view has 9 examples, dataset 60"):
            data_scores(perceptron, Items(), training_view=blobs(n=9), **QUICK)


class TestFolder:
    def test_broken_off_and_continued_is_the_same(self, tmp_path):
        whole = data_scores(normalised, blobs(), TRAINED, runs=3, epochs=2)
        made = 0

        def interrupted() -> nn.Module:
            nonlocal made
            made += 1
            if made == 3:
                raise KeyboardInterrupt
            return normalised()

        with pytest.raises(KeyboardInterrupt):
            data_scores(interrupted, blobs(), TRAINED, runs=3, epochs=2, folder=tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "run-000.safetensors",
            "run-001.safetensors",
        ]
        made = 3
        resumed = data_scores(interrupted, blobs(), TRAINED, runs=3, epochs=2, folder=tmp_path)
        assert made == 4
        for name in TRAINED:
            assert torch.equal(resumed[name].per_run, whole[name].per_run)
            assert torch.equal(resumed[name].probabilities, whole[name].probabilities)

    def test_other_settings_are_refused(self, tmp_path):
        data_scores(perceptron, blobs(), runs=1, epochs=1, folder=tmp_path)
        with pytest.raises(ValueError, match=r"run-000.safetensors is a run with epochs=1, not 2"):
            data_scores(perceptron, blobs(), runs=1, epochs=2, folder=tmp_path)

    def test_other_labels_and_other_files_are_refused(self, tmp_path):
        data_scores(perceptron, blobs(), runs=1, epochs=1, folder=tmp_path)
        inputs, targets = blobs()
        with pytest.raises(ValueError, match="the runs are of other labels"):
            data_scores(perceptron, (inputs, targets.flip(0)), runs=2, epochs=1, folder=tmp_path)
        save_file({"x": torch.zeros(1)}, tmp_path / "run-000.safetensors")
        with pytest.raises(ValueError, match="examples=None, not 60"):
            data_scores(perceptron, blobs(), runs=1, epochs=1, folder=tmp_path)
        (tmp_path / "run-000.safetensors").write_bytes(b"no tensors")
        with pytest.raises(ValueError, match=r"is no run that data_scores kept .*; delete it"):
            data_scores(perceptron, blobs(), runs=1, epochs=1, folder=tmp_path)

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(WeightlabError, match="cannot write"):
            data_scores(perceptron, blobs(), runs=1, epochs=1, folder=tmp_path / "file")


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"runs": 0}, "runs must be at least 1, got 0"),
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"epochs": -1}, "epochs must not be negative, got -1"),
            ({"epochs": 0, "score": "aum"}, "aum is a score of training; epochs must be at least 1"),
            ({"score": "el3n"}, "score must be of el2n, grand, forgetting, margin, loss, aum, got 'el3n'"),
            ({"score": []}, "score names none"),
        ],
    )
    def test_options(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            data_scores(perceptron, blobs(), **arguments)

    @pytest.mark.parametrize(
        ("data", "error", "message"),
        [
            ((torch.zeros(0, 3), torch.zeros(0).long()), ValueError, "no examples"),
            ((torch.zeros(3, 3), torch.zeros(2).long()), ValueError, "3 inputs and 2 targets"),
            ((torch.zeros(3, 3), torch.zeros(3)), TypeError, "integer classes, got torch.float32"),
            ((torch.zeros(3, 3), [0, 0, 0]), TypeError, "pair of tensors"),
            ([torch.zeros(3), torch.zeros(3)], TypeError, r"must be a pair \(input, label\)"),
            (3, TypeError, "have __len__ and __getitem__, got int"),
        ],
    )
    def test_data(self, data, error, message):
        with pytest.raises(error, match=message):
            data_scores(perceptron, data, **QUICK)

    def test_streams(self):
        class Stream(IterableDataset):
            def __iter__(self):
                yield torch.zeros(3), 0

        with pytest.raises(TypeError, match="got Stream: scores are kept by index"):
            data_scores(perceptron, Stream(), **QUICK)

    def test_labels_out_of_range_in_training(self):
        inputs, targets = blobs()
        targets[9] = 3
        with pytest.raises(ValueError, match=r"targets must be in \[0, 3\), got 3"):
            data_scores(perceptron, (inputs, targets), **QUICK)

    def test_the_same_model_twice(self):
        model = perceptron()
        with pytest.raises(ValueError, match="model_fn gave the same model twice"):
            data_scores(lambda: model, blobs(), **QUICK)

    def test_training_that_blows_up(self):
        with pytest.raises(
            WeightlabError, match=r"not finite within \d+ steps; lower the learning rate \(now 1e\+30\)"
        ):
            data_scores(perceptron, blobs(), lr=1e30, **QUICK)

    def test_untrained_networks_are_no_evidence(self):
        with pytest.warns(UserWarning, match=r"no evidence of which examples matter.*2303\.14753"):
            scores = data_scores(lambda: _constant(perceptron()), blobs(), runs=1, epochs=0)
        expected = score_examples(_constant(perceptron()), blobs())["el2n"]
        assert torch.equal(scores.scores, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data_scores(perceptron, blobs(), runs=1, epochs=1)


class TestResult:
    def result(self) -> DataScores:
        per_run = torch.tensor([[0.5, math.inf, 0.25, 0.5], [0.5, 0.0, 0.75, 0.5]])
        probabilities = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5], [0.4, 0.35, 0.25]])
        return DataScores("forgetting", per_run, torch.tensor([0, 0, 2, 1]), probabilities)

    def test_numbers(self):
        result = self.result()
        assert result.scores.tolist() == [0.5, math.inf, 0.5, 0.5]
        assert result.order().tolist() == [1, 3, 2, 0]
        assert result.rank().tolist() == [4, 1, 3, 2]
        assert result.predicted.tolist() == [0, 1, 2, 0]
        torch.testing.assert_close(result.margin, torch.tensor([-0.4, 0.5, -0.2, 0.05]))
        torch.testing.assert_close(result.suspicion, torch.tensor([0.0, 0.5, 0.0, 0.05 * 3 / 4]))

    def test_csv(self, tmp_path):
        result = self.result()
        text = result.to_csv(tmp_path / "scores.csv")
        assert (tmp_path / "scores.csv").read_text() == text
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [int(row["index"]) for row in rows] == result.order().tolist()
        assert [int(row["rank"]) for row in rows] == [1, 2, 3, 4]
        first = rows[0]
        assert (float(first["score"]), first["label"], first["predicted"]) == (math.inf, "0", "1")
        assert float(first["margin"]) == pytest.approx(0.5)

    def test_table_and_plot(self):
        result = self.result()
        assert result.table(rows=2).row_count == 2
        (axes,) = result.plot().axes
        assert axes.get_ylabel() == "forgetting"

    def test_agreement(self):
        generator = torch.Generator().manual_seed(0)
        per_run = torch.randn(3, 20, generator=generator)
        runs = per_run.numpy()
        expected = [spearmanr(runs[k], sum(runs[j] for j in range(3) if j != k)).statistic for k in range(3)]
        targets, probabilities = torch.zeros(20, dtype=torch.int64), torch.ones(20, 2) / 2
        found = DataScores("el2n", per_run, targets, probabilities).agreement()
        assert found == pytest.approx(sum(expected) / 3)
        assert math.isnan(DataScores("el2n", per_run[:1], targets, probabilities).agreement())

    def test_rank_correlation_is_spearmans_with_ties(self):
        generator = torch.Generator().manual_seed(0)
        first, second = torch.randint(6, (2, 40), generator=generator).float()
        assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
        assert math.isnan(rank_correlation(first, torch.ones(40)))

    def test_shapes_are_checked(self):
        with pytest.raises(ValueError, match=r"per_run must be \(runs, N\)"):
            DataScores("el2n", torch.zeros(3), torch.zeros(3), torch.zeros(3, 2))
        with pytest.raises(ValueError, match=r"targets must be \(3,\)"):
            DataScores("el2n", torch.zeros(1, 3), torch.zeros(2), torch.zeros(3, 2))
