from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightlab.merge import Permutation, PermutationSpec, apply_permutation, singular_alignment

SPEC = PermutationSpec({"w1": ("h", None, None, None), "w2": (None, "h")})


def net(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w1": torch.randn(6, 2, 2, 2, generator=generator, dtype=torch.float64),
        "w2": torch.randn(4, 6, generator=generator, dtype=torch.float64),
        "bias": torch.randn(4, generator=generator),
    }


seeds = st.integers(0, 1000)
thresholds = st.sampled_from([0.0, 0.3, 0.7, 1.0])


@settings(max_examples=25, deadline=None)
@given(seeds, seeds, thresholds)
def test_bounds_symmetry_and_invariance(s: int, t: int, threshold: float):
    a, b = net(s), net(t)
    total = singular_alignment(a, b, threshold)["total"]
    assert total <= 1 + 1e-12
    assert singular_alignment(b, a, threshold)["total"] == pytest.approx(total, abs=1e-12)
    assert singular_alignment(a, a, threshold)["total"] == pytest.approx(1, abs=1e-12)
    perm = Permutation.random({"h": 6}, generator=torch.Generator().manual_seed(s))
    moved = [apply_permutation(SPEC, perm, x) for x in (a, b)]
    assert singular_alignment(*moved, threshold)["total"] == pytest.approx(total, abs=1e-10)
    assert singular_alignment(a, moved[0], threshold)["total"] <= 1 + 1e-12


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_against_loops_over_pairs(threshold: float):
    a, b = net(0), net(1)
    top = bottom = 0.0
    layers = {}
    for name in ("w1", "w2"):
        (ua, sa, va), (ub, sb, vb) = (
            torch.linalg.svd(x[name].flatten(1), full_matrices=False) for x in (a, b)
        )
        ia, ib = (range(sum(float(v) >= threshold * float(s[0]) for v in s)) for s in (sa, sb))
        shared = sum(float(ua[:, i] @ ub[:, j]) * float(va[i] @ vb[j]) for i in ia for j in ib)
        layers[name] = shared / max(len(ia), len(ib))
        top, bottom = top + shared, bottom + max(len(ia), len(ib))
    found = singular_alignment(a, b, threshold)
    assert found["per_layer"] == pytest.approx(layers, abs=1e-12)
    assert found["total"] == pytest.approx(top / bottom, abs=1e-12)


def test_distance_by_singular_triples():
    """Why matching aligns large singular vectors: they carry the distance, and permutations keep their sizes."""
    a = net(0)["w2"]
    b = net(1)["w2"][torch.tensor([2, 0, 3, 1])]
    assert torch.allclose(torch.linalg.svdvals(b), torch.linalg.svdvals(net(1)["w2"]), atol=1e-12)
    (ua, sa, va), (ub, sb, vb) = (torch.linalg.svd(x, full_matrices=False) for x in (a, b))
    cross = (sa[:, None] * sb * (ua.T @ ub) * (va @ vb.T)).sum()
    distance = sa.square().sum() + sb.square().sum() - 2 * cross
    assert float(distance) == pytest.approx(float((a - b).square().sum()), rel=1e-10)


def test_equal_singular_values_and_low_rank():
    torch.manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    assert singular_alignment({"w": q}, {"w": q.clone()}, 0.3)["total"] == pytest.approx(1, abs=1e-12)
    low = torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64)
    # Only two vectors count: the null space has no direction of its own.
    noisy = singular_alignment({"w": low}, {"w": low.flip(0).flip(0)}, 0)
    assert noisy["total"] == pytest.approx(1, abs=1e-12)
    assert singular_alignment({"w": low}, {"w": torch.eye(6, 5, dtype=torch.float64)}, 0)[
        "total"
    ] == pytest.approx(float((lambda u, v: (u[:5] * v.T).sum())(*_triples(low))) / 5, abs=1e-12)


def _triples(matrix: Tensor) -> tuple[Tensor, Tensor]:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :2], vh[:2]


def test_zero_layers_are_left_out_and_bfloat16_is_taken():
    a = {"w": torch.eye(3, dtype=torch.bfloat16), "z": torch.zeros(3, 3)}
    found = singular_alignment(a, a)
    assert found["per_layer"] == pytest.approx({"w": 1.0})


def test_bad_input():
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\], got 2"):
        singular_alignment(net(0), net(1), 2)
    with pytest.raises(ValueError, match="w2 has entries that are not finite"):
        singular_alignment({"w2": torch.full((2, 2), torch.nan)}, {"w2": torch.eye(2)})
    with pytest.raises(ValueError, match="no layer to compare"):
        singular_alignment({"b": torch.ones(3)}, {"b": torch.ones(3)})
