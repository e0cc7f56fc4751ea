import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from weightlab import cli
from weightlab.adapters import SorsaConfig
from weightlab.adapters.lora_layers import lora_layers
from weightlab.adapters.merge_files import merge_files, summary
from weightlab.adapters.orthogonal import orthogonal_lora_
from weightlab.exceptions import UsageError, WeightlabError

# PEFT asks transformers 5 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")

WEIGHTS = (0.6, -1.3)


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes)).eval()


def gpt2(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16, **{**ids, **options})
    ).eval()


BASES = {"llama": llama, "gpt2": gpt2}
TARGETS = {"llama": (["q_proj", "down_proj"], ["q_proj", "k_proj"]), "gpt2": (["c_attn"], ["c_attn", "wte"])}
TOKENS = torch.randint(0, 40, (3, 8), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 2e-5 * b.abs().max())


class Folders:
    """A base model and two adapters of it: ranks 3 (4 in places) and 2, one with rsLoRA."""

    def __init__(self, place: Path, name: str) -> None:
        self.name, self.base = name, place / "base"
        BASES[name]().save_pretrained(self.base)
        first, second = TARGETS[name]
        extra: dict[str, Any] = {"fan_in_fan_out": True} if name == "gpt2" else {}
        cat = LoraConfig(r=3, lora_alpha=5, target_modules=first, alpha_pattern={first[0]: 9}, rank_pattern={first[-1]: 4}, **extra)  # fmt: skip
        dog = LoraConfig(r=2, lora_alpha=2, target_modules=second, use_rslora=True, **extra)
        self.cat, self.dog = (place / animal for animal in ("cat", "dog"))
        for seed, (config, folder) in enumerate(((cat, self.cat), (dog, self.dog))):
            config.task_type, config.init_lora_weights = "CAUSAL_LM", False
            base = AutoModelForCausalLM.from_pretrained(self.base)
            torch.manual_seed(seed)
            get_peft_model(base, config).save_pretrained(folder)

    @property
    def both(self) -> list[str]:
        return [str(self.cat), str(self.dog)]

    def load(self, folder: Path) -> nn.Module:
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base), str(folder)).eval()

    def expected(self) -> torch.Tensor:
        model: Any = AutoModelForCausalLM.from_pretrained(self.base)
        for folder, weight in zip((self.cat, self.dog), WEIGHTS, strict=True):
            for key, layer in lora_layers(self.load(folder), "default").items():
                weights = model.get_submodule(key).weight.data
                weights += weight * layer.get_delta_weight("default")
        return logits(model.eval())


@pytest.fixture(scope="module", params=list(BASES))
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("adapters"), request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("adapters"), "llama")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestSums:
    def test_concatenation_loads_in_plain_peft_and_is_the_sum(self, folders: Folders, tmp_path: Path):
        out = tmp_path / "deep" / "both"
        steps: list[tuple[str, int, int]] = []
        result = merge_files(folders.both, str(out), weights=WEIGHTS, tell=lambda *step: steps.append(step))
        assert files(out) == {"adapter_config.json", "adapter_model.safetensors"}
        assert files(out.parent) == {"both"}
        assert close(logits(folders.load(out)), folders.expected())
        assert result["adapters"][0] == {"path": str(folders.cat), "weight": 0.6, "rank": 4, "layers": result["adapters"][0]["layers"]}  # fmt: skip
        assert result["rank"] == (5 if folders.name == "llama" else 6)
        stored = load_file(out / "adapter_model.safetensors")
        assert result["parameters"] == sum(t.numel() for name, t in stored.items() if "lora_" in name)
        assert result["warnings"] == []
        assert {what for what, _, _ in steps} == {"reading", "concatenating", "writing"}
        assert all(0 <= done < total for _, done, total in steps)
        assert json.loads(json.dumps(result)) == result
        assert f"-1.3 × {folders.dog} (rank 2)" in summary(result)

    def test_sum_goes_into_the_base_model(self, folders: Folders, tmp_path: Path):
        result = merge_files(folders.both, str(tmp_path / "model"), weights=WEIGHTS, method="sum")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert close(logits(merged.eval()), folders.expected())
        assert result["parameters"] == sum(p.numel() for p in merged.parameters())

    def test_half_precision_bases_are_rounded_once(self, plain: Folders, tmp_path: Path):
        base: Any = AutoModelForCausalLM.from_pretrained(plain.base).bfloat16()
        base.save_pretrained(tmp_path / "half")
        merge_files(plain.both, str(tmp_path / "out"), method="sum", base=str(tmp_path / "half"))
        merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        key = "model.layers.1.self_attn.q_proj"
        deltas = sum(
            lora_layers(plain.load(f), "default")[key].get_delta_weight("default")
            for f in (plain.cat, plain.dog)
        )
        exact = base.get_submodule(key).weight.float() + deltas
        there = merged.get_submodule(key).weight
        assert there.dtype == torch.bfloat16
        assert (there != exact.bfloat16()).float().mean() < 1e-3  # sums in another order may round apart

    def test_one_adapter_is_rescaled(self, plain: Folders, tmp_path: Path):
        merge_files([str(plain.cat)], str(tmp_path / "twice"), weights=[2.0])
        key = "model.layers.0.self_attn.q_proj"
        twice, once = (lora_layers(plain.load(f), "default")[key] for f in (tmp_path / "twice", plain.cat))
        assert close(twice.get_delta_weight("default"), 2 * once.get_delta_weight("default"))

    def test_the_same_adapter_twice_is_its_double(self, plain: Folders, tmp_path: Path):
        result = merge_files([str(plain.cat)] * 2, str(tmp_path / "twice"))
        assert [adapter["path"] for adapter in result["adapters"]] == [str(plain.cat), f"{plain.cat} (2)"]

    def test_our_own_adapters_become_loras_first(self, plain: Folders, tmp_path: Path):
        base = AutoModelForCausalLM.from_pretrained(plain.base)
        config = SorsaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        own = get_peft_model(base, config)
        for name, parameter in own.named_parameters():
            if "sorsa" in name:
                nn.init.normal_(parameter.data, std=0.3)
        own.save_pretrained(tmp_path / "own")
        result = merge_files([str(tmp_path / "own"), str(plain.cat)], str(tmp_path / "both"), weights=[1, 0])
        assert result["rank"] == 4 + 3
        assert close(logits(plain.load(tmp_path / "both")), logits(own.eval()))


class TestOrthogonal:
    def adapter(self, plain: Folders, folder: Path, **options: Any) -> str:
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(plain.base),
            LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )
        orthogonal_lora_(model, **options)
        for layer in lora_layers(model, "default").values():
            nn.init.normal_(layer.lora_B["default"].weight)
        model.save_pretrained(folder)
        return str(folder)

    def test_disjoint_slots_pass_and_other_seeds_are_told(self, plain: Folders, tmp_path: Path):
        cat = self.adapter(plain, tmp_path / "cat", slot=0)
        dog = self.adapter(plain, tmp_path / "dog", slot=1)
        cow = self.adapter(plain, tmp_path / "cow", slot=1, basis_seed=1)
        assert merge_files([cat, dog], str(tmp_path / "fine"))["warnings"] == []
        (message,) = merge_files([cat, cow], str(tmp_path / "mixed"))["warnings"]
        assert "slot 1, basis_seed 1" in message
        assert "‖B_aᵀB_b‖ is up to 0." in message

    def test_other_base_models_are_told(self, plain: Folders, tmp_path: Path):
        cat = Path(self.adapter(plain, tmp_path / "cat", slot=0))
        config = json.loads((cat / "adapter_config.json").read_text())
        (cat / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": "other/model"})
        )
        (message,) = merge_files([str(cat), str(plain.dog)], str(tmp_path / "out"))["warnings"][:1]
        assert message.startswith("the adapters name different base models")


class TestOut:
    def test_what_is_there_stays_unless_forced(self, plain: Folders, tmp_path: Path):
        out = tmp_path / "out"
        merge_files([str(plain.dog)], str(out))
        before = (out / "adapter_model.safetensors").read_bytes()
        with pytest.raises(UsageError, match="exists; give another --out, or --force to replace it"):
            merge_files(plain.both, str(out))
        assert (out / "adapter_model.safetensors").read_bytes() == before
        (out / "stale").touch()
        merge_files(plain.both, str(out), force=True)
        assert files(out) == {"adapter_config.json", "adapter_model.safetensors"}
        assert (out / "adapter_model.safetensors").read_bytes() != before

    def test_force_spares_what_is_no_adapter(self, plain: Folders, tmp_path: Path):
        (tmp_path / "letters").mkdir()
        (tmp_path / "letters" / "dear.txt").touch()
        with pytest.raises(UsageError, match="holds neither an adapter nor a model"):
            merge_files(plain.both, str(tmp_path / "letters"), force=True)
        with pytest.raises(UsageError, match="is one of the adapters to merge"):
            merge_files(plain.both, str(plain.cat), force=True)

    def test_failures_leave_nothing_behind(
        self, plain: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        def full(*arguments: Any, **options: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("weightlab.adapters.merge_files.save_file", full)
        with pytest.raises(WeightlabError, match=r"cannot write .*No space left on device"):
            merge_files(plain.both, str(tmp_path / "out"))
        assert files(tmp_path) == set()


class TestRefusals:
    @pytest.fixture
    def copy(self, plain: Folders, tmp_path: Path) -> Path:
        folder = tmp_path / "copy"
        folder.mkdir()
        for path in plain.cat.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    def state(self, folder: Path) -> dict[str, torch.Tensor]:
        return load_file(folder / "adapter_model.safetensors")

    def refused(
        self, plain: Folders, folder: Path, message: str, error: type[Exception] = UsageError
    ) -> None:
        with pytest.raises(error, match=message):
            merge_files([str(plain.dog), str(folder)], str(folder.parent / "out"))
        assert not (folder.parent / "out").exists()

    def test_folders_that_are_no_adapters(self, plain: Folders, tmp_path: Path, copy: Path):
        self.refused(plain, tmp_path / "nowhere", "no adapter in .*nowhere: it has no adapter_config.json")
        (copy / "adapter_config.json").write_text("{")
        self.refused(plain, copy, r"adapter_config\.json is no adapter's config")

    def test_pickles_and_damaged_files(self, plain: Folders, copy: Path):
        file = copy / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-5])
        self.refused(plain, copy, "is damaged")
        file.rename(copy / "adapter_model.bin")
        self.refused(plain, copy, "pickles are not read: load and save it with PEFT")

    def test_values_that_are_not_finite(self, plain: Folders, copy: Path):
        state = self.state(copy)
        next(iter(state.values()))[0, 0] = torch.nan
        save_file(state, copy / "adapter_model.safetensors")
        self.refused(plain, copy, "holds values that are not finite", WeightlabError)

    def test_other_shapes(self, plain: Folders, copy: Path):
        state = self.state(copy)
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        save_file({**state, name: state[name][:, :20].clone()}, copy / "adapter_model.safetensors")
        self.refused(
            plain, copy, r"q_proj has \(20,\) inputs and 32 outputs .* belong to different base models"
        )
        save_file({**state, name: state[name][:1].clone()}, copy / "adapter_model.safetensors")
        self.refused(plain, copy, "the factors of model.layers.0.self_attn.q_proj do not fit")

    def test_what_does_not_add_up(self, plain: Folders, copy: Path):
        state = self.state(copy)
        save_file(
            {**state, "base_model.model.lm_head.weight": torch.ones(2)}, copy / "adapter_model.safetensors"
        )
        self.refused(plain, copy, "lm_head.weight is neither lora_A nor lora_B")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weights": [1.0]}, "1 weights for 2 adapters"),
            ({"method": "linear"}, "unknown method 'linear'; use cat .* or sum"),
            ({"method": "sum", "base": "./nowhere"}, "no folder ./nowhere"),
        ],
    )
    def test_bad_requests(self, plain: Folders, tmp_path: Path, options: dict[str, Any], message: str):
        with pytest.raises(UsageError, match=message):
            merge_files(plain.both, str(tmp_path / "out"), **options)
        assert files(tmp_path) == set()

    def test_another_base_model(self, plain: Folders, tmp_path: Path):
        gpt2().save_pretrained(tmp_path / "gpt2")
        with pytest.raises(UsageError, match=r"has no layer model\.layers\.0"):
            merge_files(plain.both, str(tmp_path / "out"), method="sum", base=str(tmp_path / "gpt2"))
        assert files(tmp_path) == {"gpt2"}

    @pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
    def test_tied_weights_take_no_sum(self, tmp_path: Path):
        gpt2(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
        config = LoraConfig(r=2, target_modules=["wte"], task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).save_pretrained(
            tmp_path / "cat"
        )
        with pytest.raises(UsageError, match=r"transformer\.wte shares its weight with lm_head"):
            merge_files([str(tmp_path / "cat")], str(tmp_path / "out"), method="sum")
        merge_files([str(tmp_path / "cat")], str(tmp_path / "out"))


class TestCommand:
    def run(self, *arguments: str) -> int:
        return cli.run(["merge-adapters", *arguments])

    def test_merges_and_says_so(self, plain: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        out = str(tmp_path / "out")
        assert self.run(*plain.both, "--out", out, "--weights", "0.6,-1.3") == 0
        printed = capsys.readouterr().out
        assert f"0.6 × {plain.cat} (rank 4) + -1.3 × {plain.dog} (rank 2)" in printed
        assert close(logits(plain.load(tmp_path / "out")), plain.expected())

    def test_prints_one_json_object(self, plain: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        assert self.run(*plain.both, "--out", str(tmp_path / "out"), "--json") == 0
        printed = capsys.readouterr()
        result = json.loads(printed.out)
        assert (result["method"], result["rank"], result["out"]) == ("cat", 5, str(tmp_path / "out"))
        assert printed.err == ""

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            ([], 2, "Missing argument"),
            (["nowhere", "--out", "x"], 2, "no adapter in nowhere"),
            (["a", "b", "--out", "x", "--weights", "0.5,much"], 2, "--weights takes numbers by comma"),
            (["a", "b", "--out", "x", "--method", "linear"], 2, "'linear' is not one of 'cat', 'sum'"),
        ],
    )
    def test_wrong_requests(
        self, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
    ):
        assert self.run(*arguments) == code
        assert message in capsys.readouterr().err

    def test_help_has_an_example(self, capsys: pytest.CaptureFixture[str]):
        assert self.run("--help") == 0
        assert "weightlab merge-adapters cat dog --out both --weights" in capsys.readouterr().out
