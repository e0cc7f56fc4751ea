import pytest
import torch

from weightlab.inspect import esd


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_matrix_has_its_squared_singular_values():
    W = gaussian(7, 12)
    expected = torch.linalg.svdvals(W.double()).square().flip(0)
    torch.testing.assert_close(esd(W), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(esd(W.mT), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(esd(W, normalize="1/N"), expected / 12, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (2, 1, 2)])
def test_slices_of_a_kernel_are_pooled_and_halved(kernel):
    W = gaussian(5, 4, *kernel)
    slices = [W.double().flatten(2)[:, :, i] for i in range(W[0, 0].numel())]
    expected = torch.cat([torch.linalg.svdvals(one).square() / 2 for one in slices]).sort().values
    torch.testing.assert_close(esd(W), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(esd(W, normalize="1/N"), expected / 5, rtol=1e-9, atol=1e-12)


def test_flattened_kernel_is_one_matrix():
    W = gaussian(5, 4, 3, 3)
    torch.testing.assert_close(esd(W, conv="flattened"), esd(W.reshape(5, 36)))


def test_float32_and_half_precision():
    W = gaussian(6, 9).bfloat16()
    assert torch.equal(esd(W), esd(W.double()))
    single = esd(W, dtype=torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), esd(W), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.ones(3), {}, r"shape \(3,\)"),
        (torch.ones(3, 3), {"conv": "pooled"}, "conv must be"),
        (torch.ones(3, 3), {"normalize": "N"}, "normalize must be"),
        (torch.full((2, 2), float("inf")), {}, "NaN or infinity"),
    ],
)
def test_bad_input(weight, options, message):
    with pytest.raises(ValueError, match=message):
        esd(weight, **options)
