"""The examples do what the pages that walk through them say."""

import copy
import itertools
from pathlib import Path

import pytest
import torch

from weightlab import tasks
from weightlab.tasks import load_object
from weightlab.trial import Arm

EXAMPLES = Path(__file__).parents[2] / "examples"


def endless(task, generator):
    return itertools.chain.from_iterable(task.batches("train", generator) for _ in itertools.count())


def train(task, optimizer_of, steps, seed=0):
    """Return the metric before and after `steps` steps, and the trained model."""
    torch.manual_seed(seed)
    model = task.build(torch.Generator().manual_seed(seed))
    optimizer = optimizer_of(model)
    with torch.no_grad():
        before = task.evaluate(model.eval(), "validation")[task.metric]
    model.train()
    for batch in itertools.islice(endless(task, torch.Generator().manual_seed(seed)), steps):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        return before, task.evaluate(model.eval(), "validation")[task.metric], model


def adamw(model):
    return torch.optim.AdamW(model.parameters(), 3e-3)


@pytest.mark.parametrize(
    ("file", "steps", "factor"),
    [("my_task.py", 100, 0.4), ("hf_task.py", 25, 0.75)],
    ids=["mine", "hugging-face"],
)
def test_example_task_trains(file, steps, factor):
    if file == "hf_task.py":
        pytest.importorskip("transformers")
    task = tasks.load(f"{EXAMPLES / file}:task")
    before, after, model = train(task, adamw, steps)
    assert after < factor * before
    task.loss(model, next(iter(task.batches("train", torch.Generator())))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("file", ["my_task.py", "hf_task.py"])
def test_example_batches_depend_on_the_generator_alone(file):
    if file == "hf_task.py":
        pytest.importorskip("transformers")
    task = tasks.load(f"{EXAMPLES / file}:task")

    def first(seed):
        batch = next(iter(task.batches("train", torch.Generator().manual_seed(seed))))
        return batch["input_ids"] if isinstance(batch, dict) else batch[0]

    torch.manual_seed(1)
    one = first(0)
    torch.manual_seed(2)
    assert torch.equal(first(0), one)
    assert not torch.equal(first(1), one)


def test_my_tasks_splits_are_disjoint():
    data = load_object(f"{EXAMPLES}/my_task.py:Tumours")().data
    rows = torch.cat([x for x, _ in data.values()])
    assert len(rows) == len(rows.unique(dim=0)) == 569


def test_my_arm_is_an_arm_whose_optimizer_trains():
    arm = load_object(f"{EXAMPLES}/my_arm.py:arm")
    assert isinstance(arm, Arm)
    assert set(arm.search_space) == {"lr", "weight_decay"}
    chosen = {"lr": 1e-3, "weight_decay": 0.01}
    before, after, _ = train(tasks.get("digits-mlp"), lambda model: arm.optimizer(model, chosen), 100)
    assert after < 0.25 * before


def test_sign_momentums_steps_are_as_its_docstring_says():
    optimizer_class = load_object(f"{EXAMPLES}/my_arm.py:SignMomentum")
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = optimizer_class([weight], lr=0.1, weight_decay=0.5)
    expected, momentum = weight.detach().clone(), torch.zeros(3, dtype=torch.float64)
    for gradient in ([1.0, -1.0, 0.0], [-9.5, -1.0, 2.0], [-1.0, 3.0, -0.1]):
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * weight.grad
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * momentum.sign()
        torch.testing.assert_close(weight.detach(), expected)
    state = copy.deepcopy(optimizer.state_dict())
    assert optimizer.step(lambda: torch.tensor(4.0)) == 4.0
    optimizer.load_state_dict(state)
    torch.testing.assert_close(optimizer.state[weight]["momentum"], momentum)
