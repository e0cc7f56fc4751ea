import json
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightlab.exceptions import UsageError
from weightlab.inspect import DataScores
from weightlab.trial.scoring.page import page, verdict
from weightlab.trial.scoring.pictures import Pictures
from weightlab.trial.scoring.retraining import (
    ALL,
    HARDEST,
    OFFSET,
    RANDOM,
    Choice,
    Recipe,
    Retrained,
    retrain,
)
from weightlab.trial.scoring.sources import Source
from weightlab.trial.statistics import PairedMean

N = 48


def source(test: bool = True) -> Source:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % 3
    inputs = 2 * F.one_hot(labels, 3) + torch.randn(N, 3, generator=generator)
    return Source(
        name="<points>",
        inputs=inputs,
        labels=labels,
        test=(inputs, labels) if test else None,
        build=lambda: nn.Linear(3, 3),
        model="linear",
        identity="",
        classes=("a<b", "c", "d"),
    )


RECIPE = Recipe(pruned=(0.5, 0.25), offset=0.125, seeds=2, epochs=3, batch_size=16)


def run(kept, recipe=RECIPE, **options):
    options = {"seed": 0, "device": torch.device("cpu"), "kept": kept, "tell": lambda *what: None} | options
    return retrain(source(), torch.arange(float(N)), recipe, **options)


class TestChoices:
    def test_indices(self):
        scores = torch.arange(40.0)
        assert Choice(ALL).indices(scores, 0).tolist() == list(range(40))
        assert Choice(HARDEST, 0.25).indices(scores, 0).tolist() == list(range(10, 40))
        assert Choice(OFFSET, 0.25, 0.1).indices(scores, 0).tolist() == list(range(6, 36))
        drawn = Choice(RANDOM, 0.25).indices(scores, 3)
        assert len(drawn.unique()) == 30
        assert torch.equal(drawn, Choice(RANDOM, 0.25).indices(-scores, 3))
        assert not torch.equal(drawn, Choice(RANDOM, 0.25).indices(scores, 4))

    def test_every_share_has_its_control(self):
        names = [choice.name for choice in RECIPE.choices()]
        assert names == [
            "all",
            "hardest, 25 % pruned",
            "random, 25 % pruned",
            "hardest but the top 12.5 %, 25 % pruned",
            "hardest, 50 % pruned",
            "random, 50 % pruned",
            "hardest but the top 12.5 %, 50 % pruned",
        ]

    def test_nothing_left(self):
        with pytest.raises(UsageError, match="pruning 99 % of 3 examples leaves none"):
            Choice(HARDEST, 0.99).indices(torch.zeros(3), 0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"pruned": (0.5, 1.0)}, "above 0 and below 1, e.g. 0.3,0.5; got 1"),
            ({"pruned": (0.2,), "offset": 0.3}, "not above any in --retrain; got 0.3"),
            ({"pruned": (0.2,), "seeds": 0}, "--seeds must be at least 1; got 0"),
            ({"pruned": (0.2,), "epochs": 0}, "--retrain-epochs must be at least 1; got 0"),
        ],
    )
    def test_bad_recipes(self, options, message):
        with pytest.raises(UsageError, match=message):
            Recipe(**options)


class TestRetrain:
    def test_differences_are_paired_by_seed(self, tmp_path):
        rows = run(tmp_path / "kept.jsonl")
        by_name = {row.choice.name: row for row in rows}
        assert [row.examples for row in rows] == [48, 36, 36, 36, 24, 24, 24]
        for row in rows:
            assert row.error == pytest.approx(sum(row.errors) / 2)
            if row.choice.how == ALL:
                assert row.to_all is None
                continue
            gaps = [a - b for a, b in zip(row.errors, by_name["all"].errors, strict=True)]
            assert row.to_all == (PairedMean(gaps).mean, PairedMean(gaps).interval(0.95))
            assert (row.to_random is None) == (row.choice.how == RANDOM)

    def test_every_training_takes_as_many_steps_and_starts_alike(self, tmp_path, monkeypatch):
        seen = []
        from weightlab.trial.scoring import retraining

        def note(model, reader, optimizer, **options):
            seen.append(
                (options["steps"], options["seed"], model.weight.detach().clone(), len(options["indices"]))
            )

        monkeypatch.setattr(retraining, "train", note)
        run(tmp_path / "kept.jsonl")
        assert {steps for steps, *_ in seen} == {3 * 3}
        for first, second in pairwise(seen[:7]):
            assert first[1] == second[1]
            assert torch.equal(first[2], second[2])
        assert seen[0][1] != seen[7][1]
        assert not torch.equal(seen[0][2], seen[7][2])

    def test_broken_off_and_continued_is_the_same(self, tmp_path):
        whole = run(tmp_path / "whole.jsonl")
        count = 0

        def stop(*what):
            nonlocal count
            count += 1
            if count == 65:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "kept.jsonl", tell=stop)
        lines = (tmp_path / "kept.jsonl").read_text().splitlines()
        assert 0 < len(lines) < 14
        (tmp_path / "kept.jsonl").write_text("\n".join(lines) + '\n{"choice": "ra')
        told = []
        assert run(tmp_path / "kept.jsonl", tell=lambda *what: told.append(what)) == whole
        assert told[-1][:2] == (14 * 9, 14 * 9)
        assert [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()] == [
            json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()
        ]

    def test_needs_a_test_set(self, tmp_path):
        with pytest.raises(UsageError, match="<points> has no test set"):
            retrain(
                source(test=False),
                torch.zeros(N),
                RECIPE,
                seed=0,
                device=torch.device("cpu"),
                kept=tmp_path / "kept.jsonl",
                tell=lambda *what: None,
            )


def retrained(how, pruned, to_all=None, to_random=None):
    return Retrained(Choice(how, pruned), 1, (0.1,), 0.1, (0.0, 0.2), to_all, to_random)


class TestVerdict:
    def test_in_words(self):
        rows = [
            retrained(ALL, 0.0),
            retrained(HARDEST, 0.3, (0.0, (-0.1, 0.1)), (-0.2, (-0.3, -0.1))),
            retrained(HARDEST, 0.7, (0.2, (0.1, 0.3)), (0.2, (0.1, 0.3))),
        ]
        said = verdict(rows)
        assert "Without the easiest 30 % the test error is not measurably higher" in said
        assert "At 30 % the hardest are better to train on than a random choice." in said
        assert "At 70 % the hardest are worse" in said
        assert verdict([rows[0], rows[2]]).startswith("Every pruning raised the test error measurably.")
        even = retrained(HARDEST, 0.3, (0.0, (-0.1, 0.1)), (0.0, (-0.1, 0.1)))
        assert "differ from a random choice at no fraction" in verdict([rows[0], even])


class TestPage:
    def scored(self) -> DataScores:
        generator = torch.Generator().manual_seed(0)
        per_run = torch.rand(2, N, generator=generator)
        per_run[:, 7] = torch.inf
        probabilities = torch.full((N, 3), 0.05)
        probabilities[torch.arange(N), torch.arange(N) % 3] = 0.9
        probabilities[7] = torch.tensor([0.9, 0.05, 0.05])
        return DataScores("forgetting", per_run, torch.arange(N) % 3, probabilities)

    def test_tells_names_safely_and_is_the_same_each_time(self, tmp_path):
        def drawn() -> str:
            return page(
                source(),
                {"forgetting": self.scored(), "el2n": self.scored()},
                facts=["facts"],
                show=5,
                retrained=run(tmp_path / "kept.jsonl"),
                recipe=RECIPE,
                notes=["beware"],
                command="weightlab data-scores --out '<x>'",
            )

        text = drawn()
        assert text == drawn()
        assert "a&lt;b" in text
        assert "a<b" not in text
        assert "&lt;x&gt;" in text
        assert "1 of 48 examples looks mislabelled" in text
        assert "1 examples were never classified correctly" in text
        assert "hardest but the top 12.5 %, 50 % pruned" in text
        assert text.count('<figure class="example') == 1 + 5 + 5
        assert "<img" not in text

    def test_without_suspects_or_retraining(self):
        scores = self.scored()
        calm = DataScores("el2n", torch.rand(1, N), scores.targets, F.one_hot(scores.targets, 3).float())
        text = page(source(), {"el2n": calm}, facts=[], show=5)
        assert "None of 48 examples looks mislabelled" in text
        assert "Training without them" not in text
        assert "One run only" in text

    def test_weak_models_do_not_judge(self):
        scores = self.scored()
        weak = DataScores("el2n", torch.rand(1, N), scores.targets, F.one_hot(scores.targets * 0, 3).float())
        text = page(source(), {"el2n": weak}, facts=[], show=5)
        assert "48 examples scored, by models that learned too little to judge labels by" in text


class TestPictures:
    @pytest.mark.parametrize("shape", [(2, 5, 6), (2, 1, 5, 6), (2, 3, 5, 6)])
    def test_bytes_are_shown_as_they_are(self, shape):
        from base64 import b64decode
        from io import BytesIO

        import numpy as np
        from PIL import Image

        pixels = torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        pictures = Pictures(pixels)
        assert pictures.shape == (5, 6)
        image = np.asarray(Image.open(BytesIO(b64decode(pictures.url(1).partition(",")[2]))))
        expected = pixels[1] if len(shape) == 3 else pixels[1].permute(1, 2, 0).squeeze(-1)
        assert np.array_equal(image, expected.numpy())

    def test_floats_and_small_numbers_are_spread(self):
        from base64 import b64decode
        from io import BytesIO

        import numpy as np
        from PIL import Image

        def shown(values):
            return np.asarray(
                Image.open(BytesIO(b64decode(Pictures(values).url(0).partition(",")[2])))
            ).ravel()

        assert shown(torch.tensor([[[-1.0, 0.0, 1.0]]])).tolist() == [0, 128, 255]
        assert shown(torch.tensor([[[4, 8, 16]]], dtype=torch.uint8)).tolist() == [64, 128, 255]
        assert shown(torch.ones(1, 1, 3)).tolist() == [0, 0, 0]

    def test_large_ones_are_scaled_down_and_vectors_are_none(self):
        assert len(Pictures(torch.rand(1, 3, 500, 400)).url(0)) < 80_000
        assert not Pictures(torch.rand(3, 7)).drawn
        assert not Pictures(torch.rand(3, 2, 5, 5)).drawn
