import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.optim.quantized_buffer import decode, encode

LEVELS = {"int8": 255, "int4": 15}


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 9),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]),
    storage=st.sampled_from(["int8", "int4"]),
    seed=st.integers(0, 99),
)
def test_round_trip_is_off_by_half_a_step_at_most(rows, columns, scale, storage, seed):
    x = gaussian(rows, columns, seed=seed) * scale
    back = decode(encode(x, storage), columns)
    step = (x.amax(1) - x.amin(1)) / LEVELS[storage]
    slack = 4 * torch.finfo(torch.float32).eps * x.abs().amax(1)
    assert ((back - x).abs() <= (step / 2 + slack)[:, None]).all()
    torch.testing.assert_close(back.amin(1), x.amin(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(back.amax(1), x.amax(1), rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_every_level_is_used_in_order(storage):
    levels = LEVELS[storage]
    for columns in (levels + 1, levels + 2):
        x = torch.arange(columns).float().clamp(max=levels).expand(2, -1)
        buffer = encode(x, storage)
        assert torch.equal(decode(buffer, columns), x)
        assert buffer["codes"].unique().numel() >= levels // 2


@pytest.mark.parametrize("storage", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("value", [0.0, -3.7, 1e-30])
def test_constant_rows_come_back_exactly(storage, value):
    x = torch.full((3, 5), value)
    assert torch.equal(decode(encode(x, storage), 5), x)


def test_size_of_what_is_kept():
    def bytes_of(storage, columns):
        return sum(t.numel() * t.element_size() for t in encode(torch.randn(10, columns), storage).values())

    assert bytes_of("fp32", 64) == 10 * 64 * 4
    assert bytes_of("int8", 64) == 10 * (64 + 8)
    assert bytes_of("int4", 64) == 10 * (32 + 8)
    assert bytes_of("int4", 63) == 10 * (32 + 8)


def test_fp32_is_exact_and_float64_stays():
    x = gaussian(3, 4)
    assert torch.equal(decode(encode(x, "fp32"), 4), x)
    assert decode(encode(x.double(), "fp32"), 4).dtype == torch.float64


@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_row_that_is_not_finite_comes_back_as_nan_and_others_do_not(storage, bad):
    x = gaussian(3, 5)
    x[1, 2] = bad
    back = decode(encode(x, storage), 5)
    assert back.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("storage", ["fp32", "int8", "int4"])
def test_largest_range_and_empty_rows(storage):
    top = torch.finfo(torch.float32).max
    assert decode(encode(torch.tensor([[-top, top]]), storage), 2).isfinite().all()
    assert decode(encode(torch.empty(2, 0), storage), 0).shape == (2, 0)


def test_batches_are_encoded_as_their_matrices():
    x = gaussian(2, 3, 5)
    assert torch.equal(decode(encode(x, "int4"), 5)[1], decode(encode(x[1], "int4"), 5))


def test_unknown_storage():
    with pytest.raises(ValueError, match="fp32, int8, int4, got 'int2'"):
        encode(torch.ones(1, 1), "int2")
