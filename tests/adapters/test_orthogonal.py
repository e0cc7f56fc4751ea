import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from weightlab.adapters.basis import shared_basis
from weightlab.adapters.lora_layers import LoraLayer, lora_layers, matrices
from weightlab.adapters.orthogonal import (
    OrthogonalMetadata,
    freeze_basis_,
    orthogonal_lora_,
    orthogonal_metadata,
)

# PEFT asks transformers 5 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=40,
            bos_token_id=1,
            eos_token_id=2,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=16,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    )


BASES = {"llama": llama, "gpt2": gpt2}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def config(name: str, **options: Any) -> LoraConfig:
    transposed = {"fan_in_fan_out": True} if name == "gpt2" else {}
    return LoraConfig(r=4, target_modules=TARGETS[name], task_type="CAUSAL_LM", **transposed, **options)


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 40, (3, 8), generator=torch.Generator().manual_seed(seed))


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))


def adapted(**options: Any) -> PeftModel:
    return get_peft_model(perceptron(), LoraConfig(r=2, target_modules=["0", "2"], **options))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model: nn.Module, chosen: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 12, generator=generator), torch.randint(0, 5, (8,), generator=generator)
        chosen.zero_grad()
        F.cross_entropy(model(x), y).backward()
        chosen.step()


def downs(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {
        name: layer.lora_A[adapter].weight.detach().clone()
        for name, layer in lora_layers(model, adapter).items()
    }


def trainable(model: nn.Module) -> set[str]:
    return {name.split("lora_")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestStart:
    @pytest.mark.parametrize("name", BASES)
    def test_fresh_adapter_is_the_base(self, name: str):
        base = BASES[name]().eval()
        model = get_peft_model(copy.deepcopy(base), config(name)).eval()
        orthogonal_lora_(model, slot=1)
        with torch.no_grad():
            assert torch.equal(model(tokens()).logits, base(tokens()).logits)

    @pytest.mark.parametrize("name", BASES)
    def test_down_projections_are_the_shared_columns_of_each_width(self, name: str):
        model = get_peft_model(BASES[name](), config(name))
        orthogonal_lora_(model, slot=2, basis_seed=7, scale=0.5)
        rows = downs(model)
        assert {A.shape[1] for A in rows.values()} == ({32, 48} if name == "llama" else {32})
        for A in rows.values():
            expected = shared_basis(A.shape[1], 4, slot=2, seed=7, dtype=torch.float64).mT / 2
            assert torch.equal(A, expected.float())

    def test_keys_draw_anew_in_each_layer(self):
        model = get_peft_model(llama(), config("llama"))
        orthogonal_lora_(model, key="cat")
        rows = downs(model)
        first, second = (rows[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1))
        assert torch.equal(first, shared_basis(32, 4, key="cat", layer="model.layers.0.self_attn.q_proj").mT)
        assert not torch.allclose(first, second)

    def test_names_are_the_base_models_however_it_is_wrapped(self):
        wrapped, injected = get_peft_model(llama(), config("llama")), llama()
        injected.add_adapter(config("llama"), "default")
        for model in (wrapped, injected):
            orthogonal_lora_(model, key="cat")
        assert same(downs(wrapped), downs(injected))
        assert orthogonal_metadata(wrapped) == orthogonal_metadata(injected) is not None

    def test_directions_of_ones_own_are_dealt_by_layer(self):
        model = adapted()
        basis = {"0": torch.eye(12), "2": torch.eye(16).flip(0)}
        metadata = orthogonal_lora_(model, slot=1, slots=3, basis=basis)
        assert metadata.kind == "given"
        assert torch.equal(downs(model)["0"], torch.eye(12)[[1, 4]])
        assert torch.equal(downs(model)["2"], torch.eye(16).flip(0)[[1, 4]])

    def test_takes_what_activation_pca_finds(self):
        from weightlab.adapters import ActivationPCA

        base = perceptron()
        with ActivationPCA(base, n_components=16, progress=False) as pca:
            base(torch.randn(64, 12, generator=torch.Generator().manual_seed(0)))
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
        orthogonal_lora_(model, slot=0, slots=2, basis={"0": pca.components()["0"].directions})
        assert torch.allclose(downs(model)["0"], pca.components()["0"].directions[[0, 2]].float())

    def test_kernels_of_one_pixel_and_unfolded_ones(self):
        def model() -> PeftModel:
            torch.manual_seed(0)
            layers = nn.Sequential(nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3))
            return get_peft_model(layers, LoraConfig(r=2, target_modules=["0", "1"]))

        with pytest.raises(ValueError, match="1 is a convolution with a 3×3 kernel"):
            orthogonal_lora_(model(), slot=0)
        chosen = model()
        orthogonal_lora_(chosen, slot=0, unfold_convolutions=True)
        for A, n in zip(downs(chosen).values(), (6, 36), strict=True):
            assert torch.allclose(A.flatten(1), shared_basis(n, 2, slot=0).mT)

    def test_half_precision_adapters_get_the_rounded_basis(self):
        model = get_peft_model(
            perceptron().to(torch.bfloat16),
            LoraConfig(r=2, target_modules=["0"]),
            autocast_adapter_dtype=False,
        )
        orthogonal_lora_(model, slot=0)
        assert torch.equal(downs(model)["0"], shared_basis(12, 2, slot=0, dtype=torch.float64).mT.bfloat16())


class TestFrozen:
    def test_training_leaves_the_basis_bitwise_and_out_of_the_optimizer(self):
        model = adapted()
        orthogonal_lora_(model, slot=1)
        before = downs(model)
        chosen = optimizer(model)
        train(model, chosen, range(5))
        assert same(before, downs(model))
        assert all(
            B.abs().sum() > 0
            for _, B in (matrices(x, "default") for x in lora_layers(model, "default").values())
        )
        frozen = {id(layer.lora_A["default"].weight) for layer in lora_layers(model, "default").values()}
        assert not frozen & {id(p) for p in chosen.state}
        assert len(chosen.state) == 2

    def test_stays_frozen_through_every_switch(self):
        model = adapted()
        model.add_adapter("plain", LoraConfig(r=2, target_modules=["0"]))
        orthogonal_lora_(model, slot=1)
        assert trainable(model) == {"B"}
        model.set_adapter("plain")
        assert trainable(model) == {"A", "B"}
        model.set_adapter("default")
        assert trainable(model) == {"B"}
        with model.disable_adapter():
            pass
        assert trainable(model) == {"B"}
        model.set_requires_grad("default")
        assert trainable(model) == {"B"}
        model.base_model.set_adapter(["default", "plain"])
        assert all(
            not layer.lora_A["default"].weight.requires_grad
            for layer in lora_layers(model, "default").values()
        )
        model.delete_adapter("default")
        assert trainable(model) == {"A", "B"}

    def test_other_models_keep_their_layers_thawed(self):
        orthogonal_lora_(adapted(), slot=0)
        assert LoraLayer.frozen_peft_weight_names == {}
        assert trainable(adapted()) == {"A", "B"}

    def test_saved_and_resumed_training_is_bit_exact(self, tmp_path: Path):
        straight = adapted()
        orthogonal_lora_(straight, slot=1)
        train(straight, optimizer(straight), range(6))

        model = adapted()
        orthogonal_lora_(model, slot=1)
        chosen = optimizer(model)
        train(model, chosen, range(3))
        model.save_pretrained(tmp_path)
        state = chosen.state_dict()

        # As Trainer resumes: into a model prepared alike.
        again = adapted()
        orthogonal_lora_(again, slot=1)
        again.load_adapter(str(tmp_path), "default", is_trainable=True)
        assert trainable(again) == {"B"}
        # As a user does.
        loaded = PeftModel.from_pretrained(perceptron(), str(tmp_path), is_trainable=True)
        assert trainable(loaded) == {"A", "B"}
        freeze_basis_(loaded)
        assert trainable(loaded) == {"B"}
        loaded.set_adapter("default")
        assert trainable(loaded) == {"B"}
        for other in (again, loaded):
            resumed = optimizer(other)
            resumed.load_state_dict(copy.deepcopy(state))
            train(other, resumed, range(3, 6))
            assert all(
                torch.equal(a, b) for a, b in zip(straight.parameters(), other.parameters(), strict=True)
            )

    def test_an_older_peft_is_told_of(self, monkeypatch: pytest.MonkeyPatch):
        from peft.tuners.tuners_utils import BaseTunerLayer

        model = adapted()
        monkeypatch.setattr(BaseTunerLayer, "set_adapter", BaseTunerLayer.set_adapter)
        monkeypatch.delattr(BaseTunerLayer, "_freeze_non_trainable_peft_weights")
        with pytest.warns(
            UserWarning, match="call freeze_basis_ after each set_adapter, or install PEFT 0.21"
        ):
            orthogonal_lora_(model, slot=1)
        assert trainable(model) == {"B"}


class TestFiles:
    @pytest.mark.parametrize("name", BASES)
    @pytest.mark.parametrize("low_memory", [False, True])
    def test_loads_as_a_plain_lora(self, name: str, low_memory: bool, tmp_path: Path):
        model = get_peft_model(BASES[name](), config(name)).eval()
        metadata = orthogonal_lora_(model, key="cat", kind="hadamard")
        for layer in lora_layers(model, "default").values():
            nn.init.normal_(layer.lora_B["default"].weight)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(BASES[name](), str(tmp_path), low_cpu_mem_usage=low_memory).eval()
        with torch.no_grad():
            assert torch.equal(model(tokens()).logits, loaded(tokens()).logits)
        assert orthogonal_metadata(loaded) == metadata
        known = set(LoraConfig.__dataclass_fields__)
        assert set(json.loads((tmp_path / "adapter_config.json").read_text())) <= known

    def test_loads_through_transformers(self, tmp_path: Path):
        model = get_peft_model(llama(), config("llama")).eval()
        orthogonal_lora_(model, slot=3)
        for layer in lora_layers(model, "default").values():
            nn.init.normal_(layer.lora_B["default"].weight)
        model.save_pretrained(tmp_path)
        loaded = llama().eval()
        loaded.load_adapter(str(tmp_path))
        with torch.no_grad():
            assert torch.equal(model(tokens()).logits, loaded(tokens()).logits)

    def test_metadata_says_how_to_make_the_basis_again(self):
        model = adapted()
        metadata = orthogonal_lora_(model, slot=1, basis_seed=3, kind="hadamard", scale=2)
        assert metadata == OrthogonalMetadata(3, "hadamard", 1, None, 2.0, metadata.checksum)
        other = adapted()
        assert orthogonal_lora_(other, slot=1, basis_seed=3, kind="hadamard", scale=2) == metadata
        assert (
            orthogonal_lora_(other, slot=1, basis_seed=4, kind="hadamard", scale=2).checksum
            != metadata.checksum
        )
        assert orthogonal_metadata(adapted()) is None

    def test_adapters_added_with_one_config_have_metadata_of_their_own(self):
        settings = LoraConfig(r=2, target_modules=["0"])
        model = get_peft_model(perceptron(), settings, "cat")
        model.add_adapter("dog", settings)
        model.add_adapter("plain", settings)
        known = [orthogonal_lora_(model, name, slot=slot) for slot, name in enumerate(("cat", "dog"))]
        assert [orthogonal_metadata(model, name) for name in ("cat", "dog", "plain")] == [*known, None]

    def test_a_changed_basis_is_noticed(self):
        model = adapted()
        orthogonal_lora_(model, slot=1)
        with torch.no_grad():
            lora_layers(model, "default")["2"].lora_A["default"].weight[0, 0] += 1e-4
        with pytest.raises(
            ValueError, match="lora_A of adapter 'default' is not what orthogonal_lora_ made it"
        ):
            freeze_basis_(model)
        with pytest.raises(ValueError, match="was not made by orthogonal_lora_"):
            freeze_basis_(adapted())


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"slot": 8}, "layer 0: slot 8 does not exist: width 12 has"),
            ({"slot": 6}, "layer 0: slot 6 does not exist"),
            ({}, "layer 0: give either slot or key"),
            ({"slot": 0, "kind": "haar"}, "kind must be one of"),
            ({"slot": 0, "scale": 0}, "scale must be positive, got 0"),
            ({"slot": 0, "basis": {"0": torch.eye(12)}}, "basis has no directions for layer 2; it has 0"),
            ({"slot": 0, "adapter_name": "cat"}, "no LoRA named 'cat'; it has 'default'"),
        ],
    )
    def test_bad_options_change_nothing(self, options: dict, message: str):
        model = adapted()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            orthogonal_lora_(model, **options)
        assert same(before, model.state_dict())
        assert trainable(model) == {"A", "B"}
        assert orthogonal_metadata(model) is None

    def test_slots_end_with_the_narrowest_layer(self):
        model = adapted()
        # 12 inputs have six slots of rank 2, 16 inputs have eight.
        with pytest.raises(ValueError, match="layer 0: slot 7"):
            orthogonal_lora_(model, slot=7)
        orthogonal_lora_(model, slot=5)

    def test_rank_above_the_width(self):
        model = get_peft_model(perceptron(), LoraConfig(r=13, target_modules=["0"]))
        with pytest.raises(ValueError, match="layer 0: r must lie between 1 and the width n = 12, got 13"):
            orthogonal_lora_(model, slot=0)

    @pytest.mark.parametrize("start", [False, "pissa", "olora"])
    def test_loras_that_do_something_already(self, start: bool | str):
        with pytest.raises(
            ValueError, match="lora_B of 0 is not zero: adapter 'default' was trained already"
        ):
            orthogonal_lora_(adapted(init_lora_weights=start), slot=0)

    def test_dora_and_trained_biases(self):
        with pytest.raises(ValueError, match="no plain LoRA on 0: it was made with use_dora=True"):
            orthogonal_lora_(adapted(use_dora=True), slot=0)
        with pytest.raises(ValueError, match="lora_bias=True"):
            orthogonal_lora_(adapted(lora_bias=True), slot=0)

    def test_embeddings(self):
        model = get_peft_model(nn.Sequential(nn.Embedding(9, 4)), LoraConfig(r=2, target_modules=["0"]))
        with pytest.raises(ValueError, match="0 is an embedding"):
            orthogonal_lora_(model, slot=0)

    def test_meta_device(self):
        with torch.device("meta"), warnings.catch_warnings():
            model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        with pytest.raises(ValueError, match="the LoRA of 0 is on the meta device"):
            orthogonal_lora_(model, slot=0)

    def test_models_without_adapters(self):
        with pytest.raises(ValueError, match="no LoRA named 'default'; it has none"):
            orthogonal_lora_(perceptron(), slot=0)


def test_rslora_scaling_is_left_alone():
    model = adapted(use_rslora=True, lora_alpha=6)
    orthogonal_lora_(model, slot=0)
    layer = lora_layers(model, "default")["0"]
    nn.init.normal_(layer.lora_B["default"].weight)
    A, B = matrices(layer, "default")
    assert torch.allclose(layer.get_delta_weight("default"), 6 / 2**0.5 * B @ A)
