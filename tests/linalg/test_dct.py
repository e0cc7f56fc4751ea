import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.linalg import dct, dct_matrix
from weightlab.linalg.cosine_transform import paired_dct, paired_places

SIZES = [1, 2, 3, 4, 7, 8, 64, 101]


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [*SIZES, 1000])
def test_matrix_is_orthogonal_and_follows_the_formula(n):
    C = dct_matrix(n, dtype=torch.float64)
    torch.testing.assert_close(C @ C.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    i, j = n // 2, n - 1
    expected = np.sqrt(2 / n) * np.cos(np.pi * i * (2 * j + 1) / (2 * n)) * (1 if i else np.sqrt(0.5))
    assert C[i, j].item() == pytest.approx(expected, abs=1e-12)
    assert (C[0] == C[0, 0]).all()


def test_float32_matrix_is_the_float64_one_rounded_once():
    assert torch.equal(dct_matrix(100), dct_matrix(100, dtype=torch.float64).float())


def test_matrix_is_the_callers_own():
    dct_matrix(5).zero_()
    assert dct_matrix(5)[0, 0] != 0


@pytest.mark.parametrize("transform", ["matmul", "fft"])
@pytest.mark.parametrize("kind", [2, 3])
@pytest.mark.parametrize("n", SIZES)
def test_equals_scipy(n, kind, transform):
    x = gaussian(3, n)
    expected = torch.from_numpy(scipy.fft.dct(x.numpy(), kind, norm="ortho"))
    torch.testing.assert_close(dct(x, kind, transform=transform), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        dct(x.float(), kind, transform=transform), expected.float(), rtol=1e-5, atol=1e-5
    )


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 300), rows=st.integers(1, 4), seed=st.integers(0, 9))
def test_types_are_inverse_and_keep_norms_by_either_transform(n, rows, seed):
    x = gaussian(rows, n, seed=seed)
    for transform in ("matmul", "fft"):
        y = dct(x, 2, transform=transform)
        torch.testing.assert_close(dct(y, 3, transform=transform), x, rtol=0, atol=1e-11)
        torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 33])
def test_paired_order_holds_every_coefficient_once(n):
    x = gaussian(4, n)
    places, signs = paired_places(n, x.dtype, x.device)
    assert places.unique().numel() == n
    torch.testing.assert_close(paired_dct(x)[:, places] * signs, dct(x, transform="matmul"))


@pytest.mark.parametrize("n", [6, 9])
def test_transposed_and_strided_input_and_written_output(n):
    x = gaussian(n, 5).T
    expected = dct(x.contiguous(), transform="matmul")
    torch.testing.assert_close(dct(x, transform="fft"), expected)
    torch.testing.assert_close(
        dct(gaussian(5, 2 * n)[:, ::2], transform="fft"), dct(gaussian(5, 2 * n)[:, ::2])
    )
    out = torch.empty(5, 2 * (n // 2 + 1), dtype=x.dtype)
    assert paired_dct(x, out=out) is out
    assert torch.equal(out, paired_dct(x))


def test_any_dimension_and_batch():
    x = gaussian(2, 6, 5, 3)
    by_matrix = torch.einsum("ij,ajbc->aibc", dct_matrix(6, dtype=torch.float64), x)
    for transform in ("matmul", "fft"):
        torch.testing.assert_close(dct(x, dim=1, transform=transform), by_matrix)


def test_auto_takes_either_without_a_difference_that_matters():
    for n in (8, 500):
        x = gaussian(2, n, dtype=torch.float32)
        torch.testing.assert_close(dct(x), dct(x, transform="matmul"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [8, 300])
def test_half_precision_is_rounded_once(n, dtype):
    x = gaussian(2, n).to(dtype)
    assert torch.equal(dct(x), dct(x.float()).to(dtype))


@pytest.mark.parametrize("kind", [2, 3])
@pytest.mark.parametrize("transform", ["matmul", "fft"])
def test_gradients(kind, transform):
    for n in (1, 4, 5):
        x = gaussian(2, n).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: dct(x, kind, transform=transform), x)


def test_tables_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        dct(gaussian(2, 37), transform="fft")
        dct(gaussian(2, 37), transform="matmul")
    for transform in ("fft", "matmul"):
        x = gaussian(2, 37).requires_grad_()
        dct(x, transform=transform).sum().backward()
        assert x.grad is not None


def test_empty_and_nan():
    assert dct(torch.empty(3, 0)).shape == (3, 0)
    assert dct(torch.empty(0, 4)).shape == (0, 4)
    x = torch.ones(2, 8)
    x[0, 3] = torch.nan
    assert dct(x, transform="fft").isnan().all(1).tolist() == [True, False]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: dct(torch.ones(3, dtype=torch.cfloat)), TypeError, "complex64"),
        (lambda: dct(torch.ones(3, dtype=torch.long)), TypeError, "int64"),
        (lambda: dct(torch.ones(())), ValueError, "0-dim"),
        (lambda: dct(torch.ones(3), 1), ValueError, "type must be 2 or 3, got 1"),
        (lambda: dct(torch.ones(3), transform="fht"), ValueError, "transform.*'fht'"),
        (lambda: dct_matrix(-1), ValueError, "n must be at least 0, got -1"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
