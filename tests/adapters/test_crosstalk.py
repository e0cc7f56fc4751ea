import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from weightlab.adapters.interference import Crosstalk, LayerCrosstalk, crosstalk, product_norm
from weightlab.adapters.lora_layers import lora_layers
from weightlab.adapters.merging import delta, merge_adapters
from weightlab.adapters.orthogonal import orthogonal_lora_

# PEFT asks transformers 5 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")

F64 = torch.float64


def perceptron(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["0", "2"], init_lora_weights=False, **options)
    model = get_peft_model(base, config, "cat", autocast_adapter_dtype=False)
    model.add_adapter("dog", LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    return model.double()


def inputs(count: int = 9) -> torch.Tensor:
    return torch.randn(count, 12, dtype=F64, generator=torch.Generator().manual_seed(1))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_product_norm_is_that_of_the_full_matrices(m: int, n: int, r: int, s: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    A, U, C, V = (
        torch.randn(shape, dtype=F64, generator=generator) for shape in ((r, n), (m, r), (s, n), (m, s))
    )
    first, second = U @ A, V @ C
    expected = float((first @ second.mT).norm() / (first.norm() * second.norm()))
    assert product_norm(A, U, C, V) == pytest.approx(expected, rel=1e-9)
    assert product_norm(A, 0 * U, C, V) == 0


class TestPerceptron:
    def test_measures_are_those_of_the_definitions(self):
        model, x = perceptron(), inputs()
        report = crosstalk(model, "cat", "dog", x)
        layers = lora_layers(model, "cat")
        model.set_adapter("cat")
        with torch.no_grad():
            hidden = torch.tanh(layers["0"](x))
        for row, (name, h) in zip(report.layers, (("0", x), ("2", hidden)), strict=True):
            layer = layers[name]
            cat, dog = (delta(layer, {adapter: 1.0}) for adapter in ("cat", "dog"))
            W = layer.get_base_layer().weight
            assert row.layer == name
            assert row.product == pytest.approx(
                float((cat @ dog.mT).norm() / cat.norm() / dog.norm()), rel=1e-9
            )
            through = float((h @ dog.mT).norm())
            assert row.leak == pytest.approx(through / float((h @ W.mT).norm()), rel=1e-9)
            assert row.relative_leak == pytest.approx(through / float((h @ cat.mT).norm()), rel=1e-9)

    def test_the_inputs_are_those_of_the_first_adapter(self):
        model = perceptron()
        there, back = crosstalk(model, "cat", "dog", inputs()), crosstalk(model, "dog", "cat", inputs())
        assert there.product == pytest.approx(back.product)
        assert there.layers[0].relative_leak == pytest.approx(1 / back.layers[0].relative_leak)
        assert there.layers[1].relative_leak != pytest.approx(1 / back.layers[1].relative_leak, rel=1e-3)

    def test_batches_come_in_any_form(self):
        model, x = perceptron(), inputs()
        whole = crosstalk(model, "cat", "dog", x)
        for form in ([x[:4], x[4:]], iter([x[:4], (x[4:],)]), (x,), {"input": x}):
            assert crosstalk(model, "cat", "dog", form).leak == pytest.approx(whole.leak, rel=1e-12)

    def test_leaves_the_model_as_it_was(self):
        model = perceptron(lora_dropout=0.5)
        model.set_adapter("dog")
        model.train()
        before = copy.deepcopy(model.state_dict())
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        first = crosstalk(model, "cat", "dog", inputs())
        assert crosstalk(model, "cat", "dog", inputs()) == first
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
        assert all(module.training for module in model.modules())
        assert model.active_adapters == ["dog"]
        assert not any(module._forward_hooks for module in model.modules())

    def test_a_failing_run_leaves_it_too(self):
        model = perceptron()
        with pytest.raises(RuntimeError):
            crosstalk(model, "cat", "dog", torch.ones(2, 3, dtype=F64))
        assert not any(module._forward_hooks for module in model.modules())
        assert all(module.training for module in model.modules())

    def test_works_while_adapters_are_off(self):
        model = perceptron()
        expected = crosstalk(model, "cat", "dog", inputs())
        with model.disable_adapter():
            assert crosstalk(model, "cat", "dog", inputs()) == expected


class TestOrthogonal:
    def model(self) -> PeftModel:
        torch.manual_seed(0)
        config = LoraConfig(r=3, target_modules=["0", "2"])
        base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))
        model = get_peft_model(base, config, "cat")
        model.add_adapter("dog", config)
        for slot, name in enumerate(("cat", "dog")):
            orthogonal_lora_(model, name, slot=slot)
            for layer in lora_layers(model, name).values():
                nn.init.normal_(layer.lora_B[name].weight)
        return model

    def test_a_product_of_zero_does_not_mean_no_leak(self):
        report = crosstalk(self.model(), "cat", "dog", inputs().float())
        assert report.product < 1e-6
        assert max(row.overlap for row in report.layers) < 1e-6
        assert report.relative_leak > 0.3

    def test_inputs_off_the_others_columns_do_not_leak(self):
        model = self.model()
        B = lora_layers(model, "dog")["0"].lora_A["dog"].weight
        x = inputs().float()
        report = crosstalk(model, "cat", "dog", x - x @ B.mT @ B)
        assert report.layers[0].leak < 1e-6 < report.layers[1].leak


def test_transposed_layers_and_embeddings_of_gpt2():
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    base = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16, **ids))
    targets = ["c_attn", "c_fc", "wte"]
    config = LoraConfig(r=3, target_modules=targets, fan_in_fan_out=True, init_lora_weights=False)
    model = get_peft_model(base, config, "cat")
    model.add_adapter("dog", config)
    tokens = torch.randint(0, 40, (3, 8), generator=torch.Generator().manual_seed(0))
    report = crosstalk(model, "cat", "dog", {"input_ids": tokens})
    embedding = next(row for row in report.layers if row.layer.endswith("wte"))
    layer = lora_layers(model, "cat")[embedding.layer]
    cat, dog = (delta(layer, {adapter: 1.0})[tokens].norm() for adapter in ("cat", "dog"))
    assert embedding.relative_leak == pytest.approx(float(dog / cat), rel=1e-5)
    assert embedding.leak == pytest.approx(
        float(dog / layer.get_base_layer().weight[tokens].norm()), rel=1e-5
    )
    assert len(report.layers) == 5
    assert all(0 < row.product < 1 for row in report.layers)


def test_convolutions_with_bias():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), config, "cat")
    model.add_adapter("dog", config)
    x = torch.randn(2, 3, 6, 6)
    report = crosstalk(model, "cat", "dog", x)
    layer = lora_layers(model, "cat")["0"]
    norms = [
        nn.functional.conv2d(x, weight).norm()
        for weight in (layer.get_base_layer().weight, delta(layer, {"cat": 1.0}), delta(layer, {"dog": 1.0}))
    ]
    assert report.leak == pytest.approx(float(norms[2] / norms[0]), rel=1e-5)
    assert report.relative_leak == pytest.approx(float(norms[2] / norms[1]), rel=1e-5)


class TestReport:
    def test_table_has_every_layer_and_the_mean(self):
        rows = (
            LayerCrosstalk("first", 0.25, 1.0, 0.5, 2.0),
            LayerCrosstalk("second.long", 0.75, 0.0, 0.1, 1.0),
        )
        report = Crosstalk("a", "b", rows)
        assert (report.product, report.leak, report.relative_leak) == pytest.approx((0.5, 0.3, 1.5))
        lines = report.table().splitlines()
        assert [line.split() for line in lines] == [
            ["layer", "product", "overlap", "leak/Wx", "leak/own"],
            ["first", "0.2500", "1.0000", "0.5000", "2.0000"],
            ["second.long", "0.7500", "0.0000", "0.1000", "1.0000"],
            ["mean", "0.5000", "0.5000", "0.3000", "1.5000"],
        ]
        assert len({len(line) for line in lines}) == 1

    def test_weights_alone_tell_nothing_of_the_leak(self):
        report = crosstalk(perceptron(), "cat", "dog")
        assert report.product > 0
        assert math.isnan(report.leak)
        assert math.isnan(report.relative_leak)

    def test_an_adapter_that_does_nothing(self):
        model = perceptron()
        nn.init.zeros_(lora_layers(model, "cat")["0"].lora_B["cat"].weight)
        first = crosstalk(model, "cat", "dog", inputs()).layers[0]
        assert (first.product, first.relative_leak) == (0, math.inf)


class TestRefusals:
    def test_unknown_adapters(self):
        for pair in (("cow", "dog"), ("cat", "cow")):
            with pytest.raises(ValueError, match="no LoRA named 'cow'; it has 'cat', 'dog'"):
                crosstalk(perceptron(), *pair)

    def test_nothing_in_common(self):
        base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]), "cat")
        model.add_adapter("dog", LoraConfig(r=2, target_modules=["1"]))
        with pytest.raises(ValueError, match="'cat' and 'dog' adapt no layer in common"):
            crosstalk(model, "cat", "dog")

    def test_merged_adapters(self):
        model = perceptron()
        merge_adapters(model, {"cat": 1})
        with pytest.raises(ValueError, match=r"0 holds \['cat'\] in its weight; unmerge them first"):
            crosstalk(model, "cat", "dog")

    def test_inputs_without_batches_and_layers_that_do_not_run(self):
        with pytest.raises(ValueError, match="inputs holds no batch"):
            crosstalk(perceptron(), "cat", "dog", [])

        class Half(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.used(x)

        config = LoraConfig(r=2, target_modules=["used", "idle"], init_lora_weights=False)
        model = get_peft_model(Half(), config, "cat")
        model.add_adapter("dog", config)
        with pytest.raises(ValueError, match="layers idle did not run on the inputs"):
            crosstalk(model, "cat", "dog", torch.ones(2, 3))

    def test_dora(self):
        with pytest.raises(ValueError, match="use_dora=True"):
            crosstalk(perceptron(use_dora=True), "cat", "dog")
