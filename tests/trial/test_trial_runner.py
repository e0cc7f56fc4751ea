import math

import pytest
import torch
from small_task import Regression, sgd_arm
from torch import nn

from weightlab.exceptions import TaskError
from weightlab.trial import registry
from weightlab.trial.arm import warmup_linear
from weightlab.trial.hashing import BatchHash, derive_seed, hash_tensors
from weightlab.trial.memory import state_size
from weightlab.trial.runner import evaluate, evaluation_steps, execute
from weightlab.trial.spec import Job, RunResult, RunSpec


def job(task=None, arm=None, *, seed=0, steps=12, points=3, split="test", threads=1, **hyperparameters):
    task, arm = task or Regression(), arm or sgd_arm()
    spec = RunSpec(
        task.name,
        "",
        arm.name,
        "",
        hyperparameters or {"lr": 0.02},
        seed,
        split,
        steps,
        points,
        8,
        threads,
        "cpu",
        {},
    )
    return Job(spec, registry.keep(task), registry.keep(arm))


def reference(seed, steps, points, lr):
    """The same run written out plainly, sharing only the seeds' derivation with the engine."""
    task = Regression()
    torch.manual_seed(derive_seed(seed, "weights"))
    model = task.build(torch.Generator().manual_seed(derive_seed(seed, "weights")))
    data = torch.Generator().manual_seed(derive_seed(seed, "data"))
    torch.manual_seed(derive_seed(seed, "training"))
    batches = []
    while len(batches) < steps:
        batches += list(task.batches("train", data))
    curve = []
    for step in range(steps):
        model.train()
        loss = task.loss(model, batches[step])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= lr * warmup_linear(step, steps, {}) * g
        if (step + 1) % (steps // points) == 0:
            model.eval()
            with torch.no_grad():
                curve.append(task.evaluate(model, "test")["error"])
    return curve


def test_a_run_equals_the_plain_loop_bit_for_bit():
    result = execute(job(seed=3, steps=12, points=3))
    assert result.status == "ok"
    assert [point.metric for point in result.curve[1:]] == reference(3, 12, 3, 0.02)
    assert result.metrics["error"] == result.curve[-1].metric
    assert [point.step for point in result.curve] == [0, 4, 8, 12]


def test_runs_repeat_and_seeds_differ():
    first, again, other = execute(job(seed=1)), execute(job(seed=1)), execute(job(seed=2))
    assert first.metrics == again.metrics
    assert (first.weights_hash, first.data_hash) == (again.weights_hash, again.data_hash)
    assert first.weights_hash != other.weights_hash
    assert first.data_hash != other.data_hash


def test_arms_share_initial_weights_and_batches_whatever_they_draw():
    def shaken(model, hyperparameters, generator):
        torch.rand(5)
        for p in model.parameters():
            nn.init.normal_(p, generator=generator)

    def noisy_penalty(model, hyperparameters):
        return 0.0 * torch.rand(()) * sum(p.sum() for p in model.parameters())

    plain = execute(job(seed=4))
    other = execute(job(arm=sgd_arm("other", init=shaken, penalty=noisy_penalty), seed=4))
    assert (plain.weights_hash, plain.data_hash, plain.untrained) == (
        other.weights_hash,
        other.data_hash,
        other.untrained,
    )
    assert plain.metrics != other.metrics


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_stops_being_finite_is_a_divergence(bad):
    def spoil(model, optimizers, hyperparameters):
        def callback(*, model, step, steps):
            if step == 5:
                with torch.no_grad():
                    next(model.parameters()).fill_(bad)

        return [callback]

    result = execute(job(arm=sgd_arm("spoilt", callbacks=spoil), points=2))
    assert result.status == "diverged"
    assert "step 6" in result.error
    assert result.untrained > 0
    assert all(math.isfinite(point.metric) for point in result.curve)


def test_a_run_that_ends_worse_than_the_untrained_model_has_diverged():
    growth = sgd_arm(
        "growth", penalty=lambda model, h: -20 * sum(p.square().sum() for p in model.parameters())
    )
    result = execute(job(arm=growth, lr=0.05))
    assert result.status == "diverged"
    assert "worse than the untrained" in result.error


@pytest.mark.parametrize(("mode", "status"), [("min", "ok"), ("max", "ok")])
def test_both_modes_count_progress_as_progress(mode, status):
    assert execute(job(task=Regression(mode=mode), steps=40)).status == status


def test_an_arm_that_raises_gives_a_result_with_the_reason():
    def broken(model, hyperparameters):
        raise ValueError("no such knob\nsecond line")

    result = execute(job(arm=sgd_arm("broken", transform=broken)))
    assert (result.status, result.error) == ("error", "ValueError: no such knob")
    assert result.untrained is not None


class Wrong(Regression):
    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def build(self, generator):
        return [] if self.fault == "model" else super().build(generator)

    def batches(self, split, generator):
        return iter(()) if self.fault == "no batches" else super().batches(split, generator)

    def loss(self, model, batch):
        value = super().loss(model, batch)
        faults = {"vector": value.expand(3), "number": value.item(), "detached": value.detach()}
        return faults.get(self.fault, value)

    def evaluate(self, model, split):
        faults = {"no metric": {"else": 1.0}, "nan": {"error": math.nan}, "raises": None}
        if self.fault == "raises":
            raise KeyError("split")
        return faults.get(self.fault) or super().evaluate(model, split)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("model", "must return an nn.Module; it returned list"),
        ("no batches", "yields nothing"),
        ("vector", r"shape \(3,\)"),
        ("number", "it returned float"),
        ("detached", "does not depend on any trainable parameter"),
        ("no metric", "must return a dict with 'error'"),
        ("nan", "untrained model's error is nan"),
        ("raises", "failed before any training: KeyError: 'split'"),
    ],
)
def test_a_task_that_does_not_work_is_no_arms_fault(fault, message):
    with pytest.raises(TaskError, match=message):
        execute(job(task=Wrong(fault)))


def test_threads_are_set_for_the_run_and_put_back():
    seen = []
    before = torch.get_num_threads()
    spy = sgd_arm("spy", transform=lambda model, h: (seen.append(torch.get_num_threads()), model)[1])
    execute(job(arm=spy, threads=before + 1))
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_schedule_scales_every_group_of_every_optimizer():
    rates = []

    def two(model, hyperparameters):
        first, *rest = model.parameters()
        return [
            torch.optim.SGD([first], lr=1e-3),
            torch.optim.SGD([{"params": rest[:1], "lr": torch.tensor(2e-3)}, {"params": rest[1:]}], lr=3e-3),
        ]

    def watch(model, optimizers, hyperparameters):
        def callback(*, model, step, steps):
            rates.append([float(g["lr"]) for o in optimizers for g in o.param_groups])

        return [callback]

    arm = sgd_arm("two", callbacks=watch, schedule=lambda step, steps, h: 1 / (1 + step))
    object.__setattr__(arm, "optimizer", two)
    assert execute(job(arm=arm, steps=3)).status == "ok"
    for step, row in enumerate(rates):
        assert row == pytest.approx([1e-3 / (1 + step), 2e-3 / (1 + step), 3e-3 / (1 + step)], rel=1e-6)


def test_evaluation_leaves_no_trace():
    class Drawing(Regression):
        def evaluate(self, model, split):
            assert not model.training
            assert not torch.is_grad_enabled()
            torch.rand(3)
            return super().evaluate(model, split)

    model = Drawing().build(torch.Generator())
    model.train()
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    evaluate(Drawing(), model, "test")
    assert torch.equal(torch.rand(2), expected)
    assert model.training


def test_progress_names_the_run_and_hands_over_the_untrained_score():
    seen = []
    this = job()
    result = execute(this, seen.append)
    assert seen[0].key == this.spec.key
    assert (seen[0].untrained, seen[0].weights_hash) == (result.untrained, result.weights_hash)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("points", [1, 3, 10, 200])
def test_evaluations_are_spread_evenly_and_end_at_the_end(steps, points):
    places = evaluation_steps(steps, points)
    assert places[-1] == steps
    assert len(places) == len(set(places)) == min(steps, points)
    gaps = [b - a for a, b in zip([0, *places], places, strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_result_survives_its_dictionary():
    result = execute(job())
    assert RunResult.from_dict(result.to_dict()) == result


def test_key_depends_on_every_field():
    spec = job().spec
    changed = {
        "task": "x", "task_fingerprint": "x", "arm": "x", "arm_fingerprint": "x", "hyperparameters": {"lr": 0.3},
        "seed": 9, "split": "validation", "steps": 99, "eval_points": 99, "batch_size": 99, "threads": 99,
        "device": "x", "versions": {"torch": "x"},
    }  # fmt: skip
    assert set(changed) == set(spec.to_dict())
    keys = {RunSpec.from_dict({**spec.to_dict(), name: value}).key for name, value in changed.items()}
    assert len(keys | {spec.key}) == len(changed) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_weight_hash_sees_every_element_name_and_shape(dtype):
    base = torch.zeros(3, 4).to(dtype)
    changed = base.clone()
    changed[2, 3] = 1
    hashes = {
        hash_tensors({"a": base}),
        hash_tensors({"a": changed}),
        hash_tensors({"b": base}),
        hash_tensors({"a": base.reshape(4, 3)}),
    }
    assert len(hashes) == 4
    assert hash_tensors({"a": base.t().contiguous().t()}) == hash_tensors({"a": base})


def test_batch_hash_depends_on_order_and_nesting_types():
    def digest(*batches):
        running = BatchHash()
        for batch in batches:
            running.update(batch)
        return running.hexdigest()

    a, b = torch.arange(4), torch.ones(4)
    assert digest(a, b) != digest(b, a)
    assert digest({"x": a}) != digest({"y": a})
    assert digest([a, "text"]) != digest([a, "other"])
    large = torch.zeros(100_000)
    moved = large.clone()
    moved[: large.numel() // 2] = 1
    assert digest(large) != digest(moved)


def test_state_size_counts_adam_as_two_copies():
    weight = torch.zeros(128, 64, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    assert state_size([optimizer]) == pytest.approx((2 * weight.numel() * 4 + 4) / 2**20)


def test_state_size_counts_nested_tensors_and_shared_ones_once():
    weights = [torch.zeros(4, 4, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    shared = torch.zeros(16)
    for weight in weights:
        optimizer.state[weight] = {"factors": [torch.zeros(8), [torch.zeros(8)]], "rotation": shared}
    assert state_size([optimizer]) == (2 * 16 + 16) * 4 / 2**20
