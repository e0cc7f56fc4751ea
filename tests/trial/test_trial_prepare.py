"""`Arm.prepare`: what it is given, when, and that training does not notice."""

import itertools

import pytest
import torch
from small_task import Regression, sgd_arm
from torch import nn

from weightlab.exceptions import MissingDependencyError
from weightlab.trial import registry
from weightlab.trial.hashing import derive_seed
from weightlab.trial.runner import execute
from weightlab.trial.spec import Job, RunSpec


def run(arm, task=None, seed=0, **hyperparameters):
    task = task or Regression()
    spec = RunSpec(
        task.name, "", arm.name, "", hyperparameters or {"lr": 0.02}, seed, "test", 12, 3, 8, 1, "cpu", {}
    )
    return execute(Job(spec, registry.keep(task), registry.keep(arm)))


def looking(count, seen=None):
    """An arm that takes batches, goes backward, and changes nothing."""

    def prepare(model, hyperparameters, batches, loss):
        taken = list(itertools.islice(batches, count))
        for batch in taken:
            loss(model, batch).backward()
        if seen is not None:
            seen.extend(taken)

    return sgd_arm("looking", prepare=prepare)


def test_looking_at_data_changes_nothing():
    plain = run(sgd_arm())
    for count in (0, 3, 40):
        looked = run(looking(count))
        assert looked.status == "ok"
        assert (looked.weights_hash, looked.data_hash) == (plain.weights_hash, plain.data_hash)
        assert [p.metric for p in looked.curve] == [p.metric for p in plain.curve]
        assert [p.train_loss for p in looked.curve] == [p.train_loss for p in plain.curve]


def test_batches_are_the_training_splits_in_an_order_of_their_own():
    seen, task = [], Regression()
    run(looking(20, seen), seed=3)
    generator = torch.Generator().manual_seed(derive_seed(3, "prepare"))
    epochs = [batch for _ in range(3) for batch in task.batches("train", generator)]
    assert len(epochs) == 24
    for (x, y), (a, b) in zip(seen, epochs, strict=False):
        assert torch.equal(x, a)
        assert torch.equal(y, b)
    ordered = next(iter(task.batches("train", torch.Generator().manual_seed(derive_seed(3, "data")))))
    assert not torch.equal(seen[0][0], ordered[0])


def test_the_order_of_preparations_is_transform_init_prepare_optimizer():
    calls = []

    def transform(model, hyperparameters):
        calls.append("transform")
        return nn.Sequential(model)

    def init(model, hyperparameters, generator):
        calls.append("init")
        with torch.no_grad():
            model[0][0].weight.fill_(0.25)

    def prepare(model, hyperparameters, batches, loss):
        calls.append("prepare")
        assert torch.equal(model[0][0].weight, torch.full((8, 4), 0.25))
        assert hyperparameters == {"lr": 0.02, "extra": 7}
        with torch.no_grad():
            model[0][3].bias.fill_(3.0)

    plain = sgd_arm()

    def optimizer(model, hyperparameters):
        calls.append("optimizer")
        assert model[0][3].bias.item() == 3.0
        return plain.optimizer(model, hyperparameters)

    arm = sgd_arm("all", transform=transform, init=init, prepare=prepare)
    arm = type(arm)(**{**vars(arm), "optimizer": optimizer, "defaults": {"lr": 1.0, "extra": 7}})
    assert run(arm).status == "ok"
    assert calls == ["transform", "init", "prepare", "optimizer"]


def test_its_time_is_set_up_and_not_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("weightlab.trial.runner.perf_counter", lambda: now[0])

    def prepare(model, hyperparameters, batches, loss):
        now[0] += 100.0

    result = run(sgd_arm("slow", prepare=prepare))
    assert result.total_seconds == 100.0
    assert not result.train_seconds


def test_a_failure_is_the_arms_unless_something_is_missing():
    def fail(model, hyperparameters, batches, loss):
        raise ValueError("no component")

    result = run(sgd_arm("failing", prepare=fail))
    assert (result.status, result.error) == ("error", "ValueError: no component")

    def lack(model, hyperparameters, batches, loss):
        raise MissingDependencyError("peft is not installed")

    with pytest.raises(MissingDependencyError):
        run(sgd_arm("lacking", prepare=lack))


def test_whatever_set_up_draws_dropout_is_the_same():
    def shaken(model, hyperparameters, batches, loss):
        torch.rand(5)
        model.train()
        loss(model, next(batches))

    def shake(model, hyperparameters):
        torch.rand(5)
        return model

    plain = run(sgd_arm())
    for changes in ({"prepare": shaken}, {"transform": shake}):
        assert run(sgd_arm("shaken", **changes)).metrics == plain.metrics
