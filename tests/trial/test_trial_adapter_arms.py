"""Arms that adapt a pre-trained model: where they start, what trains, what becomes of the rest."""

import importlib.util
import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn

from weightlab.exceptions import MissingDependencyError
from weightlab.optim import split_named_parameters
from weightlab.tasks import AdaptCode, AdaptDigits
from weightlab.trial import registry, run_trial
from weightlab.trial.arms._adaptation import FrozenFactors, heads, hidden_linears
from weightlab.trial.arms.adapters import ARMS, WIDTH
from weightlab.trial.hashing import derive_seed
from weightlab.trial.runner import endless, execute
from weightlab.trial.spec import Job, RunSpec

NAMES = [arm.name for arm in ARMS]
PEFT = [arm.name for arm in ARMS if "peft" in arm.requires]
NO_NORMS = [name for name in NAMES if name != "norm-tuning"]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None,
    reason="peft is not installed: pip install 'weightlab[adapters]'",
)

# Of layers 64-64-64 (both hidden ones 64 x 64) and a head of 10.
TRAINED = {
    "full-finetune": 2 * (64 * 64 + 64) + 64 * 10 + 10,
    "bitfit": 2 * 64,
    "svfit": 2 * 64,
    "random-diagonal": 2 * 64,
    "lora-xs": 2 * 8 * 8,
    "sorsa": 2 * (64 * 8 + 8 + 8 * 64),
    "sorsa-no-reg": 2 * (64 * 8 + 8 + 8 * 64),
    "orthogonal-lora": 2 * 64 * 8,
    "bone-affine": 2 * 64 * 8,
    "bone-affine-row": 2 * 64 * 8,
    "bone-additive": 2 * 64 * 8,
    **dict.fromkeys(
        ("lora", "rslora", "pissa", "lora-unit-rows", "lora-orthonormal", "lora-bottom", "eva", "eva-rho1"),
        2 * 8 * (64 + 64),
    ),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "adapter-arms"))


def digits():
    return AdaptDigits(hidden=(64, 64), batch_size=64, steps=16, pretrain_steps=60)


def text():
    return AdaptCode(
        width=16, depth=1, heads=2, context=16, batch_size=8, steps=8, pretrain_steps=20, eval_characters=128
    )


def start(task, name, seed=0, **hyperparameters):
    """The model as pre-trained, and as an arm sets it up, with its optimizer."""
    arm = registry.arm(name)
    chosen = {**arm.defaults, **hyperparameters}
    base, model = (task.build(torch.Generator().manual_seed(seed)) for _ in range(2))
    torch.manual_seed(derive_seed(seed, "set-up"))
    if arm.transform is not None:
        model = arm.transform(model, chosen)
    if arm.init is not None:
        arm.init(model, chosen, torch.Generator().manual_seed(derive_seed(seed, "arm")))
    if arm.prepare is not None:
        batches = endless(task, torch.Generator().manual_seed(derive_seed(seed, "prepare")))
        arm.prepare(model, chosen, batches, task.loss)
    return base, model, arm.optimizer(model, chosen)


def first_batch(task):
    return next(iter(task.batches("train", torch.Generator().manual_seed(5))))


def held(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def lora_layers(model):
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def rows(model):
    return [layer.lora_A["default"].weight.detach() for layer in lora_layers(model).values()]


def inputs(task, base, count):
    """All inputs of the base's hidden layers over the batches that `prepare` sees."""
    seen = [[] for _ in hidden_linears(base)]
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, to=to: to.append(args[0].detach().double()))
        for layer, to in zip(hidden_linears(base).values(), seen, strict=True)
    ]
    batches = endless(task, torch.Generator().manual_seed(derive_seed(0, "prepare")))
    for batch in itertools.islice(batches, count):
        task.loss(base, batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(x) for x in seen]


@pytest.mark.parametrize(("name", "make"), [*((n, digits) for n in NO_NORMS), *((n, text) for n in NAMES)])
def test_every_arm_starts_as_the_pre_trained_model(name, make):
    task = make()
    base, model, optimizer = start(task, name)
    batch = first_batch(task)
    base.eval()
    model.eval()
    loss = task.loss(model, batch)
    # PiSSA takes its start out of the weight, which rounds; the others add zeros.
    torch.testing.assert_close(loss, task.loss(base, batch), rtol=1e-4 if name == "pissa" else 1e-6, atol=0)
    loss.backward()
    trained = held(optimizer)
    assert trained
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", NO_NORMS)
def test_as_many_parameters_train_as_the_arm_says(name):
    _, _, optimizer = start(digits(), name)
    # EVA leaves the sum of ranks as it is, and layers here are of one shape.
    assert sum(p.numel() for p in held(optimizer)) == TRAINED[name]


@pytest.mark.parametrize("name", [name for name in NO_NORMS if name != "full-finetune"])
def test_the_head_trains_only_when_asked_and_the_rest_stays(name):
    task = digits()
    for train_head in (False, True):
        _, model, optimizer = start(task, name, train_head=train_head)
        head = {
            key: value
            for key, value in model.named_parameters()
            if key.endswith(("head.weight", "head.bias"))
        }
        assert len(head) == 2
        assert all(p.requires_grad is train_head for p in head.values())
        frozen = {
            key: value.detach().clone() for key, value in model.state_dict(keep_vars=True).items()
            if not value.requires_grad
        }  # fmt: skip
        moved = [p.detach().clone() for p in held(optimizer)]
        for _ in range(2):
            task.loss(model, first_batch(task)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
        assert any(not torch.equal(a, b) for a, b in zip(moved, held(optimizer), strict=True))


def test_rules_of_the_start_of_A():
    task = digits()
    for name in ("lora-unit-rows", "lora-orthonormal", "lora-bottom", "eva", "eva-rho1", "orthogonal-lora"):
        for A in rows(start(task, name)[1]):
            norms = torch.linalg.vector_norm(A, dim=1)
            torch.testing.assert_close(norms, torch.ones(len(A)), rtol=1e-4, atol=0)
            if name != "lora-unit-rows":
                torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-4)
    plain, scaled = rows(start(task, "lora")[1]), rows(start(task, "lora-unit-rows")[1])
    for A, B in zip(plain, scaled, strict=True):
        torch.testing.assert_close(A / A.norm(dim=1, keepdim=True), B)
        assert A.norm(dim=1).mean().item() == pytest.approx(3**-0.5, rel=0.1)


def test_components_are_the_first_and_the_last_of_the_inputs():
    task = digits()
    base = task.build(torch.Generator().manual_seed(0)).eval()
    first, last = rows(start(task, "eva-rho1")[1]), rows(start(task, "lora-bottom")[1])
    for x, top, bottom in zip(inputs(task, base, 16), first, last, strict=True):
        values, vectors = torch.linalg.eigh(torch.cov(x.T))
        captured = [(A.double() @ vectors).square().sum(0) @ values for A in (top, bottom)]
        assert captured[0] == pytest.approx(values[-8:].sum().item(), rel=1e-2)
        assert captured[1] == pytest.approx(values[:8].sum().item(), abs=1e-6 * values.sum().item())


def test_seeds_draw_different_starts_and_repeat_their_own():
    task = digits()
    for name in ("lora", "lora-orthonormal", "orthogonal-lora"):
        one, again, other = (rows(start(task, name, seed)[1]) for seed in (0, 0, 1))
        assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("diagonal", [True, False])
def test_frozen_factors_are_the_formula(diagonal):
    generator = torch.Generator().manual_seed(0)
    W, L, R = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (5, 3), (3, 4))
    )
    factors = FrozenFactors(L, R, diagonal=diagonal)
    assert torch.equal(factors(W), W)
    core = torch.randn(factors.core.shape, generator=generator, dtype=torch.float64)
    factors.core.data = core
    expected = W + L @ (torch.diag(core) if diagonal else core) @ R
    torch.testing.assert_close(factors(W), expected, rtol=1e-12, atol=1e-12)
    assert [name for name, _ in factors.named_parameters()] == ["core"]


def test_lora_xs_starts_from_leading_triples_and_random_vectors_ignore_the_weight():
    task = digits()
    base, model, _ = start(task, "lora-xs")
    factors = [module for module in model.modules() if isinstance(module, FrozenFactors)]
    for layer, found in zip(hidden_linears(base).values(), factors, strict=True):
        kept = torch.linalg.svdvals(layer.weight)
        rest = layer.weight - found.left @ found.right
        torch.testing.assert_close(rest.square().sum(), kept[8:].square().sum(), rtol=1e-4, atol=0)
    _, model, _ = start(task, "random-diagonal")
    for module in model.modules():
        if isinstance(module, FrozenFactors):
            torch.testing.assert_close(module.left.T @ module.left, torch.eye(64), rtol=0, atol=1e-5)
            torch.testing.assert_close(module.right @ module.right.T, torch.eye(64), rtol=0, atol=1e-5)


def test_regularised_sorsa_keeps_gamma_at_the_peak_rate_whatever_the_schedule():
    # The first step comes at a fraction of the peak; gamma belongs to the peak.
    task = digits()
    moved = {}
    for gamma in (0.0, 0.5):
        _, _, optimizer = start(task, "sorsa", gamma=gamma, lr=1e-2, weight_decay=0.0)
        optimizer.param_groups[0]["lr"] = 1e-4
        parameters = [p for p in held(optimizer) if p.ndim == 2]
        with torch.no_grad():
            for p in parameters:
                p.mul_(2.0)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        for hook in optimizer._optimizer_step_pre_hooks.values():
            hook(optimizer, (), {})
        moved[gamma] = torch.cat([p.grad.flatten() for p in parameters])
    assert moved[0.0].abs().max() == 0
    # The gradient of ||A A' - I|| at A = 2 Q is 4 / sqrt(r) Q; the mean is over 4 factors.
    expected = 0.5 / 1e-2 / 4 * (4 / 8**0.5) * 8**0.5 * 2
    assert moved[0.5].norm().item() == pytest.approx(expected, rel=1e-4)


def test_hidden_layers_are_all_linear_ones_but_heads():
    for task in (digits(), text()):
        model = task.build(torch.Generator().manual_seed(0))
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        matrices, _ = split_named_parameters(model)
        assert [m for m in linears if any(m is h for h in hidden_linears(model).values())] == linears[:-1]
        assert heads(model) == [model.head]
        assert len(hidden_linears(model)) == len(matrices)
    with pytest.raises(ValueError, match="nothing to adapt"):
        hidden_linears(nn.Sequential(nn.Linear(4, 2)))


def test_ranges_are_equally_wide_and_hold_their_defaults():
    for arm in ARMS:
        assert list(arm.search_space) == ["lr", "weight_decay"]
        lr, decay = arm.search_space["lr"], arm.search_space["weight_decay"]
        assert lr.log
        assert decay.log
        assert lr.high / lr.low == pytest.approx(WIDTH)
        assert decay == ARMS[0].search_space["weight_decay"]
        assert lr.low <= arm.defaults["lr"] <= lr.high
        assert decay.low <= arm.defaults["weight_decay"] <= decay.high


def test_listing_arms_does_not_import_peft():
    code = (
        "import sys; from weightlab.trial import registry; assert 'lora' in registry.arm_names(); "
        "sys.exit('peft' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", PEFT)
def test_a_missing_peft_is_named_and_no_result_of_the_arm(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    task, arm = digits(), registry.arm(name)
    spec = RunSpec(task.name, "", name, "", {}, 0, "test", 4, 2, 64, 1, "cpu", {})
    with pytest.raises(MissingDependencyError, match=r"weightlab\[adapters\]"):
        execute(Job(spec, registry.keep(task), registry.keep(arm)))


def test_what_a_model_lacks_is_said():
    with pytest.raises(ValueError, match="no parameters of the kind"):
        start(digits(), "norm-tuning")


def test_a_trial_over_all_of_them_is_paired():
    report = run_trial(digits(), NO_NORMS, steps=8, tune=0, seeds=2, eval_points=2)
    assert report.paired
    assert not [note for note in report.notes if "dimensions" in note]
    for arm in report.arms:
        assert all(run.status in ("ok", "diverged") for run in arm.runs), arm
        assert {run.curve[0].metric for run in arm.runs} == {
            run.curve[0].metric for run in report.arms[0].runs
        }
        assert all(set(run.metrics) == {"error", "loss", "source_error"} for run in arm.runs)


def test_runs_repeat_bit_for_bit():
    task = digits()
    for name in ("eva", "sorsa", "random-diagonal", "orthogonal-lora"):
        spec = RunSpec(task.name, "", name, "", {"lr": 0.01}, 0, "test", 8, 2, 64, 1, "cpu", {})
        first, again = (execute(Job(spec, registry.keep(task), name)) for _ in range(2))
        assert first.metrics == again.metrics
        assert first.curve[-1].train_loss == again.curve[-1].train_loss
