from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from weightlab.adapters.block_affine import (
    BlockAffine,
    block_shape,
    bone_delta,
    bone_inverse,
    bone_linear,
    bone_weight,
    resolve_variant,
    slice_sum,
)

VARIANTS = ("affine", "affine_row", "additive", "mini")
AFFINE = ("affine", "affine_row")


def reference(weight: Tensor, blocks: Tensor, variant: str) -> Tensor:
    """Block by block, from the formulas."""
    out, inputs = weight.shape
    updated = weight.clone()
    if variant in AFFINE:
        r = blocks.shape[-1]
        for a, b in product(range(out // r), range(inputs // r)):
            rows, columns = slice(a * r, (a + 1) * r), slice(b * r, (b + 1) * r)
            block = blocks[a if variant == "affine" else b]
            updated[rows, columns] += weight[rows, columns] @ block + block
        return updated
    for i, j in product(range(out), range(inputs)):
        updated[i, j] += blocks[j % len(blocks), i % blocks.shape[1]]
    return updated


def draw(
    out: int, inputs: int, r: int, variant: str, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(out * 100 + inputs)
    weight = torch.randn(out, inputs, dtype=dtype, generator=generator)
    shape = block_shape(out, inputs, r, variant, 3 if variant == "mini" else None)
    return weight, 0.3 * torch.randn(shape, dtype=dtype, generator=generator)


# Square by columns and by rows, both rectangles, one block only, and for the additive ones a remainder.
SIZES = [(12, 12, 4), (12, 8, 4), (6, 12, 3), (3, 3, 3), (6, 4, 1)]
CASES = [(*size, variant) for size in SIZES for variant in VARIANTS] + [
    (6, 10, 4, "additive"),
    (9, 7, 5, "mini"),
    (6, 10, 10, "additive"),
]


@pytest.mark.parametrize(("out", "inputs", "r", "variant"), CASES)
class TestAgainstTheFormulas:
    def test_weight_update_and_inverse(self, out: int, inputs: int, r: int, variant: str):
        weight, blocks = draw(out, inputs, r, variant)
        expected = reference(weight, blocks, variant)
        torch.testing.assert_close(bone_weight(weight, blocks, variant), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(bone_delta(weight, blocks, variant), expected - weight, rtol=0, atol=1e-12)
        torch.testing.assert_close(bone_inverse(expected, blocks, variant), weight, rtol=0, atol=1e-10)

    def test_linear_and_its_gradients(self, out: int, inputs: int, r: int, variant: str):
        weight, blocks = draw(out, inputs, r, variant)
        x = torch.randn(2, 3, inputs, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(out, dtype=torch.float64, requires_grad=True)
        blocks.requires_grad_()
        expected = F.linear(x, reference(weight, blocks.detach(), variant), bias)
        torch.testing.assert_close(
            bone_linear(x, weight, blocks, bias, variant), expected, rtol=0, atol=1e-12
        )
        assert torch.autograd.gradcheck(
            lambda *a: bone_linear(a[0], weight, a[1], a[2], variant), (x, blocks, bias)
        )

    def test_starts_at_the_base_bit_for_bit(self, out: int, inputs: int, r: int, variant: str):
        weight, blocks = draw(out, inputs, r, variant, torch.float32)
        x, bias = torch.randn(5, inputs), torch.randn(out)
        assert torch.equal(bone_weight(weight, 0 * blocks, variant), weight)
        assert torch.equal(bone_linear(x, weight, 0 * blocks, bias, variant), F.linear(x, weight, bias))


class TestUpdate:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_memory_format_of_the_weight_does_not_matter(self, variant: str):
        weight, blocks = draw(12, 8, 4, variant)
        x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
        blocks.requires_grad_()
        strided = torch.empty(8, 24, dtype=torch.float64)[:, ::2].mT.copy_(weight)
        assert not strided.is_contiguous()
        outcomes = []
        for form in (weight, strided):
            y = bone_linear(x, form, blocks, None, variant)
            outcomes.append((y, *torch.autograd.grad(y.square().sum(), (x, blocks))))
        for a, b in zip(*outcomes, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 0, 8), (2, 1, 3, 8)])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_any_leading_shape(self, shape: tuple[int, ...], variant: str):
        weight, blocks = draw(12, 8, 4, variant)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        blocks.requires_grad_()
        y = bone_linear(x, weight, blocks, None, variant)
        torch.testing.assert_close(y, F.linear(x, bone_weight(weight, blocks, variant)))
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert blocks.grad is not None
        assert blocks.grad.shape == blocks.shape

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_a_trained_weight_gets_its_gradient(self, variant: str):
        weight, blocks = draw(12, 8, 4, variant)
        weight.requires_grad_(), blocks.requires_grad_()
        x = torch.randn(5, 8, dtype=torch.float64)
        fast = bone_linear(x, weight, blocks, None, variant).square().sum()
        plain = F.linear(x, bone_weight(weight, blocks, variant)).square().sum()
        for a, b in zip(
            torch.autograd.grad(fast, (weight, blocks)),
            torch.autograd.grad(plain, (weight, blocks)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_weight_is_differentiable_twice(self, variant: str):
        weight, blocks = draw(6, 6, 3, variant)
        inputs = (weight.requires_grad_(), blocks.requires_grad_())
        assert torch.autograd.gradcheck(lambda w, d: bone_weight(w, d, variant), inputs)
        assert torch.autograd.gradgradcheck(lambda w, d: bone_weight(w, d, variant).square(), inputs)

    def test_nothing_is_written_to(self):
        for variant in VARIANTS:
            weight, blocks = draw(12, 8, 4, variant)
            x, bias = torch.randn(5, 8, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
            before = [t.clone() for t in (x, weight, blocks, bias)]
            bone_linear(x, weight, blocks, bias, variant), bone_inverse(weight, blocks, variant)
            assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, blocks, bias), strict=True))

    def test_additive_is_lora_of_a_tiled_identity(self):
        weight, blocks = draw(6, 10, 4, "additive")
        lora_a = torch.eye(4, dtype=torch.float64).repeat(1, 3)[:, :10]
        expected = weight + blocks.mT @ lora_a
        torch.testing.assert_close(bone_weight(weight, blocks, "additive"), expected, rtol=0, atol=1e-12)

    def test_affine_of_a_zero_weight_tiles_the_blocks(self):
        _, blocks = draw(12, 8, 4, "affine")
        expected = blocks.reshape(12, 4).repeat(1, 2)
        assert torch.equal(bone_weight(torch.zeros(12, 8, dtype=torch.float64), blocks), expected)

    def test_additive_is_of_low_rank_and_affine_is_not(self):
        weight, blocks = draw(12, 12, 2, "additive")
        assert torch.linalg.matrix_rank(bone_delta(weight, blocks, "additive")) == 2
        weight, blocks = draw(12, 12, 2, "affine")
        assert torch.linalg.matrix_rank(bone_delta(weight, blocks)) == 12

    def test_gradient_of_an_additive_start_is_the_slice_sum(self):
        weight, blocks = draw(6, 10, 4, "additive")
        x, g = torch.randn(7, 10, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
        blocks.requires_grad_()
        bone_linear(x, weight, blocks, None, "additive").backward(g)
        torch.testing.assert_close(blocks.grad, (x[:, :4] + x[:, 4:8] + F.pad(x[:, 8:], (0, 2))).mT @ g)

    def test_aliases(self):
        weight, blocks = draw(12, 8, 4, "affine")
        assert torch.equal(bone_weight(weight, blocks, "bat"), bone_weight(weight, blocks, "affine"))
        assert resolve_variant("miss") == "additive"

    @given(st.integers(1, 40), st.data())
    @settings(deadline=None, max_examples=30)
    def test_slice_sum_pads_by_zeros(self, length: int, data: st.DataObject):
        r = data.draw(st.integers(1, length))
        x = torch.arange(2.0 * length).view(2, length)
        padded = F.pad(x, (0, -length % r))
        assert torch.equal(slice_sum(x, r), padded.view(2, -1, r).sum(1))

    @given(st.sampled_from(AFFINE), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
    @settings(deadline=None, max_examples=30)
    def test_composing_two_affine_updates(self, variant: str, m: int, n: int, r: int):
        """(W (I + D) + D) (I + E) + E = W (I + F) + F with F = D + E + D E."""
        weight, first = draw(m * r, n * r, r, variant)
        second = first.flip(0).mT
        both = first + second + first @ second
        twice = bone_weight(bone_weight(weight, first, variant), second, variant)
        torch.testing.assert_close(bone_weight(weight, both, variant), twice)


class TestInverse:
    def test_refuses_an_update_that_lost_the_weight(self):
        weight, blocks = draw(12, 8, 4, "affine")
        blocks[1] = -torch.eye(4)
        lost = bone_weight(weight, blocks)
        assert torch.equal(lost[4:8], -torch.eye(4, dtype=torch.float64).repeat(1, 2))
        with pytest.raises(ValueError, match=r"singular in 1 of 3 blocks, first in block 1; keep a copy"):
            bone_inverse(lost, blocks)

    def test_solves_in_float64(self):
        weight, blocks = draw(12, 8, 4, "affine", torch.float32)
        blocks[0] = torch.diag(torch.tensor([-0.999, 0.0, 0.0, 0.0]))
        updated = bone_weight(weight.double(), blocks.double())
        assert bone_inverse(updated, blocks).dtype == torch.float64
        torch.testing.assert_close(bone_inverse(updated, blocks), weight.double(), rtol=0, atol=1e-10)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_half_precision_with_float32_blocks(self, variant: str, dtype: torch.dtype):
        weight, blocks = draw(12, 8, 4, variant, torch.float32)
        weight = weight.to(dtype)
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        blocks.requires_grad_()
        y = bone_linear(x, weight, blocks, None, variant)
        y.sum().backward()
        exact_x, exact = x.detach().double().requires_grad_(), blocks.detach().double().requires_grad_()
        expected = bone_linear(exact_x, weight.double(), exact, None, variant)
        expected.sum().backward()
        assert y.dtype == dtype
        assert x.grad is not None
        assert x.grad.dtype == dtype
        assert blocks.grad is not None
        assert blocks.grad.dtype == torch.float32
        eps = torch.finfo(dtype).eps
        for got, wanted in ((y, expected), (x.grad, exact_x.grad), (blocks.grad, exact.grad)):
            assert (got.double() - wanted).norm() < 2 * eps * wanted.norm()

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_autocast(self, variant: str):
        weight, blocks = draw(12, 8, 4, variant, torch.float32)
        blocks.requires_grad_()
        x, bias = torch.randn(5, 8, requires_grad=True), torch.randn(12)
        with torch.autocast("cpu", torch.bfloat16):
            y = bone_linear(x, weight, blocks, bias, variant)
            assert torch.equal(
                y, bone_linear(x.bfloat16(), weight.bfloat16(), blocks, bias.bfloat16(), variant)
            )
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert x.grad is not None
        assert x.grad.dtype == torch.float32
        assert blocks.grad is not None
        assert blocks.grad.dtype == torch.float32

    def test_wider_dtype_wins_in_the_weight(self):
        weight, blocks = draw(12, 8, 4, "affine", torch.float32)
        assert bone_weight(weight.bfloat16(), blocks).dtype == torch.float32


class TestMemory:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_keeps_no_tensor_of_the_weights_size_but_the_weight(self, variant: str):
        weight, blocks = draw(12, 8, 4, variant)
        x, kept = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            bone_linear(x, weight, blocks.requires_grad_(), None, variant)
        addresses = {t.data_ptr() for t in kept}
        assert weight.data_ptr() in addresses
        allowed = {x.data_ptr()} if variant in AFFINE else set()
        others = [t for t in kept if t.data_ptr() not in {weight.data_ptr(), blocks.data_ptr(), *allowed}]
        assert [t.shape for t in others] == ([] if variant in AFFINE else [(5, 4)])


class TestCompile:
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does
    @pytest.mark.parametrize("variant", ["affine", "additive"])
    def test_without_graph_breaks(self, variant: str):
        weight, blocks = draw(12, 8, 4, variant)
        x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
        blocks.requires_grad_()

        def loss(x: Tensor, weight: Tensor, blocks: Tensor) -> Tensor:
            return bone_linear(x, weight, blocks, None, variant).square().sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(loss(x, weight, blocks), (x, blocks))
        for a, b in zip(torch.autograd.grad(compiled(x, weight, blocks), (x, blocks)), expected, strict=True):
            torch.testing.assert_close(a, b)


class TestParametrization:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_trains_the_blocks_alone_and_bakes(self, variant: str):
        layer = nn.Linear(8, 12).requires_grad_(False)
        plain, x = copy.deepcopy(layer), torch.randn(5, 8)
        parametrize.register_parametrization(layer, "weight", BlockAffine(4, variant, 3))
        assert torch.equal(layer(x), plain(x))
        (blocks,) = [p for p in layer.parameters() if p.requires_grad]
        layer(x).square().sum().backward()
        with torch.no_grad():
            blocks.sub_(0.1 * blocks.grad.sign())
        updated = bone_weight(plain.weight, blocks, variant)
        assert torch.equal(layer.weight, updated)
        assert torch.equal(layer.parametrizations["weight"].original, plain.weight)
        parametrize.remove_parametrizations(layer, "weight")
        assert torch.equal(layer.weight, updated)

    def test_assigning_solves_for_the_original(self):
        layer = nn.Linear(8, 12, dtype=torch.float64)
        parametrize.register_parametrization(layer, "weight", BlockAffine(4))
        nn.init.normal_(layer.parametrizations["weight"][0].blocks, std=0.1)
        wanted = torch.randn(12, 8, dtype=torch.float64)
        layer.weight = wanted
        torch.testing.assert_close(layer.weight.detach(), wanted)

    def test_state_dict_round_trip(self):
        layers = [nn.Linear(8, 12) for _ in range(2)]
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", BlockAffine(4))
        nn.init.normal_(layers[0].parametrizations["weight"][0].blocks)
        layers[1].load_state_dict(layers[0].state_dict())
        assert torch.equal(layers[0].weight, layers[1].weight)

    def test_nothing_is_registered_where_r_does_not_fit(self):
        layer = nn.Linear(8, 10)
        with pytest.raises(ValueError, match="out 10 and in 8"):
            parametrize.register_parametrization(layer, "weight", BlockAffine(4))
        assert not parametrize.is_parametrized(layer)


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((12, 8, 0), "r=0 must be an integer of at least 1"),
            ((12, 8, 2.0), "r=2.0 must be an integer"),
            ((12, 8, True), "r=True must be an integer"),
            (
                (12, 8, 3),
                "r=3 must divide both sides of the weight, out 12 and in 8: choose a divisor of 4, or var",
            ),
            ((12, 8, 8, "affine_row"), "r=8 must divide both sides of the weight, out 12 and in 8"),
            ((12, 8, 9, "additive"), "r=9 is larger than the weight of out 12 and in 8 allows: at most 8"),
            ((12, 8, 4, "mini", 5), "mini_r=5 must be an integer of at least 1 that divides out 12"),
            ((12, 8, 4, "mini", 0), "mini_r=0 must be"),
            ((12, 8, 4, "row"), "variant='row' must be one of affine, affine_row, additive, mini, bat, miss"),
        ],
    )
    def test_sizes(self, arguments: tuple, message: str):
        with pytest.raises(ValueError, match=message):
            block_shape(*arguments)

    @pytest.mark.parametrize("function", [bone_weight, bone_delta, bone_inverse])
    def test_shapes(self, function):
        weight = torch.zeros(12, 8)
        with pytest.raises(
            ValueError, match=r"blocks of shape \(3, 4\) do not fit variant='affine': \(out/r, r, r\)"
        ):
            function(weight, torch.zeros(3, 4))
        with pytest.raises(
            ValueError, match=r"\(2, 4, 4\) do not fit .* \(12, 8\) .* \(out/r, r, r\), here \(3, 4, 4\)"
        ):
            function(weight, torch.zeros(2, 4, 4))
        with pytest.raises(ValueError, match=r"\(4, 8\) do not fit .* \(r, out\), here \(4, 12\)"):
            function(weight, torch.zeros(4, 8), "additive")
        with pytest.raises(ValueError, match=r"weight of shape \(2, 2, 2\) must be a matrix"):
            function(torch.zeros(2, 2, 2), torch.zeros(1, 2, 2))

    def test_counts_of_trained_numbers(self):
        sizes = {
            v: torch.Size(block_shape(12, 8, 4, v, 3 if v == "mini" else None)).numel() for v in VARIANTS
        }
        assert sizes == {"affine": 12 * 4, "affine_row": 8 * 4, "additive": 12 * 4, "mini": 4 * 3}
