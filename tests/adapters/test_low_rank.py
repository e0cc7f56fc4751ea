"""The family ΔW = scale · (L diag(s) R − L₀ diag(s₀) R₀): its algebra, its gradients, its layer on every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weightlab.adapters import SorsaConfig
from weightlab.adapters.layouts import layout_of
from weightlab.adapters.low_rank import (
    Factors,
    LowRankLayer,
    Roles,
    lora_form,
    low_rank_linear,
    low_rank_weight,
)

DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def factors(out: int, inputs: int, r: int, seed: int = 0, values: bool = True) -> Factors:
    return Factors(
        draw(out, r, seed=seed), draw(r, seed=seed + 1) if values else None, draw(r, inputs, seed=seed + 2)
    )


def dense(own: Factors, initial: Factors | None, scale: float) -> Tensor:
    """The definition, by diagonal matrices."""

    def product(f: Factors) -> Tensor:
        s = torch.ones(f.left.shape[1], dtype=f.left.dtype) if f.values is None else f.values
        return f.left @ torch.diag(s) @ f.right

    return scale * (product(own) - (0 if initial is None else product(initial)))


@settings(max_examples=30, deadline=None)
@given(
    out=st.integers(1, 7),
    inputs=st.integers(1, 7),
    r=st.integers(1, 4),
    tokens=st.integers(0, 5),
    scale=st.sampled_from([0.25, 1.0, 3.0]),
    values=st.booleans(),
    subtract=st.booleans(),
    fold=st.sampled_from([None, True, False]),
)
def test_all_forms_agree_with_the_definition(
    out: int, inputs: int, r: int, tokens: int, scale: float, values: bool, subtract: bool, fold: bool | None
) -> None:
    own = factors(out, inputs, r, values=values)
    initial = factors(out, inputs, r, seed=7, values=values) if subtract else None
    expected = dense(own, initial, scale)
    torch.testing.assert_close(low_rank_weight(own, initial, scale), expected, rtol=1e-12, atol=1e-12)
    right, left = lora_form(own, initial, scale)
    assert right.shape == (r * (1 + subtract), inputs)
    torch.testing.assert_close(left @ right, expected, rtol=1e-12, atol=1e-12)
    x, result = draw(2, tokens, inputs, seed=11), draw(2, tokens, out, seed=12)
    y = low_rank_linear(x, own, initial, scale, result=result, fold=fold)
    torch.testing.assert_close(y, result + x @ expected.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        low_rank_linear(x, own, initial, scale, fold=fold), x @ expected.T, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("fold", [True, False])
def test_gradients(values: bool, subtract: bool, fold: bool) -> None:
    own, initial = (
        factors(4, 5, 2, values=values),
        factors(4, 5, 2, seed=7, values=values) if subtract else None,
    )
    tensors = [t for t in own if t is not None]
    x, result = draw(2, 3, 5, seed=11), draw(2, 3, 4, seed=12)

    def function(x: Tensor, result: Tensor, *tensors: Tensor) -> Tensor:
        parts = iter(tensors)
        given = Factors(*(None if t is None else next(parts) for t in own))  # type: ignore[arg-type]
        return low_rank_linear(x, given, initial, 1.5, result=result, fold=fold)

    arguments = [t.requires_grad_() for t in (x, result, *tensors)]
    assert torch.autograd.gradcheck(function, arguments)


def test_only_what_needs_a_gradient_gets_one() -> None:
    own, initial = factors(4, 5, 2), factors(4, 5, 2, seed=7)
    own.values.requires_grad_()  # type: ignore[union-attr]
    x = draw(3, 5, seed=11)
    low_rank_linear(x, own, initial).sum().backward()
    assert own.values.grad is not None  # type: ignore[union-attr]
    assert x.grad is None
    assert all(t.grad is None for t in (own.left, own.right, *initial))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_difference_of_nothing_is_exactly_nothing(dtype: torch.dtype) -> None:
    own = Factors(*(t.float() for t in factors(33, 47, 5) if t is not None))
    x, result = (
        draw(9, 47, seed=3, dtype=torch.float32).to(dtype),
        draw(9, 33, seed=4, dtype=torch.float32).to(dtype),
    )
    assert torch.equal(low_rank_linear(x, own, own, 7.0, result=result, dtype=dtype), result)
    assert torch.equal(low_rank_weight(own, own, 7.0), torch.zeros(33, 47))


def test_a_small_difference_keeps_its_precision_in_half() -> None:
    """Forming the two products and subtracting them would lose a change of 1e-4 in bfloat16 altogether."""
    initial = Factors(*(t.float() for t in factors(33, 47, 5) if t is not None))
    own = Factors(*(t * (1 + 1e-4 * draw(*t.shape, seed=5, dtype=torch.float32)) for t in initial))  # type: ignore[operator]
    x = draw(9, 47, seed=3, dtype=torch.float32).bfloat16()
    expected = (
        x.double()
        @ dense(Factors(*(t.double() for t in own)), Factors(*(t.double() for t in initial)), 1.0).T
    )  # type: ignore[union-attr]
    y = low_rank_linear(x, own, initial, dtype=torch.bfloat16).double()
    assert (y - expected).norm() < 0.02 * expected.norm()


def test_non_contiguous() -> None:
    own, initial = factors(4, 6, 2), factors(4, 6, 2, seed=7)
    x = draw(6, 3, seed=11).T
    strided = Factors(own.left.T.contiguous().T, own.values, own.right.T.contiguous().T)
    torch.testing.assert_close(low_rank_linear(x, strided, initial), x @ dense(own, initial, 1).T)


def test_frozen_left_keeps_little_for_backward() -> None:
    own = factors(64, 64, 2)
    own.values.requires_grad_()  # type: ignore[union-attr]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        low_rank_linear(draw(100, 64, seed=11), own)
    assert (100, 64) not in kept
    assert (100, 2) in kept


BASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(7, 5), lambda: torch.randn(2, 3, 7)),
    "linear without bias": (lambda: nn.Linear(7, 5, bias=False), lambda: torch.randn(3, 7)),
    "conv1d layout": (lambda: Conv1D(5, 7), lambda: torch.randn(2, 3, 7)),
    "embedding": (lambda: nn.Embedding(7, 5, padding_idx=0), lambda: torch.randint(7, (2, 3))),
    "conv2d": (
        lambda: nn.Conv2d(3, 5, (3, 2), stride=2, padding=1),
        lambda: torch.randn(2, 3, 8, 9),
    ),
    "conv2d, dilated and reflecting": (
        lambda: nn.Conv2d(3, 5, (3, 2), padding=1, dilation=(1, 2), padding_mode="reflect"),
        lambda: torch.randn(2, 3, 8, 9),
    ),
    "conv2d, one image": (lambda: nn.Conv2d(3, 5, 3, padding="same"), lambda: torch.randn(3, 8, 9)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3), lambda: torch.randn(2, 3, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2), lambda: torch.randn(1, 2, 4, 5, 6)),
}


def adapted(base: nn.Module, **options: Any) -> tuple[PeftModel, Any]:
    """A model of one layer with a SORSA adapter that has moved, and that layer."""
    model = get_peft_model(nn.Sequential(base), SorsaConfig(r=3, alpha=6, target_modules=["0"], **options))
    layer = model.base_model.model[0]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return model, layer


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("residual", ["exact", "in_place"])
def test_every_layout(kind: str, residual: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    make, inputs = BASES[kind]
    base = make().double()
    weight = base.weight.detach().clone()  # type: ignore[operator]
    x = inputs()
    x = x.double() if x.is_floating_point() else x
    before = base(x)
    model, layer = adapted(base, residual=residual)
    assert layer.delta_weight("default").shape == layer.shape
    assert all(p.dtype == DOUBLE for p in model.parameters())

    copy = make().double()
    copy.load_state_dict(
        {"weight": weight, **({"bias": base.bias} if getattr(base, "bias", None) is not None else {})}
    )
    copy.weight.data += layer.get_delta_weight("default")  # type: ignore[operator, union-attr]
    expected = copy(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, copy.weight, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(layer.base_layer.weight, weight)
        assert torch.equal(model(x), before)
    if "dilated" in kind:
        with pytest.raises(
            TypeError, match=r"dilation=\(1, 2\) and padding_mode='reflect', which LoRA in PEFT ignores"
        ):
            model.to_lora()
        return
    model.to_lora(path=tmp_path)
    fresh = make().double()
    fresh.load_state_dict({k: weight if k == "weight" else v for k, v in base.state_dict().items()})
    lora = PeftModel.from_pretrained(nn.Sequential(fresh), tmp_path)
    torch.testing.assert_close(lora(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_gradients_of_layouts_without_a_form_of_their_own(kind: str) -> None:
    torch.manual_seed(0)
    make, inputs = BASES[kind]
    x = inputs()
    model, layer = adapted(make().double())
    # As in PEFT's LoRA, a padding token moves the left factor only, which no dense weight could mimic: none here.
    x = x.double() if x.is_floating_point() else x.clamp_min(1)
    model(x).square().sum().backward()
    found = [getattr(layer, n)["default"].grad.clone() for n in layer.adapter_layer_names]
    model.zero_grad()
    weight = layer.base_layer.weight.detach() + layer.get_delta_weight("default")
    functional = torch.func.functional_call(layer.base_layer, {"weight": weight}, (x,))
    functional.square().sum().backward()
    for name, gradient in zip(layer.adapter_layer_names, found, strict=True):
        torch.testing.assert_close(getattr(layer, name)["default"].grad, gradient, rtol=1e-9, atol=1e-9)


def test_embedding_with_a_scale_of_its_own() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.embed_scale

    torch.manual_seed(0)
    base = Scaled(7, 5)
    model, layer = adapted(base)
    tokens = torch.arange(7)
    expected = 3.0 * (base.weight + layer.get_delta_weight("default"))
    torch.testing.assert_close(model(tokens), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(tokens), expected)


def test_layers_without_a_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match="groups=2"):
        layout_of(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(TypeError, match="is a LayerNorm; supported are Linear"):
        layout_of(nn.LayerNorm(4))
    with pytest.raises(TypeError, match="read by MultiheadAttention past its forward"):
        layout_of(nn.MultiheadAttention(4, 2).out_proj)
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"as torch\.int8, which PEFT cannot dequantise"):
        layout_of(quantised)


def test_names_follow_the_roles() -> None:
    class Layer(LowRankLayer):
        prefix = "x_"
        roles = Roles(left="frozen", values="trained", right="frozen")

    assert Layer.adapter_layer_names == ("x_values",)
    assert Layer.other_param_names == ("x_left", "x_right", "scaling")

    class Other(LowRankLayer):
        prefix = "y_"
        roles = Roles(values="absent")
        subtracts_initial = True

    assert Other.adapter_layer_names == ("y_left", "y_right")
    assert Other.other_param_names == ("y_initial_left", "y_initial_right", "scaling")


def test_factors_never_filled_are_refused_in_use() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), SorsaConfig(r=2, target_modules=["0"], init_weights=False)
    )
    with pytest.raises(RuntimeError, match="'default' of '0' was created with init_weights=False"):
        model(torch.ones(1, 4))
    with model.disable_adapter():
        model(torch.ones(1, 4))


class FakeQuantised(nn.Module):
    """A layer that only a quantisation backend can read, as bitsandbytes' are."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias
        self.scale = base.weight.detach().abs().max() / 127
        self.weight = nn.Parameter(
            (base.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class Backend:
    layer_type, backend_name, supports_merge = "linear", "fake", True

    def get_base_weight(self, base: FakeQuantised) -> Tensor:
        return base.weight * base.scale

    def set_base_weight(self, layer: Any, weight: Tensor) -> None:
        base = layer.get_base_layer()
        base.weight = nn.Parameter(
            (weight / base.scale).round().clamp(-128, 127).to(torch.int8), requires_grad=False
        )


def test_quantised_base(monkeypatch: pytest.MonkeyPatch) -> None:
    from weightlab.adapters import tuner

    backend = Backend()
    monkeypatch.setattr(tuner, "resolve_quantization_backend", lambda base, **_: backend)
    torch.manual_seed(0)
    base = FakeQuantised(nn.Linear(16, 12))
    x = torch.randn(3, 16)
    before, codes = base(x), base.weight.clone()
    model = get_peft_model(nn.Sequential(base), SorsaConfig(r=3, target_modules=["0"]))
    assert torch.equal(model(x), before)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.sorsa_values["default"] *= 0.8
    expected = before + x @ layer.delta_weight("default").T
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    assert (model(x) - expected).abs().max() < 16 * 4 * float(base.scale)
    assert not torch.equal(base.weight, codes)
    model.unmerge_adapter()
    assert torch.equal(base.weight, codes)

    backend.supports_merge = False
    with pytest.raises(TypeError, match="'0' is quantised by fake, which cannot be undone"):
        get_peft_model(
            nn.Sequential(FakeQuantised(nn.Linear(16, 12))), SorsaConfig(r=3, target_modules=["0"])
        )


def test_autocast_computes_in_half_and_stays_exact_at_the_start() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 12))
    x = torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        before = base(x)
        model = get_peft_model(base, SorsaConfig(r=3, target_modules=["0"]))
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, before)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_into_one_graph() -> None:
    torch.manual_seed(0)
    model, _ = adapted(nn.Linear(8, 6))
    x = torch.randn(3, 8)
    expected = model(x)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    for p, gradient in zip((p for p in model.parameters() if p.grad is not None), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_deleting_an_adapter_leaves_nothing_of_it() -> None:
    model, layer = adapted(nn.Linear(8, 6))
    model.add_adapter("second", SorsaConfig(r=2, target_modules=["0"], dropout=0.1))
    model.delete_adapter("second")
    assert not [key for key in model.state_dict() if "second" in key]
    assert "second" not in layer.ranks
    assert "second" not in layer.dropouts
