import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from weightlab.adapters import SvfitConfig
from weightlab.adapters.singular_values import CACHE
from weightlab.adapters.svfit import SvfitLayer

# PEFT warns of what a plain module lacks.
pytestmark = pytest.mark.filterwarnings("ignore:.*Could not find a config file:UserWarning")


def base(seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)).to(dtype).eval()


def adapted(config, model=None):
    return get_peft_model(base() if model is None else model, config).eval()


def config(r="all", **settings):
    return SvfitConfig(r=r, **({"target_modules": ["0", "2"]} | settings))


def layers(model):
    return [module for module in model.modules() if isinstance(module, SvfitLayer)]


def train(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers(model):
            delta = layer.svfit_values[layer.active_adapters[0]]
            delta.add_(0.3 * torch.randn(delta.shape, generator=generator))


X = torch.linspace(-1, 1, 40).reshape(5, 8)


@pytest.mark.parametrize(("r", "count"), [("all", 8 + 6), (3, 6)])
def test_only_the_values_train(r, count):
    model = adapted(config(r))
    assert torch.equal(model(X), base()(X))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == count
    assert all("svfit_values" in n and (p == 0).all() for n, p in trained.items())


@pytest.mark.parametrize("relative", [False, True])
def test_layer_is_the_weight_with_its_values_changed(relative):
    model = adapted(config(5, relative=relative), base(dtype=torch.float64))
    train(model)
    for layer in layers(model):
        weight = layer.base_layer.weight
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        delta = layer.svfit_values["default"]
        changed = weight + (U[:, :5] * (delta * S[:5] if relative else delta)) @ Vh[:5]
        x = torch.randn(4, weight.shape[1], dtype=torch.float64)
        torch.testing.assert_close(layer(x), x @ changed.mT + layer.base_layer.bias)
        torch.testing.assert_close(layer.get_delta_weight("default"), changed - weight)


def test_gradient_keeps_features_alone():
    model = adapted(config(2), base(dtype=torch.float64))
    layer = layers(model)[0]
    x = torch.randn(50, 8, dtype=torch.float64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = layer(x)
    assert (50, 8) not in kept
    assert (50, 2) in kept
    g = torch.randn(50, 12, dtype=torch.float64)
    y.backward(g)
    factors = layer.factors("default")
    expected = ((g @ factors.left) * (x @ factors.right.mT)).sum(0)
    torch.testing.assert_close(layer.svfit_values["default"].grad, expected)


@pytest.mark.parametrize(("kind", "energy"), [("squared", 0.9), ("squared", 1.0), ("nuclear", 0.5)])
@pytest.mark.parametrize("save_factors", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_rank_by_energy_is_found_saved_and_loaded(kind, energy, save_factors, low_cpu_mem_usage, tmp_path):
    settings = config(None, energy=energy, energy_kind=kind, save_factors=save_factors)
    model = adapted(settings)
    for layer in layers(model):
        shares = torch.linalg.svdvals(layer.base_layer.weight.double()) ** (2 if kind == "squared" else 1)
        r = layer.ranks["default"]
        assert shares[:r].sum() / shares.sum() >= energy - 1e-12
        assert shares[: r - 1].sum() / shares.sum() < energy
        assert layer.svfit_values["default"].shape == (r,)
    assert settings.found_ranks == {layer.key: layer.ranks["default"] for layer in layers(model)}
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(loaded(X), model(X))


def test_rank_pattern_overrides_the_rule():
    model = adapted(config(None, energy=0.5, rank_pattern={"0": 3}))
    assert layers(model)[0].ranks == {"default": 3}
    assert list(model.peft_config["default"].found_ranks) == ["2"]


@pytest.mark.parametrize("save_factors", [True, False])
def test_what_is_saved(save_factors, tmp_path):
    from safetensors.torch import load_file

    model = adapted(config(save_factors=save_factors))
    train(model)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    names = {"svfit_values", "svfit_sigma", "svfit_checksum"}
    if save_factors:
        names |= {"svfit_left", "svfit_right"}
    assert {key.rpartition(".")[2] for key in state} == names
    CACHE.clear()
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(loaded(X), model(X))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["save_factors"] == save_factors


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("other", ["another base", "half precision"])
def test_values_without_vectors_are_refused_on_another_base(other, low_cpu_mem_usage, tmp_path):
    model = adapted(config(save_factors=False))
    train(model)
    model.save_pretrained(tmp_path)
    wrong = base(1) if other == "another base" else base(dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match="saved without its singular vectors, and the base weight of '0' differs"
    ):
        PeftModel.from_pretrained(wrong, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_values_with_vectors_load_on_another_precision(tmp_path):
    model = adapted(config())
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(dtype=torch.bfloat16), tmp_path).eval()
    torch.testing.assert_close(loaded(X.bfloat16()).float(), model(X), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("values", "r", "named"),
    [([3.0, 3.0, 2.0, 1.0], 4, "1 and 2"), ([3.0, 2.0, 1.0, 1.0], 3, "3 and 4")],
)
def test_equal_values_must_have_their_vectors_saved(values, r, named):
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor(values)))
    with pytest.raises(ValueError, match=f"singular values {named} of '0' are equal"):
        adapted(config(r, target_modules=["0"], save_factors=False), model)
    assert isinstance(model[0], nn.Linear)
    assert torch.equal(adapted(config(r, target_modules=["0"]), model)(torch.eye(4)), model(torch.eye(4)))


def test_second_adapter_is_of_its_own_kind(tmp_path):
    model = adapted(config(2, relative=True))
    train(model)
    first = model(X)
    model.add_adapter("second", config(5, save_factors=False))
    model.set_adapter("second")
    train(model, 2)
    second = model(X)
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    assert torch.equal(model(X), first)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "second").eval()
    assert torch.equal(loaded(X), second)
    loaded.load_adapter(tmp_path, "first")  # its file must not disturb the check of the other's
    model.delete_adapter("second")
    assert torch.equal(model(X), first)


def test_merged_weight_is_the_rescaled_one():
    model = adapted(config(), base(dtype=torch.float64))
    for layer in layers(model):
        with torch.no_grad():
            layer.svfit_values["default"].copy_(1 - layer.svfit_sigma["default"])
    merged = model.merge_and_unload()
    for index in (0, 2):
        U, _, Vh = torch.linalg.svd(base(dtype=torch.float64)[index].weight, full_matrices=False)
        torch.testing.assert_close(merged[index].weight, U @ Vh)


@pytest.mark.parametrize("relative", [False, True])
def test_plain_lora_of_the_same_rank(relative, tmp_path):
    model = adapted(config(3, relative=relative))
    train(model)
    lora, _ = model.to_lora(path=tmp_path)
    assert lora.r == 3
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path).eval()(X), model(X))


def test_convolutions_and_embeddings():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.conv = nn.Conv2d(1, 3, 3, padding=1)

        def forward(self, ids):
            return self.conv(self.embed(ids)[:, None])

    net, ids = Net(), torch.arange(6).reshape(2, 3)
    before = net(ids)
    model = get_peft_model(net, config(target_modules=["embed", "conv"]))
    assert torch.equal(model(ids), before)
    train(model)
    y = model(ids)
    assert not torch.allclose(y, before)
    assert [layer.ranks["default"] for layer in layers(model)] == [4, 3]
    torch.testing.assert_close(model.merge_and_unload()(ids), y)


def test_unloaded_values_are_refused():
    model = adapted(config(2, init_weights=False))
    with pytest.raises(RuntimeError, match="adapter 'default' of '0' was created with init_weights=False"):
        model(X)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, 'r=0 must be an integer of at least 1, "all", or None'),
        ({"r": "most"}, "r='most' must be"),
        ({"energy": 0}, r"energy=0 must be in \(0, 1\]"),
        ({"energy": 1.5}, r"energy=1\.5 must be in \(0, 1\]"),
        ({"energy_kind": "entropy"}, "energy_kind='entropy' must be one of squared, nuclear"),
        ({"svd": "fast"}, "svd='fast' must be one of auto, full, randomized"),
        (
            {"svd": "randomized", "save_factors": False},
            "svd='randomized' must be full or auto if save_factors=False",
        ),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SvfitConfig(target_modules=["0"], **settings)


def test_bad_weights_are_refused_and_nothing_is_left():
    model = base()
    with pytest.raises(ValueError, match="r=7 exceeds the rank of '2', whose weight is 6 x 12"):
        adapted(config(7), model)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    for r in (None, "all", 2):
        with pytest.raises(ValueError, match="weight of '2' holds NaN or infinity"):
            adapted(config(r), model)
    assert type(model[0]) is nn.Linear
    assert not hasattr(model, "peft_config")
    with pytest.raises(ValueError, match=r"r=None, but '0' has no values to find its rank from"):
        adapted(config(None), base().to("meta"))
