"""What users of PEFT expect of an adapter, held for every method of the room on four small architectures."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import convert_to_lora
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from weightlab.adapters import BoneConfig, SorsaConfig, SvfitConfig
from weightlab.adapters.tuner import AdapterLayer

# PEFT reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Make = Callable[..., Any]

# One line a method. All weights are 32 or 64 (the patch embedding 32 x 48) a side.
METHODS: dict[str, Make] = {
    "bone": lambda **k: BoneConfig(**{"r": 4} | k),
    "bone additive": lambda **k: BoneConfig(**{"r": 4, "variant": "additive"} | k),
    "sorsa": lambda **k: SorsaConfig(r=4, alpha=6, **k),
    "sorsa in place": lambda **k: SorsaConfig(r=4, residual="in_place", **k),
    "svfit": lambda **k: SvfitConfig(r=4, **k),
    "svfit relative": lambda **k: SvfitConfig(r=7, relative=True, **k),
}
# Methods whose update is of low rank, so that to_lora() is exact.
LOW_RANK = [name for name in METHODS if name.startswith(("sorsa", "svfit", "bone additive"))]


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=48,
        n_embd=32,
        n_inner=64,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config)


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
    )
    return ViTForImageClassification(config)


ARCHITECTURES = {
    "llama": (llama, ["q_proj", "v_proj", "gate_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"]),
    "bert": (bert, ["query", "value", "intermediate.dense"]),
    "vit": (vit, ["query", "value", "q_proj", "v_proj", "projection"]),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return ARCHITECTURES[name][0]().eval().to(dtype)


def inputs(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(48, (2, 7), generator=generator)}


def output(model: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(name).items()}
    with torch.no_grad():
        return model(**batch).logits


def perturb(model: nn.Module, seed: int = 2) -> None:
    """Move what trains, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Make:
    return METHODS[request.param]


@pytest.fixture(params=ARCHITECTURES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def adapted(method: Make, name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    return get_peft_model(build(name, dtype), method(target_modules=ARCHITECTURES[name][1], **settings))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in ARCHITECTURES), ("llama", torch.bfloat16), ("gpt2", torch.float16)],
)
def test_start_is_the_base_and_dtypes_are_kept(method: Make, name: str, dtype: torch.dtype) -> None:
    model = adapted(method, name, dtype)
    base = build(name, dtype)
    expected, actual = output(base, name, dtype), output(model, name, dtype)
    assert actual.dtype == dtype
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.dtype == torch.float32 for p in trained)
    layers = [layer for layer in model.modules() if isinstance(layer, AdapterLayer)]
    if getattr(model.peft_config["default"], "residual", "exact") == "in_place":
        torch.testing.assert_close(actual, expected, rtol=0.02, atol={torch.float32: 1e-5}.get(dtype, 0.05))
    else:
        assert torch.equal(actual, expected)
    assert len(layers) > 1
    perturb(model)
    assert not torch.equal(output(model, name, dtype), expected)
    with model.disable_adapter():
        assert torch.equal(output(model, name, dtype), expected)
    assert not torch.equal(output(model, name, dtype), expected)
    assert torch.equal(output(model.unload(), name, dtype), expected)


@pytest.mark.parametrize(
    ("name", "low_cpu_mem_usage"), [*((name, True) for name in ARCHITECTURES), ("llama", False)]
)
def test_saved_and_loaded(method: Make, name: str, low_cpu_mem_usage: bool, tmp_path: Any) -> None:
    model = adapted(method, name)
    perturb(model)
    expected = output(model, name)
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].init_weights is True
    loaded = PeftModel.from_pretrained(build(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(output(loaded, name), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    with loaded.disable_adapter():
        assert torch.equal(output(loaded, name), output(build(name), name))


def test_loading_does_not_recompute_the_start(
    method: Make, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(method, "llama")
    model.save_pretrained(tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("decomposed again")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    monkeypatch.setattr(torch, "svd_lowrank", refuse)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True).eval()
    assert torch.equal(output(loaded, "llama"), output(model, "llama"))


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in ARCHITECTURES), ("llama", torch.bfloat16)]
)
def test_merged_and_unmerged(method: Make, name: str, dtype: torch.dtype) -> None:
    model = adapted(method, name, dtype)
    perturb(model)
    weights = {k: v.clone() for k, v in build(name, dtype).state_dict().items()}
    before = output(model, name, dtype)
    model.merge_adapter()
    if dtype == torch.float32:
        close(output(model, name), before)
    else:
        torch.testing.assert_close(output(model, name, dtype), before, rtol=0.1, atol=0.1)
    model.unmerge_adapter()
    assert torch.equal(output(model, name, dtype), before)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert not any(isinstance(layer, AdapterLayer) for layer in merged.modules())
    assert set(merged.state_dict()) == set(weights)
    restored = model.unload()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in restored.state_dict().items())


def test_safe_merge_refuses_nan_and_changes_nothing(method: Make) -> None:
    model = adapted(method, "llama")
    layers = [layer for layer in model.modules() if isinstance(layer, AdapterLayer)]
    container = getattr(layers[0], layers[0].adapter_layer_names[-1])
    with torch.no_grad():
        container["default"].fill_(torch.nan)
    with pytest.raises(ValueError, match=r"would put NaN or infinity into 'model\.layers"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layers[0].base_layer.weight, build("llama").get_submodule(layers[0].key).weight)


def test_two_adapters(method: Make, name: str) -> None:
    model = adapted(method, name)
    perturb(model, 3)
    first = output(model, name)
    model.add_adapter("second", method(target_modules=ARCHITECTURES[name][1]))
    assert torch.equal(output(model, name), first)
    model.set_adapter("second")
    perturb(model, 4)
    second = output(model, name)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(output(model, name), first)
    model.base_model.set_adapter(["default", "second"])
    both = output(model, name)
    model.merge_adapter(adapter_names=["default", "second"])
    close(output(model, name), both)
    model.unmerge_adapter()
    assert torch.equal(output(model, name), both)
    layer = next(layer for layer in model.modules() if isinstance(layer, AdapterLayer))
    if all(layer.is_additive(n) for n in ("default", "second")):
        base = build(name).get_submodule(layer.key).weight
        total = base + layer.get_delta_weight("default") + layer.get_delta_weight("second")
        model.merge_adapter(adapter_names=["default", "second"])
        close(layer.base_layer.weight, total)
        model.unmerge_adapter()
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(output(model, name), first)


@pytest.mark.parametrize("kind", LOW_RANK)
def test_plain_lora_of_the_same_effect(kind: str, name: str, tmp_path: Any) -> None:
    model = adapted(METHODS[kind], name)
    perturb(model)
    expected = output(model, name)
    config, state = model.to_lora(path=tmp_path)
    assert isinstance(config, LoraConfig)
    assert all("lora_" in key for key in state)
    loaded = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    close(output(loaded, name), expected)


@pytest.mark.parametrize("kind", LOW_RANK)
def test_lora_conversion_of_peft(kind: str) -> None:
    model = adapted(METHODS[kind], "llama")
    perturb(model)
    assert model.base_model.supports_lora_conversion()
    config, state = convert_to_lora(model, rank=8)
    loaded = get_peft_model(build("llama"), config).eval()
    result = loaded.load_state_dict(
        {k.replace(".weight", ".default.weight"): v for k, v in state.items()}, strict=False
    )
    assert not result.unexpected_keys
    close(output(loaded, "llama"), output(model, "llama"))


def test_loaded_by_transformers(method: Make, tmp_path: Any) -> None:
    model = adapted(method, "llama")
    perturb(model)
    model.save_pretrained(tmp_path)
    plain = build("llama")
    plain.load_adapter(str(tmp_path))
    assert torch.equal(output(plain.eval(), "llama"), output(model, "llama"))


def test_injected_without_a_peft_model(method: Make) -> None:
    injected = inject_adapter_in_model(method(target_modules=["q_proj"]), build("llama"))
    layers = [layer for layer in injected.modules() if isinstance(layer, AdapterLayer)]
    assert [layer.key for layer in layers] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


def test_gradient_checkpointing(method: Make) -> None:
    gradients = []
    for checkpoint in (False, True):
        model = adapted(method, "llama")
        perturb(model)
        model.train()
        if checkpoint:
            model.base_model.model.activation_checkpointing_enable()
        batch = inputs("llama")
        model.enable_input_require_grads()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(g is not None and g.isfinite().all() for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_trainer_with_autocast_checkpoint_and_resume(method: Make, tmp_path: Any) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(8 * 6).remainder(48).reshape(8, 6)]

    def trainer(steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            bf16=True,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
        )
        return Trainer(adapted(method, "llama"), arguments, train_dataset=rows)

    whole = trainer(4)
    whole.train()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trained = [
        (a, b)
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
        if a.requires_grad
    ]
    start = [p for p in adapted(method, "llama").parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in trained)
    assert all(not torch.equal(a, b) for (a, _), b in zip(trained, start, strict=True))


def test_bias_and_saved_modules(method: Make, tmp_path: Any) -> None:
    only = f"{method(target_modules=['x']).method}_only"
    for bias, biases in (("none", 0), ("all", 19), (only, 3)):
        model = adapted(method, "bert", bias=bias, layers_to_transform=[1] if bias == only else None)
        assert sum(p.requires_grad for n, p in model.named_parameters() if n.endswith(".bias")) == biases
        perturb(model)
        model.save_pretrained(tmp_path / bias)
        loaded = PeftModel.from_pretrained(build("bert"), tmp_path / bias).eval()
        assert torch.equal(output(loaded, "bert"), output(model, "bert"))
    model = adapted(method, "bert", modules_to_save=["classifier"])
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    assert torch.equal(output(loaded, "bert"), output(model, "bert"))


@pytest.mark.parametrize("kind", LOW_RANK)
def test_lora_takes_biases_and_saved_modules_along(kind: str, tmp_path: Any) -> None:
    only = f"{METHODS[kind](target_modules=['x']).method}_only"
    model = adapted(
        METHODS[kind], "bert", bias=only, modules_to_save=["classifier"], rank_pattern={"value": 2}
    )
    perturb(model)
    model.to_lora(path=tmp_path)
    close(output(PeftModel.from_pretrained(build("bert"), tmp_path).eval(), "bert"), output(model, "bert"))


def test_dropout_acts_in_training_alone(method: Make) -> None:
    model = adapted(method, "llama", dropout=0.5)
    perturb(model)
    plain = output(model, "llama")
    model.train()
    torch.manual_seed(0)
    noisy = output(model, "llama")
    assert not torch.equal(noisy, plain)
    assert not torch.equal(output(model, "llama"), noisy)
    torch.manual_seed(0)
    assert torch.equal(output(model, "llama"), noisy)


def test_nothing_is_left_after_a_refusal(method: Make) -> None:
    base = build("bert")
    names = dict(base.named_modules()).keys()
    flags = [p.requires_grad for p in base.parameters()]
    with pytest.raises(
        TypeError, match=r"target module 'bert\.encoder\.layer\.0\.attention\.self' is a Bert"
    ):
        get_peft_model(base, method(target_modules=["query", "attention.self"]))
    with pytest.raises(ValueError, match=r"Target modules \{'qurey'\} not found.*end in: query"):
        get_peft_model(base, method(target_modules=["qurey"]))
    assert dict(base.named_modules()).keys() == names
    assert [p.requires_grad for p in base.parameters()] == flags
    assert not hasattr(base, "peft_config")

    model = get_peft_model(base, method(target_modules=["query"]))
    perturb(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises((TypeError, ValueError)):
        model.add_adapter("second", method(target_modules=["query", "attention.self"]))
    assert list(model.peft_config) == ["default"]
    assert model.state_dict().keys() == state.keys()
    assert model.base_model.active_adapters == ["default"]


def test_targets_of_an_unknown_model_must_be_given(method: Make) -> None:
    with pytest.raises(ValueError, match=r"target_modules must be given.*end in: 0, 2"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), method())


def test_default_targets_are_those_of_lora(method: Make) -> None:
    model = get_peft_model(build("llama"), method())
    assert {key.rpartition(".")[2] for key in model.targeted_module_names} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r=0 must be an integer of at least 1"),
        ({"dropout": 1.0}, r"dropout=1\.0 must be in \[0, 1\)"),
        ({"bias": "lora_only"}, "bias='lora_only' must be one of none, all, "),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]=0 must be an integer"),
        ({"target_modules": ".*", "layers_to_transform": 1}, "layers_to_transform=1 must be left out"),
    ],
)
def test_bad_settings(method: Make, settings: dict[str, Any], message: str) -> None:
    config = method(target_modules=["q_proj"])
    with pytest.raises(ValueError, match=message):
        type(config)(**({"target_modules": ["q_proj"]} | settings))


def test_config_survives_json(method: Make, tmp_path: Any) -> None:
    config = method(target_modules=["q_proj"], exclude_modules=["v_proj"], rank_pattern={"q_proj": 2})
    config.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(str(tmp_path))
    assert loaded.to_dict() == config.to_dict() | {"init_weights": False}
    assert loaded.peft_type.value == config.type_name()
