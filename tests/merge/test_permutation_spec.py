from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightlab.merge import (
    Permutation,
    PermutationSpec,
    apply_permutation,
    check_equivalence,
    weight_matching,
)


class ResidualNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 5, 3, padding=1)
        self.outer = nn.Conv2d(5, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 8, 1, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.outer(F.relu(self.inner(x)))
        return self.head(self.down(x).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, C // self.heads).transpose(1, 2)
            for part in self.qkv(self.ln(x)).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.down(F.gelu(self.up(x)))


class TinyGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 12)
        self.wpe = nn.Embedding(5, 12)
        self.blocks = nn.Sequential(Block(12, 3), Block(12, 3))
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        return self.head(self.blocks(x))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 2, groups=2),
        nn.Conv2d(8, 8, 1, groups=8), nn.ConvTranspose2d(8, 6, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


def randomized(model: nn.Module) -> nn.Module:
    """No bias, norm or statistic stays at a value that hides a mistake."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.rand_like(tensor) + 0.1 if "var" in name else 0.3 * torch.randn_like(tensor)
                )
    return model.double()


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2)), (6, 4)),
    "conv": (conv_net, (2, 1, 8, 8)),
    "residual": (ResidualNet, (2, 3, 6, 6)),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 3, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_inferred_groups_leave_the_function_as_it_is(name: str):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model, x = randomized(build()), torch.randn(*shape, dtype=torch.float64)
    spec = PermutationSpec.from_model(model, x)
    perm = Permutation.random(spec.group_sizes(model.state_dict()))
    assert not perm.is_identity()
    assert check_equivalence(model, perm, x, spec=spec, rtol=1e-10) <= 1e-10
    moved = apply_permutation(spec, perm, model.state_dict())
    assert any(not torch.equal(moved[key], tensor) for key, tensor in model.state_dict().items())


def test_gpt_with_tied_embeddings():
    torch.manual_seed(0)
    model, ids = randomized(TinyGPT()), torch.randint(11, (2, 5))
    spec = PermutationSpec.from_model(model, ids)
    assert spec.axes["wte.weight"] == spec.axes["head.weight"] == (None, "wte")
    assert spec.axes["blocks.0.qkv.weight"] == ((3, "blocks.0.qkv", "blocks.0.qkv#2"), "wte")
    assert spec.axes["blocks.0.proj.weight"] == ("wte", ("blocks.0.qkv", "blocks.0.qkv#2"))
    assert spec.axes["blocks.1.down.weight"] == ("wte", "blocks.1.up")
    perm = Permutation.random(spec.group_sizes(model.state_dict()))
    assert check_equivalence(model, perm, ids, spec=spec, rtol=1e-10) <= 1e-10


class AddedProducts(nn.Module):
    """As GPT-2 of transformers does it: weights stored input first, products by addmm, a cache that starts empty."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))
        self.mix = nn.Parameter(torch.randn(3, 6, 5))
        self.down, self.down_bias = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        up = torch.addmm(self.up_bias, x, self.up)
        cached = torch.cat([torch.tensor([], dtype=up.dtype), up], dim=-2)
        mixed = torch.baddbmm(torch.ones(1, 1, 5).double(), batch1=cached.expand(3, -1, -1), batch2=self.mix)
        return torch.addmm(self.down_bias, mat1=mixed.sum(0).tanh(), mat2=self.down, alpha=0.5)


def test_products_that_are_added_to_and_caches_that_start_empty():
    torch.manual_seed(0)
    model, x = randomized(AddedProducts()), torch.randn(7, 4).double()
    spec = PermutationSpec.from_model(model, x)
    assert spec.axes["up"] == (None, "up")
    assert spec.axes["up_bias"] == ("up",)
    assert spec.axes["mix"][1] == "up"
    assert spec.axes["down"] == (spec.axes["mix"][2], None)
    perm = Permutation.random(spec.group_sizes(model.state_dict()))
    assert check_equivalence(model, perm, x, spec=spec, rtol=1e-10) <= 1e-10


def test_residual_stream_is_one_group_and_inner_channels_have_their_own():
    axes = PermutationSpec.from_model(ResidualNet(), torch.randn(2, 3, 6, 6)).axes
    assert axes["stem.weight"] == ("stem", None, None, None)
    assert axes["norm.weight"] == axes["norm.running_var"] == axes["outer.bias"] == ("stem",)
    assert axes["norm.num_batches_tracked"] == ()
    assert axes["inner.weight"] == ("inner", "stem", None, None)
    assert axes["outer.weight"] == ("stem", "inner", None, None)
    assert axes["down.weight"][:2] == ("down", "stem")
    assert axes["head.weight"] == (None, "down")


def test_grouped_and_depthwise_convolutions_and_blocks_after_flatten():
    axes = PermutationSpec.from_model(conv_net(), torch.randn(2, 1, 8, 8)).axes
    # Two norm groups of two channels, which are also the two blocks of the grouped convolution.
    assert axes["0.weight"][0] == axes["1.weight"][0] == ("0", "0#2")
    assert axes["4.weight"][:2] == (("0", "4"), "0#2")
    assert axes["5.weight"][:2] == (("0", "4"), None)
    assert axes["6.weight"][:2] == (("0", "4"), "6")
    assert axes["9.weight"] == (None, ("6", 4))


def test_group_on_both_axes_of_a_tensor_is_fixed():
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.c(x + self.b(x))

    assert PermutationSpec.from_model(Loop(), torch.randn(2, 3)).groups == ()


def test_operations_that_do_not_commute_fix_their_units():
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y = torch.cumsum(y, -1)
            return self.c(F.relu(self.b(y)))

    assert PermutationSpec.from_model(Sorted(), torch.randn(2, 3)).groups == ("b",)


def test_names_and_heads_of_pytorchs_attention():
    spec = PermutationSpec.from_model(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8)
    )
    assert spec.axes["self_attn.in_proj_weight"] == ((3, "self_attn.in_proj", "self_attn.in_proj#2"), None)
    assert spec.axes["self_attn.out_proj.weight"] == (None, ("self_attn.in_proj", "self_attn.in_proj#2"))
    assert spec.axes["linear1.weight"] == ("linear1", None)
    assert (spec.sizes["self_attn.in_proj"], spec.sizes["self_attn.in_proj#2"]) == (2, 4)


def test_half_of_an_axis_keeps_its_permutation_and_constants_fix_theirs():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.scaled, self.out = (
                nn.Linear(3, 8), nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            gate, value = self.up(x).chunk(2, dim=-1)
            return self.out(self.scaled(x) * torch.arange(6.0) + self.down(F.silu(gate) * value))

    axes = PermutationSpec.from_model(Gated(), torch.randn(2, 3)).axes
    assert axes["up.weight"] == ((2, "up"), None)
    assert axes["down.weight"] == (None, "up")


def test_unused_parameters_and_outputs_are_fixed():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.register_parameter("unused", nn.Parameter(torch.randn(4)))
    spec = PermutationSpec.from_model(model, torch.randn(2, 3))
    assert spec.axes["unused"] == (None,)
    assert spec.axes["1.weight"] == (None, "0")


def test_tracing_leaves_the_model_and_the_random_state_alone():
    model = ResidualNet().train()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    PermutationSpec.from_model(model, torch.ones(2, 3, 6, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_forward_pass_that_hides_from_pytorch_is_noticed():
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tensor(self.a(x).tolist()))

    with pytest.raises(ValueError, match="the permuted model is another function"):
        PermutationSpec.from_model(Hidden(), torch.randn(2, 3))


SHAPES = {"a": torch.zeros(4, 3), "b": torch.zeros(2, 4)}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"a": ("h", None), "b": (None, "h", None)}, r"b has 2 axes, shape \(2, 4\), but .* 3"),
        ({"a": (None, "h"), "b": (None, "h")}, r"b has an axis of length 4, but \('h',\) makes 3 \('h' 3 by a\)"),
        ({"a": (("h", 3), None)}, r"a has an axis of length 4, but \('h', 3\) makes 3"),
        ({"a": (("g", "h"), None)}, r"the size of group 'g' cannot be told from a: give it in sizes="),
        ({"c": ("h",)}, "names 'c', which the parameters do not have"),
    ],
)  # fmt: skip
def test_tables_that_do_not_fit(axes: dict[str, tuple], message: str):
    with pytest.raises(ValueError, match=message):
        PermutationSpec(axes).factors(SHAPES)


def test_bad_tables():
    with pytest.raises(ValueError, match="a has group 'h' on two axes"):
        PermutationSpec({"a": ("h", ("h", 2))})
    with pytest.raises(TypeError, match="a has the axis 3; it must be None"):
        PermutationSpec({"a": (3, None)})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="sizes names 'g'"):
        PermutationSpec({"a": ("h", None)}, sizes={"g": 3})


def test_tied_tensors_must_have_the_same_axes():
    weight = torch.randn(4, 4)
    with pytest.raises(ValueError, match="a and b are one tensor"):
        PermutationSpec({"a": ("h", None), "b": (None, "h")}).factors({"a": weight, "b": weight})


def test_products_of_groups_are_told_apart_by_other_tensors():
    spec = PermutationSpec({"x": (("g", "h"),), "y": ("g",)})
    assert spec.group_sizes({"x": torch.zeros(6), "y": torch.zeros(2)}) == {"g": 2, "h": 3}


def test_matching_undoes_a_permutation_of_heads_streams_and_tied_embeddings():
    torch.manual_seed(0)
    model, ids = randomized(TinyGPT()), torch.randint(11, (2, 5))
    a = model.state_dict()
    spec = PermutationSpec.from_model(model, ids)
    hidden = Permutation.random(spec.group_sizes(a))
    b = apply_permutation(spec, hidden, a)
    found = weight_matching(a, b, spec, n_restarts=20)
    assert found.distance == 0
    assert found.compose(hidden).is_identity()
