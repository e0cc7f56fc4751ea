"""Lion and SOAP as arms: what they compute, what they keep, and what happens without their package."""

import importlib.util
import io
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from small_task import Regression
from torch import nn

from weightlab.exceptions import MissingDependencyError
from weightlab.trial import registry, runner
from weightlab.trial.engines.local import LocalEngine
from weightlab.trial.memory import state_size
from weightlab.trial.runner import execute
from weightlab.trial.spec import Job, RunSpec
from weightlab.trial.store import Store
from weightlab.trial.trial import Trial, plan

PEERS = ["lion", "soap"]
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_optimizer") is None,
    reason="pytorch_optimizer is not installed: pip install 'weightlab[bench]'",
)


def build(name, model, **hyperparameters):
    arm = registry.arm(name)
    return arm.optimizer(model, {**arm.defaults, **hyperparameters})


def job(name, steps=12, **hyperparameters):
    task = Regression()
    spec = RunSpec(task.name, "", name, "", hyperparameters, 0, "test", steps, 3, 8, 1, "cpu", {})
    return Job(spec, registry.keep(task), name)


def linear(rows, columns):
    return nn.Linear(columns, rows, bias=False, dtype=torch.float64)


def move(name, start, gradients, **hyperparameters):
    """Weights after each step from `start` on the given gradients."""
    layer = linear(*start.shape)
    with torch.no_grad():
        layer.weight.copy_(start)
    optimizer = build(name, layer, **hyperparameters)
    path = []
    for gradient in gradients:
        layer.weight.grad = gradient.clone()
        optimizer.step()
        path.append(layer.weight.detach().clone())
    return torch.stack(path)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_listing_arms_does_not_import_the_package():
    code = (
        "import sys; from weightlab.trial import registry; "
        "assert {'lion', 'soap'} <= set(registry.arm_names()); "
        "sys.exit('pytorch_optimizer' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", PEERS)
def test_a_missing_package_is_named_and_no_result_of_the_arm(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(MissingDependencyError, match=r"weightlab\[bench\]"):
        build(name, linear(2, 3))
    with pytest.raises(MissingDependencyError, match=r"weightlab\[bench\]"):
        execute(job(name))


@needs_package
@pytest.mark.parametrize("name", PEERS)
def test_another_version_of_the_package_is_another_run(name, tmp_path, monkeypatch):
    def keys():
        arms = [name, "adamw"]
        with closing(Store(tmp_path / "runs.sqlite")) as store:
            made = Trial(plan(Regression(), arms, tune=1, seeds=2), store, LocalEngine())
            return made.key, *(made.job(registry.arm(arm), {}, 0, "test").spec.key for arm in arms)

    before, installed = keys(), metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda package: "99" if package == "pytorch_optimizer" else installed(package)
    )
    after = keys()
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, True]


def test_a_required_package_that_is_missing_has_no_version():
    arm = replace(registry.arm("adamw"), requires=("weightlab-no-such-package", "numpy"))
    assert runner.versions(arm) == runner.versions()


@pytest.mark.parametrize("name", PEERS)
def test_peers_have_the_baselines_free_dimensions(name):
    space, baseline = registry.arm(name).search_space, registry.arm("adamw").search_space
    assert space.keys() == baseline.keys()
    for key in space:
        assert space[key].high / space[key].low == pytest.approx(baseline[key].high / baseline[key].low)
        assert space[key].log
        assert space[key].low <= registry.arm(name).defaults[key] <= space[key].high


def test_lions_range_keeps_the_decay_per_step_of_adamw():
    lion, adamw = registry.arm("lion").search_space, registry.arm("adamw").search_space
    ratio = adamw["lr"].low / lion["lr"].low
    assert 3 <= ratio <= 10
    for edge in ("low", "high"):
        products = [getattr(s["lr"], edge) * getattr(s["weight_decay"], edge) for s in (lion, adamw)]
        assert products[0] == pytest.approx(products[1])


@needs_package
def test_lion_follows_its_formulas():
    start, gradients, lr, decay = random(4, 3), random(5, 4, 3, seed=1), 0.01, 0.3
    weight, momentum, expected = start.clone(), torch.zeros_like(start), []
    for g in gradients:
        sign = (0.9 * momentum + 0.1 * g).sign()
        momentum = 0.99 * momentum + 0.01 * g
        weight = weight - lr * (sign + decay * weight)
        expected.append(weight)
    torch.testing.assert_close(
        move("lion", start, gradients, lr=lr, weight_decay=decay),
        torch.stack(expected),
        rtol=0,
        atol=1e-12,
    )


@needs_package
def test_soap_turns_with_the_gradient_and_adamw_does_not():
    left, right = (torch.linalg.qr(random(n, n, seed=n))[0] for n in (4, 3))
    start, gradients = random(4, 3), random(6, 4, 3, seed=1)
    for name, turns in (("soap", True), ("adamw", False)):
        path = move(name, start, gradients, lr=0.1)
        turned = move(name, left @ start @ right, left @ gradients @ right, lr=0.1)
        assert torch.allclose(left @ path @ right, turned, atol=1e-6) is turns


@needs_package
def test_soap_collects_on_its_first_step_and_moves_on_the_second():
    start = random(4, 3)
    first, second = move("soap", start, random(2, 4, 3, seed=1))
    assert torch.equal(first, start)
    assert not torch.equal(second, start)


@needs_package
def test_state_is_one_buffer_for_lion_and_moments_and_factors_for_soap():
    m, n = 32, 16
    sizes = {}
    for name in PEERS:
        layer = linear(m, n)
        optimizer = build(name, layer)
        layer.weight.grad = random(m, n)
        optimizer.step()
        sizes[name] = state_size([optimizer]) * 2**20 / 8
    assert sizes == {"lion": m * n, "soap": 2 * m * n + 2 * (m * m + n * n)}


@needs_package
@pytest.mark.parametrize("name", PEERS)
def test_runs_learn_and_repeat_bit_for_bit(name):
    lr = registry.arm(name).search_space["lr"].high
    first, again = (execute(job(name, steps=200, lr=lr)) for _ in range(2))
    assert first.status == "ok"
    assert first.metrics["error"] < 0.1 * first.untrained
    assert first.metrics == again.metrics


@needs_package
@pytest.mark.parametrize("name", PEERS)
def test_a_saved_state_continues_bit_for_bit(name):
    start, gradients = random(4, 3), random(6, 4, 3, seed=1)
    layer = linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(start)
    optimizer = build(name, layer)
    for step, gradient in enumerate(gradients):
        if step == 3:
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            saved.seek(0)
            optimizer = build(name, layer)
            optimizer.load_state_dict(torch.load(saved, weights_only=True))
        layer.weight.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(layer.weight, move(name, start, gradients)[-1])
