from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightlab.merge import average, slerp, task_arithmetic

SHAPES = {"weight": (5, 3), "kernel": (2, 3, 2, 2), "bias": (4,), "scale": ()}


def network(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return {**tensors, "count": torch.tensor(seed)}


def angle(x: Tensor, y: Tensor) -> float:
    x, y = x.flatten(), y.flatten()
    return math.acos(min(1.0, float(x @ y / (x.norm() * y.norm()))))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=4).filter(lambda weights: sum(weights) > 0.01))
def test_average_is_the_weighted_mean(weights: list[float]):
    networks = [network(seed) for seed in range(len(weights))]
    out = average(networks, weights)
    for name in SHAPES:
        expected = sum(w * x[name] for w, x in zip(weights, networks, strict=True)) / sum(weights)
        assert torch.allclose(out[name], expected, atol=1e-12)
    assert out["count"].item() == 0
    assert list(out) == list(networks[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_average_to_themselves(dtype: torch.dtype):
    a = network(0, dtype)
    for weights in (None, [0.1, 0.7, 0.2], [0, 0, 3]):
        out = average([a, dict(a), dict(a)], weights)
        assert all(torch.equal(x, a[name]) and x.dtype == a[name].dtype for name, x in out.items())
        assert all(x.data_ptr() != a[name].data_ptr() for name, x in out.items())


def test_half_precision_is_summed_in_float32():
    # In bfloat16 each of these additions would be lost.
    a = [{"w": torch.tensor([256.0]).bfloat16()}] + [
        {"w": torch.tensor([257.0 + 1]).bfloat16()} for _ in range(3)
    ]
    assert average(a)["w"].dtype == torch.bfloat16
    assert average(a)["w"].item() == 258  # 257.5, rounded once
    base, small = {"w": torch.tensor([256.0]).bfloat16()}, {"w": torch.tensor([258.0]).bfloat16()}
    assert task_arithmetic(base, [small] * 4, 0.25)["w"].item() == 258


def test_slerp_ends_and_equal_networks():
    a, b = network(0), network(1)
    for name in SHAPES:
        assert torch.allclose(slerp(a, b, 0)[name], a[name], atol=1e-14)
        assert torch.allclose(slerp(a, b, 1)[name], b[name], atol=1e-14)
        assert torch.equal(slerp(a, a, 0.3)[name], a[name])
    assert slerp(a, b, 1)["count"].item() == 0


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.floats(1e-3, 1e3))
def test_slerp_turns_by_its_share_of_the_angle_and_scales_the_norm_linearly(lam: float, factor: float):
    a, b = network(2)["weight"], factor * network(3)["weight"]
    out = slerp({"w": a}, {"w": b}, lam)["w"]
    assert angle(a, out) == pytest.approx(lam * angle(a, b), abs=1e-7)
    assert angle(out, b) == pytest.approx((1 - lam) * angle(a, b), abs=1e-7)
    assert out.norm().item() == pytest.approx((1 - lam) * a.norm().item() + lam * b.norm().item(), rel=1e-12)


def test_slerp_runs_both_ways_and_rotates_with_its_ends():
    a, b = network(4)["weight"], network(5)["weight"]
    there, back = slerp({"w": a}, {"w": b}, 0.3)["w"], slerp({"w": b}, {"w": a}, 0.7)["w"]
    assert torch.allclose(there, back, atol=1e-14)
    rotation, _ = torch.linalg.qr(
        torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    assert torch.allclose(
        slerp({"w": rotation @ a}, {"w": rotation @ b}, 0.3)["w"], rotation @ there, atol=1e-14
    )


def test_slerp_of_parallel_opposite_or_zero_tensors_is_linear():
    x = network(6)["weight"]
    for y in (3 * x, -x, -2 * x, torch.zeros_like(x)):
        for a, b in ((x, y), (y, x)):
            assert torch.allclose(slerp({"w": a}, {"w": b}, 0.25)["w"], 0.75 * a + 0.25 * b, atol=1e-14)


def test_slerp_passes_into_the_chord_without_a_step():
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for turn in (0.99e-4, 1.01e-4):
        y = torch.tensor([math.cos(turn), math.sin(turn)], dtype=torch.float64)
        expected = torch.tensor([math.cos(0.25 * turn), math.sin(0.25 * turn)], dtype=torch.float64)
        assert torch.allclose(slerp({"w": x}, {"w": y}, 0.25)["w"], expected, atol=1e-8)


def test_task_arithmetic_is_linear():
    base, a, b = network(0), network(1), network(2)
    out = task_arithmetic(base, [a, b], [0.4, -1.5])
    for name in SHAPES:
        assert torch.allclose(
            out[name], base[name] + 0.4 * (a[name] - base[name]) - 1.5 * (b[name] - base[name]), atol=1e-14
        )
    # One model with scale 1 is itself, no scale is the base, and steps add up.
    one, none = task_arithmetic(base, [a]), task_arithmetic(base, [a, b], 0)
    twice = task_arithmetic(base, [task_arithmetic(base, [a], 0.4), task_arithmetic(base, [b], -1.5)])
    half = average([base, a])
    for name in SHAPES:
        assert torch.allclose(one[name], a[name], atol=1e-14)
        assert torch.equal(none[name], base[name])
        assert torch.allclose(twice[name], out[name], atol=1e-14)
        assert torch.allclose(task_arithmetic(base, [a], 0.5)[name], half[name], atol=1e-14)
    assert out["count"].item() == 0


def test_inputs_are_not_changed_and_strides_do_not_matter():
    a, b = network(0, torch.float32), network(1, torch.float32)
    kept = [{name: x.clone() for name, x in net.items()} for net in (a, b)]
    transposed = {**b, "weight": b["weight"].T.contiguous().T}
    for merge in (
        lambda y: average([a, y]),
        lambda y: slerp(a, y, 0.3),
        lambda y: task_arithmetic(a, [y], 0.3),
    ):
        first, second = merge(b), merge(transposed)
        assert all(torch.equal(first[name], second[name]) for name in a)
        assert all(
            torch.equal(net[name], old[name]) for net, old in zip((a, b), kept, strict=True) for name in a
        )


def test_dtypes_and_devices_are_those_of_the_first():
    a, b = {"w": torch.zeros(2, dtype=torch.float16)}, {"w": torch.ones(2, dtype=torch.float64)}
    for out in (average([a, b]), slerp(a, b, 0.5), task_arithmetic(a, [b], 0.5)):
        assert out["w"].dtype == torch.float16
        assert out["w"].tolist() == [0.5, 0.5]


def test_bad_input():
    a, b = network(0), network(1)
    with pytest.raises(ValueError, match="no models to merge"):
        average([])
    with pytest.raises(ValueError, match="no models to add"):
        task_arithmetic(a, [])
    with pytest.raises(ValueError, match="2 weights for 3 models; give one for each"):
        average([a, b, a], [1, 2])
    with pytest.raises(ValueError, match=r"at least 0 and not all 0, got \[0.0, 0.0\]"):
        average([a, b], [0, 0])
    with pytest.raises(ValueError, match=r"at least 0 and not all 0, got \[2.0, -1.0\]"):
        average([a, b], [2, -1])
    with pytest.raises(ValueError, match=r"lam must lie in \[0, 1\], got 1.5"):
        slerp(a, b, 1.5)
    with pytest.raises(ValueError, match="1 scales for 2 models"):
        task_arithmetic(a, [a, b], [0.5])
    with pytest.raises(ValueError, match=r"scales must be finite, got \[nan\]"):
        task_arithmetic(a, [b], math.nan)
    with pytest.raises(ValueError, match="bias has shape"):
        average([a, {**b, "bias": torch.zeros(5)}])
