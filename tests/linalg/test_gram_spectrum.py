import pytest
import torch

from weightlab.linalg import gram_eigenvalues, gram_spectrum


def gaussian(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(params=["batched", "alone", "copied"])
def path(request, monkeypatch):
    monkeypatch.setattr(gram_spectrum, "_ALONE", 1000 if request.param == "batched" else 1)
    monkeypatch.setattr(gram_spectrum, "_COPIED", range(1000 if request.param == "copied" else 0))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (12, 12), (5, 33), (33, 5), (2, 3, 8, 6)])
@pytest.mark.parametrize(("chunk", "strip"), [(1, 3), (50, 5), (1 << 22, 1), (1 << 22, 256)])
def test_are_squared_singular_values(shape, chunk, strip, monkeypatch):
    monkeypatch.setattr(gram_spectrum, "_CHUNK", chunk)
    monkeypatch.setattr(gram_spectrum, "_STRIP", strip)
    W = gaussian(*shape)
    expected = torch.linalg.svdvals(W).square().flip(-1)
    found = gram_eigenvalues(W)
    assert found.shape == (*shape[:-2], min(shape[-2:]))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_widened_before_it_is_squared(dtype):
    W = gaussian(6, 40, dtype=dtype)
    assert torch.equal(gram_eigenvalues(W), gram_eigenvalues(W.double()))
    assert gram_eigenvalues(W, torch.float32).dtype == torch.float32


@pytest.mark.usefixtures("path")
def test_transposes_and_strides_do_not_matter():
    W = gaussian(9, 20)
    expected = gram_eigenvalues(W)
    torch.testing.assert_close(gram_eigenvalues(W.mT), expected, rtol=1e-12, atol=1e-12)
    padded = gaussian(18, 40)
    padded[::2, ::2] = W
    for strided in (padded[::2, ::2], padded[::2, ::2].mT, W.mT.contiguous().mT):
        torch.testing.assert_close(gram_eigenvalues(strided), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("path")
def test_low_rank_is_never_negative_and_ascends():
    W = gaussian(30, 2) @ gaussian(2, 50, seed=1)
    found = gram_eigenvalues(W)
    assert (found >= 0).all()
    assert (found.diff() >= 0).all()
    assert (found[:-2] <= 1e-12 * found[-1]).all()
    assert torch.equal(gram_eigenvalues(torch.zeros(3, 4)), torch.zeros(3, dtype=torch.float64))


@pytest.mark.usefixtures("path")
def test_the_input_stays_as_it_was():
    for shape in ((4, 6), (6, 4)):
        W = gaussian(*shape).requires_grad_()
        before = W.detach().clone()
        assert not gram_eigenvalues(W).requires_grad
        assert torch.equal(W, before)


def test_both_ways_agree_in_float32(monkeypatch):
    W = gaussian(40, 70, dtype=torch.float32)
    batched = gram_eigenvalues(W, torch.float32)
    monkeypatch.setattr(gram_spectrum, "_ALONE", 1)
    torch.testing.assert_close(gram_eigenvalues(W, torch.float32), batched, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    ("W", "dtype", "error", "message"),
    [
        (torch.ones(3, 3, dtype=torch.int32), torch.float64, TypeError, "got torch.int32"),
        (torch.ones(3, 3), torch.bfloat16, TypeError, "dtype must be torch.float64 or torch.float32"),
        (torch.ones(3), torch.float64, ValueError, r"got \(3,\)"),
        (torch.ones(0, 3), torch.float64, ValueError, r"shape \(0, 3\)"),
        (torch.ones(3, 3, device="meta"), torch.float64, ValueError, "meta device"),
        (torch.tensor([[1.0, float("nan")]]), torch.float64, ValueError, "NaN or infinity"),
        (torch.full((2, 2), 1e30), torch.float32, ValueError, "overflow torch.float32"),
    ],
)
def test_bad_input(W, dtype, error, message):
    with pytest.raises(error, match=message):
        gram_eigenvalues(W, dtype)
