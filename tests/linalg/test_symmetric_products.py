import itertools
import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.linalg import symmetric_products, triton_symmetric
from weightlab.linalg.symmetric_products import gram, relative_cost, symmetric_product


def commuting(m, batch, dtype, seed):
    """Two symmetric matrices with the same eigenvectors, and their product in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, m, m, dtype=torch.float64, generator=generator) / m**0.5
    a = x @ x.mT
    b = 0.5 * a - a @ a
    return a.to(dtype), b.to(dtype)


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(0, 70),
    n=st.integers(0, 30),
    batch=st.sampled_from([(), (1,), (3,)]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_gram_is_the_product(m, n, batch, transposed, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch, n, m) if transposed else (*batch, m, n)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    x = x.mT if transposed else x
    torch.testing.assert_close(gram(x), x @ x.mT, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 70),
    batch=st.sampled_from([(), (1,), (3,)]),
    alpha=st.sampled_from([1.0, -0.3]),
    terms=st.integers(0, 2),
    tensors=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_symmetric_product_is_the_sum(m, batch, alpha, terms, tensors, seed):
    a, b = commuting(m, batch, torch.float64, seed)
    before = a.clone(), b.clone()
    factors = torch.randn(terms, *batch, 1, 1, dtype=torch.float64) if tensors else [0.7, -2.0][:terms]
    plus = list(zip(factors, (a, b), strict=False))
    expected = alpha * (a @ b)
    for factor, matrix in plus:
        expected = expected + factor * matrix
    torch.testing.assert_close(symmetric_product(a, b, plus, alpha), expected, rtol=1e-11, atol=1e-12)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


@pytest.mark.parametrize("rows", [768, 769])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strips_partition_the_rows_and_leave_no_tile_out(rows, dtype):
    x = torch.empty(rows, 1, dtype=dtype)
    strips = list(symmetric_products._strips(x))
    assert strips[0][0] == 0
    assert strips[-1][1] == rows
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(strips))
    assert len(strips) == (8 if dtype == torch.float32 else 4)
    done = sum((stop - start) * (rows - start) for start, stop in strips)
    assert done < 0.64 * rows**2


def test_nan_spreads_no_further_than_in_the_plain_product():
    x = torch.randn(3, 40, 8)
    x[1, 5, 3] = float("nan")
    torch.testing.assert_close(gram(x), x @ x.mT, equal_nan=True)


def test_gradients_go_through():
    x = torch.randn(20, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gram, (x,))


def test_cost_is_that_of_the_plain_product_where_there_is_no_other():
    assert relative_cost(64, torch.float32, torch.device("cpu")) == 1
    assert relative_cost(4096, torch.bfloat16, torch.device("meta")) == 1
    assert 0.5 < relative_cost(1024, torch.float32, torch.device("cpu")) < 1


def test_without_triton_or_a_card_cuda_falls_back_to_torch(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(triton_symmetric, "triton", None)
    assert not triton_symmetric.applies(4096, torch.bfloat16, cuda)

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(triton_symmetric, "triton", object())
    monkeypatch.setattr(triton_symmetric, "multiply", broken)
    triton_symmetric._works.cache_clear()
    assert not triton_symmetric.applies(4096, torch.bfloat16, cuda)
    triton_symmetric._works.cache_clear()


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernel_in_the_interpreter():
    # bfloat16 is left out: NumPy, on which the interpreter works, does not have it.
    program = """
        import torch
        from weightlab.linalg.triton_symmetric import multiply

        generator = torch.Generator().manual_seed(0)
        for m, k, batch in ((37, 50, 2), (64, 32, 1), (33, 130, 1), (16, 16, 3), (100, 8, 1)):
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 3e-3)):
                x = torch.randn(batch, m, k, generator=generator).to(dtype)
                out = multiply(x, x, torch.full((batch, m, m), float("nan"), dtype=dtype), block=16)
                expected = x.double() @ x.double().mT
                assert (out - expected).norm() < tolerance * expected.norm()
                assert torch.equal(out, out.mT)

                s = (expected / expected.norm()).to(dtype)
                t = multiply(s, s, s.clone(), alpha=2.0, beta=-3.0, block=32)
                expected = 2 * s.double() @ s.double() - 3 * s.double()
                assert (t - expected).norm() < tolerance * expected.norm()
        x = torch.randn(40, 24, generator=generator).mT
        out = multiply(x, x, torch.empty(24, 24), block=16)
        assert torch.allclose(out, x @ x.mT, atol=1e-4)
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
