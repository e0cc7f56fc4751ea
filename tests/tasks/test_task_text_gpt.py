import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightlab import tasks
from weightlab.exceptions import TaskError
from weightlab.tasks import DocsGPT, TextGPT
from weightlab.tasks.data import ALPHABET_SIZE


class Counting(TextGPT):
    """Text whose every symbol tells its place, so that windows can be checked."""

    name = "counting"
    lengths = {"train": 90, "validation": 60, "test": 50}  # noqa: RUF012

    def text(self, split):
        return torch.arange(self.lengths[split], dtype=torch.uint8)


def counting(**options):
    return Counting(
        **{"width": 8, "depth": 1, "heads": 2, "context": 7, "steps": 5, "batch_size": 4, **options}
    )


class Uniform(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, symbols):
        return self.scale * torch.zeros(*symbols.shape, ALPHABET_SIZE)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_batches_are_windows_of_the_text_and_reach_both_ends():
    seen = set()
    for batch in itertools.islice(counting().batches("train", seeded(0)), 200):
        assert batch.dtype == torch.int64
        assert batch.shape == (4, 8)
        assert (batch.diff(dim=1) == 1).all()
        seen |= set(batch.flatten().tolist())
    assert seen == set(range(90))


def test_batches_depend_on_the_generator_alone():
    task = counting()

    def first(seed):
        return torch.stack(list(itertools.islice(task.batches("train", seeded(seed)), 5)))

    torch.manual_seed(1)
    one = first(0)
    torch.manual_seed(2)
    assert torch.equal(first(0), one)
    assert not torch.equal(first(1), one)


def test_loss_and_evaluation_of_a_uniform_guess():
    task, model = counting(), Uniform()
    batch = next(task.batches("train", seeded(0)))
    assert task.loss(model, batch).item() == pytest.approx(math.log(ALPHABET_SIZE))
    assert task.evaluate(model, "test")["loss"] == pytest.approx(math.log(ALPHABET_SIZE))


@pytest.mark.parametrize("eval_characters", [7, 20, 49, 10_000])
def test_evaluation_covers_windows_spread_evenly_without_overlap(eval_characters):
    task = counting(eval_characters=eval_characters)
    seen = []

    class Recorder(Uniform):
        def forward(self, symbols):
            seen.append(symbols)
            return super().forward(symbols)

    task.evaluate(Recorder(), "test")
    inputs = torch.cat(seen)
    assert len(inputs) == min(eval_characters, 49) // 7
    assert (inputs.diff(dim=1) == 1).all()
    assert len(set(inputs.flatten().tolist())) == inputs.numel()
    assert inputs[0, 0] == 0
    if len(inputs) > 1:
        assert inputs[-1, -1] == 48


def test_evaluation_is_the_mean_over_characters_and_ignores_random_state():
    task = counting(eval_characters=49)
    model = task.build(seeded(0)).eval()
    text = task.text("test").long()
    with torch.no_grad():
        windows = [text[i * 7 : i * 7 + 8] for i in range(7)]
        expected = torch.stack(
            [F.cross_entropy(model(w[None, :-1])[0].double(), w[1:], reduction="none") for w in windows]
        ).mean()
        torch.manual_seed(1)
        one = task.evaluate(model, "test")
        state = torch.get_rng_state()
        assert task.evaluate(model, "test") == one
    assert torch.equal(torch.get_rng_state(), state)
    assert one["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_text_shorter_than_the_context_is_refused():
    with pytest.raises(TaskError, match="the test text has 50 characters, too few for context 50"):
        counting(context=50).evaluate(Uniform(), "test")


def test_fingerprint_follows_text_and_settings():
    class Other(Counting):
        lengths = {"train": 91, "validation": 60, "test": 50}  # noqa: RUF012

    base = counting().fingerprint()
    assert counting().fingerprint() == base
    assert counting(width=16).fingerprint() != base
    assert counting(eval_characters=7).fingerprint() != base
    other = Other(width=8, depth=1, heads=2, context=7, steps=5, batch_size=4)
    assert other.fingerprint() != base


def test_docs_gpt_learns():
    task = DocsGPT(width=32, depth=1, steps=60)
    model = task.build(seeded(0))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with torch.no_grad():
        before = task.evaluate(model, "validation")["loss"]
    for batch in itertools.islice(task.batches("train", seeded(1)), task.steps):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        after = task.evaluate(model, "validation")["loss"]
    assert before > 4.5
    assert after < 2.8


def test_docs_gpt_fits_the_demo():
    task = tasks.get("docs-gpt")
    assert isinstance(task, DocsGPT)
    assert (task.metric, task.mode, task.batch_size) == ("loss", "min", 32)
    assert sum(p.numel() for p in task.build(seeded(0)).parameters()) < 130_000
