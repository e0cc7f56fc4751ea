from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from weightlab.adapters import BoneConfig, bone_weight, tuner
from weightlab.adapters.bone import BoneLayer
from weightlab.adapters.lora_export import to_lora

VARIANTS = ("affine", "affine_row", "additive", "mini")


class Net(nn.Module):
    """One layer of each kind, of sizes that 2 and 4 divide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.linear = nn.Linear(8, 12)
        self.conv1d = Conv1D(8, 12)
        self.conv2d = nn.Conv2d(2, 4, 2, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv1d(torch.tanh(self.linear(self.embed(tokens))))
        return self.conv2d(x.unflatten(-1, (2, 2, 2)).flatten(0, 1)).flatten(1)


ALL = ["embed", "linear", "conv1d", "conv2d"]
TOKENS = torch.tensor([[0, 3, 11], [5, 3, 1]])


def base(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def adapted(variant: str, dtype: torch.dtype = torch.float32, fill: bool = True, **settings) -> PeftModel:
    mini_r = 2 if variant == "mini" else None
    config = BoneConfig(**{"r": 4, "variant": variant, "mini_r": mini_r, "target_modules": ALL, **settings})
    model = get_peft_model(base(dtype), config)
    if fill:
        shake(model)
    return model


def shake(model: nn.Module, adapter: str = "default", std: float = 0.2) -> None:
    torch.manual_seed(1)
    for layer in layers(model).values():
        nn.init.normal_(layer.bone_blocks[adapter], std=std)


def layers(model: nn.Module) -> dict[str, BoneLayer]:
    return {
        name.rpartition(".")[2]: module
        for name, module in model.named_modules()
        if isinstance(module, BoneLayer)
    }


def expected(variant: str, model: PeftModel, dtype: torch.dtype = torch.float32) -> Net:
    """The plain net with every weight updated by the functional form."""
    net = base(dtype)
    for name, layer in layers(model).items():
        weight, blocks = getattr(net, name).weight, layer.bone_blocks["default"].detach().to(dtype)
        with torch.no_grad():
            if name in ("embed", "conv1d"):
                weight.copy_(bone_weight(weight.mT, blocks, variant).mT)
            else:
                weight.copy_(bone_weight(weight.flatten(1), blocks, variant).view(weight.shape))
    return net


@pytest.mark.parametrize("variant", VARIANTS)
class TestLayers:
    def test_starts_at_the_base(self, variant: str):
        assert torch.equal(adapted(variant, fill=False)(TOKENS), base()(TOKENS))

    def test_every_kind_of_layer_computes_the_updated_weight(self, variant: str):
        model = adapted(variant, torch.float64)
        torch.testing.assert_close(model(TOKENS), expected(variant, model, torch.float64)(TOKENS))

    def test_merges_to_the_same_and_unmerges_bit_for_bit(self, variant: str):
        model = adapted(variant, torch.float64)
        before, weights = model(TOKENS), {n: m.base_layer.weight.clone() for n, m in layers(model).items()}
        model.merge_adapter()
        torch.testing.assert_close(model(TOKENS), before)
        model.unmerge_adapter()
        assert all(torch.equal(m.base_layer.weight, weights[n]) for n, m in layers(model).items())
        assert torch.equal(model(TOKENS), before)
        merged = model.merge_and_unload(safe_merge=True)
        assert not layers(merged)
        torch.testing.assert_close(merged(TOKENS), before)

    def test_half_precision_base(self, variant: str):
        model = adapted(variant, torch.bfloat16)
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        y = model(TOKENS)
        assert y.dtype == torch.bfloat16
        wanted = expected(variant, model, torch.bfloat16)(TOKENS)
        assert (y - wanted).norm() < 0.02 * wanted.norm()
        weights = {n: m.base_layer.weight.clone() for n, m in layers(model).items()}
        model.merge_adapter()
        assert (model(TOKENS) - wanted).norm() < 0.02 * wanted.norm()
        model.unmerge_adapter()
        assert all(torch.equal(m.base_layer.weight, weights[n]) for n, m in layers(model).items())

    def test_watched_layer_computes_the_same(self, variant: str):
        """A hook on the base makes the layer call it, rather than compute all by itself."""
        gradients, outputs, called = [], [], []
        for watched in (False, True):
            model = adapted(variant, torch.float64)
            if watched:
                for layer in layers(model).values():
                    layer.base_layer.register_forward_hook(lambda *_: called.append(1))
            y = model(TOKENS)
            y.square().sum().backward()
            outputs.append(y)
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        torch.testing.assert_close(*outputs)
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)
        assert len(called) == (4 if variant in ("additive", "mini") else 0)

    def test_dropout_falls_on_the_adapters_input_alone(self, variant: str):
        model = adapted(variant, torch.float64, target_modules=["linear", "conv1d"], dropout=0.5)
        eager = adapted(variant, torch.float64, target_modules=["linear", "conv1d"])
        model.eval()
        assert torch.equal(model(TOKENS), eager(TOKENS))
        model.train()
        for name, layer in layers(model).items():
            x = torch.randn(5, layer.shape[1], dtype=torch.float64)
            torch.manual_seed(3)
            y = layer(x)
            torch.manual_seed(3)
            dropped = F.dropout(x, 0.5)
            with torch.no_grad():
                weight = layer.layout.matrix(layer.base_layer.weight)
                delta = bone_weight(weight, layer.bone_blocks["default"], variant) - weight
            torch.testing.assert_close(y, layer.base_layer(x) + dropped @ delta.mT, msg=name)

    def test_autocast_in_training(self, variant: str):
        model = adapted(variant, target_modules=["linear", "conv1d"], dropout=0.1)
        for dropout in (0.1, 0.0):
            for layer in layers(model).values():
                layer.dropouts["default"] = nn.Dropout(dropout) if dropout else nn.Identity()
            with torch.autocast("cpu", torch.bfloat16):
                y = model(TOKENS)
            y.float().sum().backward()
            assert y.dtype == torch.bfloat16
        assert all(
            p.grad is not None and p.grad.dtype == torch.float32
            for p in model.parameters()
            if p.requires_grad
        )

    def test_saves_and_loads_with_its_variant(self, variant: str, tmp_path: Path):
        model = adapted(variant, rank_pattern={"conv1d": 2})
        model.save_pretrained(str(tmp_path))
        for low in (False, True):
            loaded = PeftModel.from_pretrained(base(), str(tmp_path), low_cpu_mem_usage=low)
            assert loaded.peft_config["default"].variant == variant
            torch.testing.assert_close(loaded(TOKENS), model(TOKENS), rtol=0, atol=1e-6)

    def test_rank_pattern(self, variant: str):
        model = adapted(variant, rank_pattern={"conv1d": 2})
        ranks = {name: layer.ranks["default"] for name, layer in layers(model).items()}
        assert ranks == {"embed": 4, "linear": 4, "conv1d": 2, "conv2d": 4}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does
@pytest.mark.parametrize("variant", ["affine", "additive"])
def test_compiles_without_graph_breaks(variant: str):
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    model = get_peft_model(net, BoneConfig(r=4, variant=variant, target_modules=["0", "2"])).base_model.model
    shake(model)
    x, trained = torch.randn(5, 8), [p for p in model.parameters() if p.requires_grad]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(model(x).square().sum(), trained)
    for a, b in zip(torch.autograd.grad(compiled(x).square().sum(), trained), expected, strict=True):
        torch.testing.assert_close(a, b)


class TestPeers:
    @pytest.mark.parametrize(("variant", "init"), [("affine", "bat"), ("additive", True), ("mini", "mini")])
    def test_computes_what_peft_does(self, variant: str, init: str | bool):
        names = ["linear"]
        ours = adapted(variant, target_modules=names, mini_r=4 if variant == "mini" else None)
        theirs = get_peft_model(base(), MissConfig(r=4, mini_r=4, init_weights=init, target_modules=names))  # type: ignore[arg-type]
        (blocks,) = [p for p in ours.parameters() if p.requires_grad]
        (same,) = [p for p in theirs.parameters() if p.requires_grad]
        assert same.shape == blocks.shape
        same.data.copy_(blocks.data)
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS))

    @pytest.mark.parametrize("variant", ["additive", "mini"])
    def test_is_written_as_lora_exactly(self, variant: str, tmp_path: Path):
        model = adapted(variant, torch.float64, target_modules=["embed", "linear", "conv2d"])
        config, state = to_lora(model, path=tmp_path)
        assert config.r == 4
        again = PeftModel.from_pretrained(base(torch.float64), str(tmp_path), autocast_adapter_dtype=False)
        assert isinstance(again.peft_config["default"], LoraConfig)
        torch.testing.assert_close(again(TOKENS), model(TOKENS))
        assert set_peft_model_state_dict(again, state).unexpected_keys == []

    @pytest.mark.parametrize("variant", ["affine", "affine_row"])
    def test_affine_is_no_lora(self, variant: str):
        with pytest.raises(TypeError, match="not of low rank"):
            to_lora(adapted(variant))


class TestSeveralAdapters:
    def model(self) -> PeftModel:
        model = adapted("affine", torch.float64, target_modules=["linear", "conv1d"])
        for name, variant in (("rows", "affine_row"), ("sum", "additive")):
            model.add_adapter(name, BoneConfig(r=2, variant=variant, target_modules=["linear", "conv1d"]))
            shake(model, name)
        return model

    def test_each_has_its_own_variant(self):
        model = self.model()
        for name, variant in (("default", "affine"), ("rows", "affine_row"), ("sum", "additive")):
            model.set_adapter(name)
            layer, weight = layers(model)["linear"], base(torch.float64).linear.weight
            x = torch.randn(5, 8, dtype=torch.float64)
            wanted = F.linear(x, bone_weight(weight, layer.bone_blocks[name], variant), layer.base_layer.bias)
            torch.testing.assert_close(layer(x), wanted)

    @pytest.mark.parametrize("names", [["default", "rows", "sum"], ["sum", "default"], ["rows", "default"]])
    def test_active_together_they_act_in_order(self, names: list[str]):
        model = self.model()
        model.base_model.set_adapter(names)
        layer, weight = layers(model)["linear"], base(torch.float64).linear.weight
        for name in names:
            weight = bone_weight(weight, layer.bone_blocks[name], layer.variants[name])
        x = torch.randn(5, 8, dtype=torch.float64)
        torch.testing.assert_close(layer(x), F.linear(x, weight, layer.base_layer.bias))
        before = model(TOKENS)
        model.merge_adapter()
        torch.testing.assert_close(model(TOKENS), before)

    def test_dropout_of_one_leaves_the_others(self):
        model = self.model()
        model.base_model.set_adapter(["default", "rows"])
        layer = layers(model)["linear"]
        x = torch.randn(5, 8, dtype=torch.float64)
        plain = layer(x)
        layer.dropouts["rows"] = nn.Dropout(1e-12)
        torch.testing.assert_close(layer(x), plain)

    def test_disabled_and_deleted(self):
        model = self.model()
        with model.disable_adapter():
            assert torch.equal(model(TOKENS), base(torch.float64)(TOKENS))
        model.delete_adapter("rows")
        assert all(
            set(m.bone_blocks) == set(m.variants) == {"default", "sum"} for m in layers(model).values()
        )


class TestLostWeight:
    def test_unmerges_where_the_update_has_no_inverse(self):
        model = adapted("affine", target_modules=["linear"])
        layer = layers(model)["linear"]
        layer.bone_blocks["default"].data.copy_(-torch.eye(4).expand(3, 4, 4))
        weight = layer.base_layer.weight.clone()
        model.merge_adapter()
        assert torch.equal(layer.base_layer.weight, -torch.eye(4).repeat(3, 2))
        model.unmerge_adapter()
        assert torch.equal(layer.base_layer.weight, weight)


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"r": 0}, "r=0 must be an integer of at least 1"),
            ({"rank_pattern": {"linear": 0}}, r"rank_pattern\['linear'\]=0 must be"),
            ({"variant": "bone"}, "variant='bone' must be one of affine, affine_row"),
            ({"mini_r": 2}, 'mini_r=2 must be None unless variant="mini"'),
            ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
            ({"bias": "lora_only"}, "bias='lora_only' must be one of none, all, bone_only"),
        ],
    )
    def test_config(self, settings: dict, message: str):
        with pytest.raises(ValueError, match=message):
            BoneConfig(target_modules=["linear"], **settings)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"r": 3}, "'linear': r=3 must divide both sides of the weight, out 12 and in 8.*rank_pattern"),
            ({"r": 16}, "'linear': r=16 must divide both sides of the weight, out 12 and in 8"),
            ({"r": 9, "variant": "additive"}, "'linear': r=9 is larger than .* out 12 and in 8"),
            ({"r": 4, "variant": "mini", "mini_r": 8}, "'linear': mini_r=8 .* divides out 12"),
        ],
    )
    @pytest.mark.parametrize("second", [False, True])
    def test_nothing_is_half_built_where_sizes_do_not_fit(self, settings: dict, message: str, second: bool):
        net = base()
        target = get_peft_model(net, BoneConfig(r=2, target_modules=["linear"])) if second else net
        before, x = copy.deepcopy(target.state_dict()), target(TOKENS)
        config = BoneConfig(target_modules=["embed", "linear"], **{**settings, "rank_pattern": {"embed": 4}})
        with pytest.raises(ValueError, match=message):
            target.add_adapter("more", config) if second else get_peft_model(net, config)  # type: ignore[union-attr]
        assert before.keys() == target.state_dict().keys()
        assert torch.equal(target(TOKENS), x)
        assert all(set(layer.variants) == {"default"} for layer in layers(target).values())
        assert set(layers(target)) == ({"linear"} if second else set())

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_weights_that_are_not_finite(self, variant: str):
        net = base()
        net.linear.weight.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match="'linear' holds NaN or infinity"):
            get_peft_model(net, BoneConfig(r=4, variant=variant, target_modules=["linear"]))
        assert isinstance(net.linear, nn.Linear)

    def test_quantised_weights_that_cannot_be_read(self, monkeypatch: pytest.MonkeyPatch):
        backend = SimpleNamespace(supports_merge=False, backend_name="opaque", layer_type="linear")
        monkeypatch.setattr(tuner, "resolve_quantization_backend", lambda *_, **__: backend)
        with pytest.raises(TypeError, match="'linear' is quantised by opaque, which cannot be undone"):
            get_peft_model(base(), BoneConfig(r=4, target_modules=["linear"]))
        model = get_peft_model(base(), BoneConfig(r=4, variant="additive", target_modules=["linear"]))
        assert torch.equal(model(TOKENS), base()(TOKENS))
