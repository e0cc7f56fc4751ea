"""SORSA: its start, its regulariser in all three places, its in-place form."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from weightlab.adapters import SorsaCallback, SorsaConfig, sorsa_regularizer
from weightlab.adapters.sorsa import SorsaLayer, orthonormality, orthonormality_gradient, regularize_sorsa

DOUBLE = torch.float64


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)).double()


def adapted(seed: int = 0, **options: Any) -> PeftModel:
    return get_peft_model(network(seed), SorsaConfig(**{"r": 3, "target_modules": ["0", "2"]} | options))


def layers(model: nn.Module) -> list[SorsaLayer]:
    return [layer for layer in model.modules() if isinstance(layer, SorsaLayer)]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def move(model: nn.Module, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in trained(model):
            p += size * torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, 8, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)


class TestStart:
    @pytest.mark.parametrize("alpha", [None, 0.5, 3.0, 64.0])
    @pytest.mark.parametrize("residual", ["exact", "in_place"])
    def test_is_the_base_for_every_alpha(self, alpha: float | None, residual: Any, x: Tensor):
        y = adapted(alpha=alpha, residual=residual)(x)
        torch.testing.assert_close(y, network()(x), rtol=1e-12, atol=1e-12)
        if residual == "exact":
            assert torch.equal(y, network()(x))

    def test_factors_are_the_leading_triples(self):
        for layer in layers(adapted()):
            left, values, right = layer.factors("default")
            weight = layer.base_layer.weight
            assert values is not None
            torch.testing.assert_close(values, torch.linalg.svdvals(weight)[:3])
            torch.testing.assert_close(weight @ right.T, left * values, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(weight.T @ left, right.T * values, rtol=1e-10, atol=1e-10)

    def test_trains_r_times_m_plus_n_plus_1(self):
        assert sum(p.numel() for p in trained(adapted())) == 3 * (8 + 6 + 1) + 3 * (6 + 5 + 1)

    def test_full_rank_leaves_no_residual(self):
        model = adapted(r=5, residual="in_place", rank_pattern={"0": 6})
        model(torch.zeros(1, 8, dtype=DOUBLE))
        for layer in layers(model):
            assert layer.base_layer.weight.abs().max() < 1e-12

    def test_half_precision_weights_are_decomposed_in_float32(self):
        base = network().bfloat16()
        model = get_peft_model(base, SorsaConfig(r=3, target_modules=["0"]))
        (layer,) = layers(model)
        weight = layer.base_layer.weight.float()
        torch.testing.assert_close(layer.factors("default").values, torch.linalg.svdvals(weight)[:3])

    @pytest.mark.parametrize("svd", ["full", "randomized", "auto"])
    def test_decompositions_agree(self, svd: Any):
        torch.manual_seed(0)
        decaying = nn.Linear(300, 200).double()
        with torch.no_grad():
            u, s, v = torch.linalg.svd(decaying.weight, full_matrices=False)
            decaying.weight.copy_(u * 0.7 ** torch.arange(len(s)) @ v)
        model = get_peft_model(nn.Sequential(decaying), SorsaConfig(r=4, target_modules=["0"], svd=svd))
        (layer,) = layers(model)
        expected = 0.7 ** torch.arange(4, dtype=DOUBLE)
        torch.testing.assert_close(layer.factors("default").values, expected, rtol=1e-4, atol=0)


class TestUpdate:
    @pytest.mark.parametrize("residual", ["exact", "in_place"])
    def test_forward_and_gradients_are_the_dense_ones(self, residual: Any, x: Tensor):
        model = adapted(alpha=6.0, residual=residual)
        move(model)
        (first, second), base = layers(model), network()
        model(x).square().sum().backward()
        found = [p.grad for p in trained(model)]

        def dense(layer: SorsaLayer, weight: Tensor, parts: list[Tensor]) -> Tensor:
            left, values, right = parts
            start = layer.initial("default")
            assert start is not None
            assert start.values is not None
            return weight + 2 * (
                left @ torch.diag(values) @ right - start.left @ torch.diag(start.values) @ start.right
            )

        parts = [
            [t.detach().clone().requires_grad_() for t in layer.factors("default") if t is not None]
            for layer in (first, second)
        ]
        hidden = torch.tanh(F.linear(x, dense(first, base[0].weight.detach(), parts[0]), base[0].bias))
        y = F.linear(hidden, dense(second, base[2].weight.detach(), parts[1]), base[2].bias)
        torch.testing.assert_close(model(x), y, rtol=1e-11, atol=1e-11)
        y.square().sum().backward()
        for gradient, part in zip(found, itertools.chain(*parts), strict=True):
            torch.testing.assert_close(gradient, part.grad, rtol=1e-10, atol=1e-10)

    def test_lora_has_at_most_twice_the_rank(self):
        model = adapted()
        move(model)
        config, state = model.to_lora()
        assert config.r == 6
        (first, _) = layers(model)
        product = state["base_model.model.0.lora_B.weight"] @ state["base_model.model.0.lora_A.weight"]
        torch.testing.assert_close(product, first.delta_weight("default"))

    def test_in_place_follows_the_adapters_in_use(self, x: Tensor):
        model, exact = adapted(residual="in_place"), adapted()
        for m in (model, exact):
            m.add_adapter("second", SorsaConfig(r=2, target_modules=["0"], residual="exact"))
            m.base_model.set_adapter(["default", "second"])
            move(m)
        for names in (["default"], ["second"], ["default", "second"]):
            for m in (model, exact):
                m.base_model.set_adapter(names)
            torch.testing.assert_close(model(x), exact(x), rtol=1e-12, atol=1e-12)
        weight = network()[0].weight
        first = layers(model)[0]
        model.base_model.set_adapter(["default"])
        model(x)
        assert not torch.equal(first.base_layer.weight, weight)
        model.set_adapter("second")
        model.delete_adapter("default")
        assert torch.equal(first.base_layer.weight, weight)

    def test_in_place_follows_loaded_factors(self, x: Tensor):
        model = adapted(residual="in_place")
        model(x)
        other = adapted(residual="in_place")
        with torch.no_grad():
            for layer in layers(other):
                layer.sorsa_initial_left["default"].neg_()
                layer.sorsa_initial_values["default"].mul_(2)
        expected = other(x)
        model.load_state_dict({k: v for k, v in other.state_dict().items() if "sorsa_" in k}, strict=False)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)

    def test_in_place_rounds_the_residual_to_the_base(self):
        base = network().bfloat16()
        original = base[0].weight.clone()
        model = get_peft_model(base, SorsaConfig(r=3, target_modules=["0"], residual="in_place"))
        model(torch.zeros(1, 8, dtype=torch.bfloat16))
        (layer,) = layers(model)
        left, values, right = layer.factors("default")
        assert torch.equal(base[0].base_layer.weight, (original.float() - (left * values) @ right).bfloat16())
        assert torch.equal(model.unload()[0].weight, original)


class TestOrthonormality:
    def test_of_orthonormal_rows_is_zero_with_finite_gradient(self):
        rows = torch.eye(3, 5, dtype=DOUBLE).requires_grad_()
        for power in (1, 2):
            value = orthonormality(rows, power)
            (gradient,) = torch.autograd.grad(value, rows)
            assert value == 0
            assert torch.equal(gradient, torch.zeros_like(rows))
            assert torch.equal(orthonormality_gradient(rows.detach(), power), torch.zeros_like(rows))

    @settings(max_examples=30, deadline=None)
    @given(r=st.integers(1, 5), n=st.integers(1, 8), power=st.sampled_from([1, 2]), seed=st.integers(0, 99))
    def test_closed_form_is_the_gradient(self, r: int, n: int, power: int, seed: int):
        rows = torch.randn(r, n, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        (expected,) = torch.autograd.grad(orthonormality(rows, power), rows)
        torch.testing.assert_close(
            orthonormality_gradient(rows.detach(), power), expected, rtol=1e-9, atol=1e-9
        )

    def test_value_by_hand(self):
        model = adapted()
        with torch.no_grad():
            for layer in layers(model):
                layer.sorsa_right["default"] *= 2
        # Half of the four factors are twice orthonormal: ‖3I‖ = 3√r each.
        expected = torch.tensor(3 * 3**0.5 / 2, dtype=DOUBLE)
        torch.testing.assert_close(sorsa_regularizer(model), expected)
        torch.testing.assert_close(sorsa_regularizer(model, reduction="sum"), 4 * expected)
        torch.testing.assert_close(
            sorsa_regularizer(model, power=2, reduction="sum"), torch.tensor(54.0, dtype=DOUBLE)
        )

    def test_gradient_reaches_the_bases_alone(self):
        model = adapted()
        move(model)
        sorsa_regularizer(model).backward()
        for layer in layers(model):
            assert layer.sorsa_values["default"].grad is None
            for name, rows in (("left", False), ("right", True)):
                p = getattr(layer, f"sorsa_{name}")["default"]
                expected = orthonormality_gradient(p.detach() if rows else p.detach().T) / 4
                torch.testing.assert_close(p.grad, expected if rows else expected.T)

    def test_needs_sorsa(self):
        for model in (network(), get_peft_model(network(), SorsaConfig(r=2, target_modules=["0"]))):
            name = "other" if isinstance(model, PeftModel) else None
            with pytest.raises(ValueError, match=r"no .*adapter.* by SORSA to regularise"):
                sorsa_regularizer(model, adapter_name=name)
        with pytest.raises(ValueError, match="no active adapter by SORSA"):
            regularize_sorsa(torch.optim.SGD(network().parameters()), network())


def gradients_of_task(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in trained(model)]  # type: ignore[union-attr]


def gradients_of_regularizer(model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(
        sorsa_regularizer(model), trained(model), allow_unused=True, materialize_grads=True
    )
    return list(found)


class TestHook:
    def test_decoupled_is_the_papers_equation(self, x: Tensor):
        model = adapted(gamma=0.3, reg_mode="decoupled")
        move(model)
        start = [p.detach().clone() for p in trained(model)]
        task, penalty = gradients_of_task(model, x), gradients_of_regularizer(model)
        optimizer = torch.optim.SGD(trained(model), lr=0.01)
        regularize_sorsa(optimizer, model)
        optimizer.step()
        for p, w, g, q in zip(trained(model), start, task, penalty, strict=True):
            torch.testing.assert_close(p.detach(), w - 0.01 * g - 0.3 * q, rtol=1e-10, atol=1e-12)

    def test_coupled_adds_the_official_gradient(self, x: Tensor):
        model = adapted(gamma=0.3)
        move(model)
        task, penalty = gradients_of_task(model, x), gradients_of_regularizer(model)
        optimizer = torch.optim.SGD(trained(model), lr=0.01)
        regularize_sorsa(optimizer, model, peak_lr=0.02)
        optimizer.step()
        for p, g, q in zip(trained(model), task, penalty, strict=True):
            torch.testing.assert_close(p.grad, g + 0.3 / 0.02 * q, rtol=1e-10, atol=1e-12)

    def test_is_not_clipped(self, x: Tensor):
        model = adapted(gamma=0.3)
        move(model)
        penalty = gradients_of_regularizer(model)
        gradients_of_task(model, x)
        optimizer = torch.optim.SGD(trained(model), lr=0.01)
        regularize_sorsa(optimizer, model)
        torch.nn.utils.clip_grad_norm_(trained(model), 1e-12)
        optimizer.step()
        for p, q in zip(trained(model), penalty, strict=True):
            torch.testing.assert_close(p.grad, 30 * q, rtol=1e-9, atol=1e-11)

    def test_acts_once_for_all_micro_batches(self, x: Tensor):
        results = []
        for parts in (1, 7):
            model = adapted(gamma=0.3)
            move(model)
            optimizer = torch.optim.SGD(trained(model), lr=0.01)
            regularize_sorsa(optimizer, model)
            for part in x.chunk(parts):
                model(part).square().sum().backward()
            optimizer.step()
            results.append([p.detach() for p in trained(model)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

    def test_follows_the_schedule(self, x: Tensor):
        model = adapted(gamma=0.3, reg_mode="decoupled")
        move(model)
        optimizer = torch.optim.SGD(trained(model), lr=0.02)
        regularize_sorsa(optimizer, model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [0.5, 0.25][step])
        start, penalty = [p.detach().clone() for p in trained(model)], gradients_of_regularizer(model)
        gradients_of_task(model, x)
        for p in trained(model):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        schedule.step()
        for p, w, q in zip(trained(model), start, penalty, strict=True):
            torch.testing.assert_close(p.detach(), w - 0.15 * q, rtol=1e-10, atol=1e-12)

    def test_gamma_zero_changes_no_bit(self, x: Tensor):
        results = []
        for hooked in (False, True):
            model = adapted(gamma=0.0)
            optimizer = torch.optim.AdamW(trained(model), lr=0.01)
            if hooked:
                regularize_sorsa(optimizer, model)
            for _ in range(3):
                gradients_of_task(model, x)
                optimizer.step()
            results.append([p.detach() for p in trained(model)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_acts_on_what_the_optimizer_holds_and_ends_when_removed(self, x: Tensor):
        model = adapted(gamma=0.3)
        move(model)
        first, second = layers(model)
        optimizer = torch.optim.SGD([first.sorsa_left["default"]], lr=0.01)
        handle = regularize_sorsa(optimizer, model, mode="decoupled", power=2, reduction="sum")
        start, gradient = (
            first.sorsa_left["default"].detach().clone(),
            orthonormality_gradient(first.sorsa_left["default"].detach().T, 2).T,
        )
        others = [
            second.sorsa_left["default"].detach().clone(),
            first.sorsa_right["default"].detach().clone(),
        ]
        optimizer.step()
        torch.testing.assert_close(first.sorsa_left["default"].detach(), start - 0.3 * gradient)
        assert torch.equal(second.sorsa_left["default"], others[0])
        assert torch.equal(first.sorsa_right["default"], others[1])
        handle.remove()
        moved = first.sorsa_left["default"].detach().clone()
        optimizer.step()
        assert torch.equal(first.sorsa_left["default"], moved)

    def test_long_training_stays_nearly_orthonormal(self, x: Tensor):
        ends = {}
        for gamma in (0.0, 0.05):
            model = adapted(gamma=gamma)
            optimizer = torch.optim.AdamW(trained(model), lr=0.02, weight_decay=0.0)
            regularize_sorsa(optimizer, model)
            target = torch.randn(7, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
            for _ in range(150):
                optimizer.zero_grad()
                F.mse_loss(model(x), target).backward()
                optimizer.step()
            ends[gamma] = float(sorsa_regularizer(model).detach())
        assert ends[0.05] < 0.2 * ends[0.0]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"gamma": -1.0}, r"gamma=-1\.0 must be finite and at least 0"),
            ({"mode": "both"}, "mode='both' must be coupled or decoupled"),
            ({"power": 3}, "power=3 must be 1 or 2"),
            ({"reduction": "max"}, "reduction='max' must be mean or sum"),
            ({"peak_lr": 0.0}, r"peak_lr=0\.0 must be above 0"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, Any], message: str):
        model = adapted()
        optimizer = torch.optim.SGD(trained(model), lr=0.01)
        with pytest.raises(ValueError, match=message):
            regularize_sorsa(optimizer, model, **settings)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_trainer_callback_is_the_hook(mode: Any, tmp_path: Any) -> None:
    """Also that the order is the official one: the Trainer clips to nearly nothing, the regulariser stays."""
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(48).remainder(32).reshape(8, 6)]

    def model() -> PeftModel:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        return get_peft_model(LlamaForCausalLM(config), SorsaConfig(r=2, gamma=0.5))

    def trainer(**options: Any) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.1,
            warmup_steps=2,
            max_grad_norm=1e-9,
            optim="sgd",
            save_strategy="no",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
        )
        return Trainer(model(), arguments, train_dataset=rows, **options)

    by_callback = trainer(callbacks=[SorsaCallback(mode=mode)])
    by_callback.train()

    hooked = model()
    optimizer = torch.optim.SGD(trained(hooked), lr=0.1)
    regularize_sorsa(optimizer, hooked, mode=mode, peak_lr=0.1)
    for lr in (0.0, 0.05, 0.1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        for p in trained(hooked):
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert any(not torch.equal(p, q) for p, q in zip(trained(hooked), trained(model()), strict=True))
    for p, q in zip(trained(by_callback.model), trained(hooked), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_callback_needs_sorsa(tmp_path: Any) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="no active adapter by SORSA"):
        SorsaCallback().on_train_begin(arguments, None, None, model=network())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0}, "alpha=0 must be above 0, or None"),
        ({"gamma": -1e-3}, r"gamma=-0\.001 must be finite"),
        ({"gamma": float("nan")}, "gamma=nan must be finite"),
        ({"reg_mode": "x"}, "reg_mode='x' must be coupled or decoupled"),
        ({"reg_power": 0}, "reg_power=0 must be 1 or 2"),
        ({"reg_reduction": "x"}, "reg_reduction='x' must be mean or sum"),
        ({"residual": "x"}, "residual='x' must be one of exact, in_place"),
        ({"svd": "x"}, "svd='x' must be one of auto, full, randomized"),
    ],
)
def test_bad_config(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SorsaConfig(**settings)


def test_bad_weights() -> None:
    with pytest.raises(
        ValueError, match="r=6 exceeds the rank of '2', whose weight is 5 x 6; choose r of at most 5"
    ):
        adapted(r=6)
    base = network()
    with torch.no_grad():
        base[2].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="the weight of '2' holds NaN or infinity"):
        get_peft_model(base, SorsaConfig(r=2, target_modules=["0", "2"]))
    assert isinstance(base[0], nn.Linear)
