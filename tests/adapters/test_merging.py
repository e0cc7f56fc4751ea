import copy
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from weightlab.adapters.lora_layers import lora_layers
from weightlab.adapters.merging import delta, merge_adapters, overlap
from weightlab.adapters.orthogonal import orthogonal_lora_

# PEFT asks transformers 5 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")

F64 = torch.float64
LAMBDAS = {"cat": 0.6, "dog": -1.3}


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes))


def gpt2(**options: Any) -> nn.Module:
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, **options}
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16, **ids))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 3))


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(40, 6), nn.Linear(6, 5))


BASES = {
    "llama": llama,
    "gpt2": gpt2,
    "perceptron": perceptron,
    "convolutions": convolutions,
    "embedding": embedding,
}
TARGETS: dict[str, tuple[list[str], list[str]]] = {
    "llama": (["q_proj", "down_proj", "embed_tokens"], ["q_proj", "k_proj"]),
    "gpt2": (["c_attn", "wte"], ["c_attn", "c_fc"]),
    "perceptron": (["0", "2"], ["2"]),
    "convolutions": (["0", "2"], ["2"]),
    "embedding": (["0", "1"], ["0"]),
}


def example(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if name == "perceptron":
        return torch.randn(7, 12, generator=generator)
    if name == "convolutions":
        return torch.randn(2, 6, 5, 5, generator=generator)
    return torch.randint(0, 40, (3, 8), generator=generator)


def adapted(name: str, **options: Any) -> PeftModel:
    """Two LoRAs of ranks 3 and 2 (and another rank here and there) that do something."""
    torch.manual_seed(0)
    first, second = TARGETS[name]
    extra: dict[str, Any] = {"fan_in_fan_out": True} if name == "gpt2" else {}
    settings = {"init_lora_weights": False, **extra, **options}
    pattern = {first[0]: 4}
    cat = LoraConfig(r=3, lora_alpha=5, target_modules=first, rank_pattern=pattern, **settings)
    dog = LoraConfig(r=2, lora_alpha=2, target_modules=second, **{**settings, "use_rslora": True})
    model = get_peft_model(BASES[name](), cat, "cat")
    model.add_adapter("dog", dog)
    return model.eval()


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(x)
    return result if isinstance(result, torch.Tensor) else result.logits


def summed(model: PeftModel, weights: dict[str, float]) -> nn.Module:
    """The reference: a plain model with every delta added by PEFT's own formula, in float64."""
    deltas: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        for key, layer in lora_layers(model, name).items():
            deltas[key] = (
                deltas.get(key, torch.zeros((), dtype=F64)) + weight * layer.get_delta_weight(name).double()
            )
    plain = copy.deepcopy(model).unload()
    for key, value in deltas.items():
        weight = plain.get_submodule(key).weight
        weight.data = (weight.data.double() + value).to(weight.dtype)
    return plain


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


class TestSums:
    @pytest.mark.parametrize("name", BASES)
    def test_weights_are_the_sum_of_separate_deltas_and_come_back(self, name: str):
        model, x = adapted(name), example(name)
        expected = summed(model, LAMBDAS)
        before, own = copy.deepcopy(model.state_dict()), output(model, x)
        merge = merge_adapters(model, LAMBDAS)
        assert (merge.weights, merge.method) == (LAMBDAS, "weights")
        assert close(output(model, x), output(expected, x))
        for key, weight in expected.state_dict().items():
            assert close(_base_entry(model, key), weight, 1e-6)
        merge.unmerge()
        after = model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert torch.equal(output(model, x), own)

    @pytest.mark.parametrize("name", BASES)
    def test_concatenation_is_the_sum_of_separate_deltas(self, name: str):
        model, x = adapted(name), example(name)
        expected = output(summed(model, LAMBDAS), x)
        own = output(model, x)
        merge_adapters(model, LAMBDAS, method="cat", adapter_name="both")
        assert torch.equal(output(model, x), own)
        model.set_adapter("both")
        assert close(output(model, x), expected)
        for key, layer in lora_layers(model, "both").items():
            ranks = [layer.r[name] for name in LAMBDAS if key in lora_layers(model, name)]
            assert layer.r["both"] == sum(ranks)
            assert layer.scaling["both"] == 1

    def test_concatenation_saves_and_loads_as_a_plain_lora(self, tmp_path: Any):
        for name in ("llama", "perceptron"):
            model, x = adapted(name), example(name)
            merge_adapters(model, LAMBDAS, method="cat", adapter_name="both")
            model.set_adapter("both")
            model.save_pretrained(tmp_path / name, selected_adapters=["both"], save_embedding_layers=False)
            torch.manual_seed(0)
            loaded = PeftModel.from_pretrained(BASES[name](), str(tmp_path / name / "both"))
            assert torch.equal(output(loaded.eval(), x), output(model, x))

    def test_names_that_end_alike_are_told_apart(self):
        inner = nn.Sequential(nn.ReLU(), nn.Linear(6, 6))
        config = LoraConfig(r=2, target_modules="[01]", init_lora_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 6), inner), config, "cat")
        model.add_adapter("dog", LoraConfig(r=3, target_modules="0", init_lora_weights=False))
        expected = output(summed(model, LAMBDAS), x := torch.ones(2, 5))
        merge_adapters(model, LAMBDAS, method="cat")
        assert {key: layer.r["merged"] for key, layer in lora_layers(model, "merged").items()} == {
            "0": 5,
            "1": 2,
        }
        model.set_adapter("merged")
        assert close(output(model, x), expected)

    def test_is_linear_in_the_factors(self):
        model = adapted("perceptron")
        layer = lora_layers(model, "dog")["2"]
        both = delta(layer, {"cat": 0.3, "dog": 0.5})
        assert torch.allclose(
            both, 0.3 * delta(layer, {"cat": 1}) + 0.5 * delta(layer, {"dog": 1}), atol=1e-6
        )
        assert torch.equal(delta(layer, {"cat": 2.0}), 2 * delta(layer, {"cat": 1.0}))

    def test_is_not_what_peft_calls_linear(self):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        model = get_peft_model(perceptron(), config, "cat")
        model.add_adapter("dog", config)
        ones = {"cat": 1.0, "dog": 1.0}
        model.base_model.add_weighted_adapter(list(ones), [1, 1], "linear", combination_type="linear")
        layer = lora_layers(model, "linear")["0"]
        exact = delta(layer, ones)
        assert (layer.get_delta_weight("linear") - exact).norm() > 0.5 * exact.norm()

    def test_half_precision_weights_are_rounded_once(self):
        model = adapted("perceptron")
        model.get_base_model().to(torch.bfloat16)
        base = model.get_base_model().get_submodule("2").base_layer.weight.detach().clone()
        layer = lora_layers(model, "dog")["2"]
        exact = base.float() + delta(layer, LAMBDAS)
        merge_adapters(model, LAMBDAS, keep=False)
        assert torch.equal(layer.base_layer.weight, exact.bfloat16())

    def test_peft_takes_over_from_there(self):
        model, x = adapted("perceptron"), example("perceptron")
        expected = output(summed(model, LAMBDAS), x)
        base = output(copy.deepcopy(model).unload(), x)
        undone = copy.deepcopy(model)
        merge_adapters(undone, LAMBDAS)
        undone.unmerge_adapter()
        with undone.disable_adapter():
            assert close(output(undone, x), base)
        merge_adapters(model, LAMBDAS)
        assert close(output(model.unload(), x), expected)


def _base_entry(model: PeftModel, key: str) -> torch.Tensor:
    module, _, leaf = key.rpartition(".")
    found = model.get_base_model().get_submodule(module)
    return getattr(getattr(found, "base_layer", found), leaf)


def orthogonal(slots: dict[str, dict[str, Any]], dtype: torch.dtype = torch.float32) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["0", "2"])
    model = None
    for name in slots:
        if model is None:
            model = get_peft_model(perceptron().to(dtype), config, name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    model.to(dtype)
    for name, options in slots.items():
        if options:
            orthogonal_lora_(model, name, **options)
        for layer in lora_layers(model, name).values():
            nn.init.normal_(layer.lora_B[name].weight)
    return model.eval()


class TestOrthogonality:
    def test_products_of_updates_vanish(self):
        model = orthogonal({"cat": {"slot": 0}, "dog": {"slot": 3}}, F64)
        for layer in lora_layers(model, "cat").values():
            cat, dog = (delta(layer, {name: 1.0}) for name in ("cat", "dog"))
            assert (cat @ dog.mT).norm() < 1e-12 * cat.norm() * dog.norm()

    def test_inputs_projected_off_the_other_see_their_own_adapter_alone(self):
        model = orthogonal({"cat": {"slot": 0}, "dog": {"slot": 1}, "cow": {"slot": 2}}, F64)
        layer = lora_layers(model, "cat")["0"]
        others = torch.cat([layer.lora_A[name].weight for name in ("dog", "cow")])
        x = torch.randn(9, 12, dtype=F64, generator=torch.Generator().manual_seed(1))
        projected = x - x @ others.mT @ others
        model.set_adapter("cat")
        with torch.no_grad():
            alone = layer(projected)
            merge_adapters(model, {"cat": 1.0, "dog": 0.6, "cow": 0.6})
            assert (layer(projected) - alone).abs().max() < 1e-10
            # Nothing says that the others leave x itself alone.
            assert (layer(x) - layer(projected)).norm() > 0.1

    def test_disjoint_slots_merge_without_a_word(self):
        model = orthogonal({"cat": {"slot": 0}, "dog": {"slot": 1, "scale": 0.5}, "cow": {"slot": 2}})
        merge_adapters(model, {"cat": 1, "dog": 1, "cow": 1})

    def test_plain_loras_merge_without_a_word(self):
        merge_adapters(orthogonal({"cat": {}, "dog": {}}), {"cat": 1, "dog": 1})

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (
                {"slot": 1, "basis_seed": 1},
                r"slot 1, basis_seed 1.*up to \d.*where 1.73 would be the same 3 columns",
            ),
            ({"slot": 1, "kind": "hadamard"}, "kind hadamard"),
            ({"slot": 0}, r"is up to 1.73"),
            ({}, r"'dog' \(not orthogonal\)"),
        ],
    )
    def test_shared_directions_are_measured_and_told(self, other: dict[str, Any], message: str):
        model = orthogonal({"cat": {"slot": 0}, "dog": other})
        with pytest.warns(UserWarning, match="share input directions") as caught:
            merge_adapters(model, {"cat": 1, "dog": 1})
        assert re.search(message, str(caught[0].message))
        assert caught[0].filename == __file__

    def test_overlap_counts_shared_rows(self):
        Q = torch.linalg.qr(torch.randn(9, 9, dtype=F64)).Q
        for shared in range(4):
            assert overlap(Q[:3], 5 * Q[3 - shared : 6 - shared]) == pytest.approx(shared**0.5, abs=1e-12)


class TestRefusals:
    @pytest.mark.parametrize("method", ["weights", "cat"])
    def test_change_nothing(self, method: Any):
        model = adapted("perceptron")
        before = copy.deepcopy(model.state_dict())
        for weights, message in (
            ({}, "nothing to merge"),
            ({"cat": 1, "cow": 1}, "no LoRA named 'cow'; it has 'cat', 'dog'"),
        ):
            with pytest.raises(ValueError, match=message):
                merge_adapters(model, weights, method=method)
        assert list(before) == list(model.state_dict())
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    def test_unknown_method(self):
        with pytest.raises(ValueError, match="method must be 'weights' or 'cat', got 'linear'"):
            merge_adapters(adapted("perceptron"), LAMBDAS, method="linear")  # type: ignore[arg-type]

    def test_merged_twice_or_unmerged_twice(self):
        model = adapted("perceptron")
        merge = merge_adapters(model, LAMBDAS)
        with pytest.raises(ValueError, match=r"0 holds \['cat'\] in its weight already"):
            merge_adapters(model, LAMBDAS)
        merge.unmerge()
        with pytest.raises(ValueError, match="nothing to put back"):
            merge.unmerge()
        with pytest.raises(ValueError, match="nothing to put back"):
            merge_adapters(model, LAMBDAS, keep=False).unmerge()

    def test_what_does_not_add_up(self):
        for options, message in (
            ({"use_dora": True}, "no plain LoRA on 0: it was made with use_dora=True"),
            ({"lora_bias": True}, "lora_bias=True"),
        ):
            with pytest.raises(ValueError, match=message):
                merge_adapters(adapted("perceptron", **options), LAMBDAS)
        config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
        with pytest.raises(ValueError, match=r"brings whole modules or biases \(modules_to_save=\['2'\]"):
            merge_adapters(get_peft_model(perceptron(), config), {"default": 1})

    def test_names_taken_and_models_without_a_place_for_names(self):
        model = adapted("perceptron")
        with pytest.raises(ValueError, match="has an adapter 'dog' already"):
            merge_adapters(model, LAMBDAS, method="cat", adapter_name="dog")
        with pytest.raises(TypeError, match="adds an adapter to a PeftModel, and model is a LoraModel"):
            merge_adapters(model.base_model, LAMBDAS, method="cat")

    @pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
    def test_tied_weights_take_no_sum(self):
        model = get_peft_model(gpt2(tie_word_embeddings=True), LoraConfig(r=2, target_modules=["wte"]))
        with pytest.raises(ValueError, match=r"transformer\.wte shares its weight with lm_head"):
            merge_adapters(model, {"default": 1})
        merge_adapters(model, {"default": 1}, method="cat")

    @pytest.mark.filterwarnings("ignore:.*groups > 1:UserWarning")
    @pytest.mark.parametrize("method", ["weights", "cat"])
    def test_grouped_convolutions(self, method: Any):
        config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), config, "cat")
        with pytest.raises(ValueError, match="0 is a grouped convolution"):
            merge_adapters(model, {"cat": 1}, method=method)
