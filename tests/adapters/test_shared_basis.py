import hashlib
import math
import subprocess
import sys
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.adapters.basis import KINDS, shared_basis

F64 = torch.float64
EXACT = ("orthogonal", "hadamard")


def columns(n: int, r: int, **options) -> torch.Tensor:
    return shared_basis(n, r, dtype=F64, **options)


class TestColumns:
    @pytest.mark.parametrize("kind", EXACT)
    @pytest.mark.parametrize("n", [1, 6, 64, 96, 200])
    def test_slots_together_are_orthonormal(self, kind: str, n: int):
        r = max(1, n // 5)
        B = torch.cat([columns(n, r, slot=slot, kind=kind) for slot in range(n // r)], 1)
        assert (B.mT @ B - torch.eye(B.shape[1], dtype=F64)).abs().max() < 1e-12

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 80), st.data())
    def test_slots_share_nothing_and_keys_share_whole_columns(self, n: int, data: st.DataObject):
        r = data.draw(st.integers(1, n))
        kind = data.draw(st.sampled_from(EXACT))
        seed = data.draw(st.integers(0, 5))
        every = columns(n, n, slot=0, kind=kind, seed=seed)
        drawn = [columns(n, r, key=key, kind=kind, seed=seed) for key in ("a", "b")]
        chosen = []
        for B in drawn:
            inner = every.mT @ B
            places = inner.abs().argmax(0)
            assert torch.allclose(inner, torch.eye(n, dtype=F64)[:, places], atol=1e-12)
            chosen.append(set(places.tolist()))
            assert len(chosen[-1]) == r
        common = len(chosen[0] & chosen[1])
        assert float((drawn[0].mT @ drawn[1]).norm()) == pytest.approx(math.sqrt(common), abs=1e-12)

    def test_rounding_to_float32_keeps_slots_apart(self):
        first, second = (shared_basis(320, 20, slot=slot) for slot in (0, 15))
        assert first.dtype == torch.float32
        assert (first.mT @ second).norm() < 1e-6
        assert (first.mT @ first - torch.eye(20)).norm() < 1e-6

    def test_orthogonal_kind_is_the_qr_factor_of_a_gaussian_matrix(self):
        # The factor with positive diagonal is unique, so a triangular product with it is Gaussian again.
        n = 150
        Q = columns(n, n, slot=0)
        from weightlab.adapters.basis import _stream

        G = torch.cat(
            [
                torch.from_numpy(_stream("orthogonal", 0, n, panel).randn(n, width))
                for panel, width in enumerate((64, 64, 22))
            ],
            1,
        )
        R = Q.mT @ G
        assert R.tril(-1).abs().max() < 1e-12
        assert R.diagonal().min() > 0

    def test_haar_signs_are_balanced(self):
        # Without fixing the signs of R's diagonal, LAPACK makes the first row's leading entry negative every time.
        first = [float(columns(8, 1, slot=0, seed=seed)[0, 0]) for seed in range(200)]
        assert 60 < sum(value > 0 for value in first) < 140
        assert fmean(value**2 for value in first) == pytest.approx(1 / 8, abs=0.03)

    def test_hadamard_entries_are_flat_for_powers_of_two(self):
        assert torch.equal(
            columns(64, 5, key="a", kind="hadamard").abs(), torch.full((64, 5), 1 / 8, dtype=F64)
        )

    def test_gaussian_products_are_small_on_average_only(self):
        n, r = 128, 16
        products = torch.cat(
            [
                columns(n, r, slot=0, seed=seed, kind="gaussian").mT
                @ columns(n, r, slot=1, seed=seed, kind="gaussian")
                for seed in range(40)
            ]
        )
        # Entries have mean 0 and standard deviation σ²√n with σ = 1/√n; 10,240 of them.
        assert float(products.mean()) == pytest.approx(0, abs=4 / math.sqrt(n * products.numel()))
        assert float(products.std()) == pytest.approx(1 / math.sqrt(n), rel=0.05)

    def test_random_draws_share_columns_as_chance_has_it(self):
        n, r, pairs = 40, 5, 400
        shared = [
            round(float((columns(n, r, key=f"a{i}").mT @ columns(n, r, key=f"b{i}")).square().sum()))
            for i in range(pairs)
        ]
        none = math.comb(n - r, r) / math.comb(n, r)
        assert fmean(shared) == pytest.approx(r**2 / n, abs=4 * math.sqrt(r**2 / n / pairs))
        assert fmean(count == 0 for count in shared) == pytest.approx(
            none, abs=4 * math.sqrt(none * (1 - none) / pairs)
        )


class TestIdentity:
    @pytest.mark.parametrize("kind", KINDS)
    def test_seed_key_and_layer_matter_as_said(self, kind: str):
        base = columns(24, 3, key="cat", layer="a", kind=kind)
        assert torch.equal(base, columns(24, 3, key="cat", layer="a", kind=kind))
        for other in ({"key": "dog"}, {"layer": "b"}, {"seed": 1}):
            assert not torch.allclose(
                base, columns(24, 3, kind=kind, **{"key": "cat", "layer": "a", **other})
            )
        in_slot = columns(24, 3, slot=2, layer="a", kind=kind)
        assert torch.equal(in_slot, columns(24, 3, slot=2, layer="b", kind=kind)) == (kind != "gaussian")

    def test_bits_do_not_depend_on_what_was_asked_before(self):
        from weightlab.adapters import basis

        basis._haar.cache_clear()
        late = columns(200, 10, slot=12)
        basis._haar.cache_clear()
        for slot in range(12):
            columns(200, 10, slot=slot)
        assert torch.equal(late, columns(200, 10, slot=12))

    def test_bits_are_the_same_in_other_processes_with_other_threads(self):
        program = (
            "import sys, hashlib, torch; torch.set_num_threads(int(sys.argv[1]))\n"
            "from weightlab.adapters.basis import KINDS, shared_basis\n"
            "print([hashlib.sha256(shared_basis(300, 20, key='k', kind=kind, dtype=torch.float64).numpy().tobytes())"
            ".hexdigest() for kind in KINDS], torch.get_num_threads())"
        )
        here = [
            hashlib.sha256(columns(300, 20, key="k", kind=kind).contiguous().numpy().tobytes()).hexdigest()
            for kind in KINDS
        ]
        there = subprocess.run(
            [sys.executable, "-c", program, "3"], capture_output=True, text=True, check=True
        )
        assert there.stdout.strip() == f"{here} 3"

    def test_touches_no_generator_and_no_threads(self):
        state, threads = torch.random.get_rng_state(), torch.get_num_threads()
        for kind in KINDS:
            columns(70, 2, slot=1, kind=kind, seed=99)
        assert torch.equal(state, torch.random.get_rng_state())
        assert torch.get_num_threads() == threads

    def test_results_are_copies(self):
        columns(12, 2, slot=0).zero_()
        assert columns(12, 2, slot=0).norm() > 1


class TestGivenBasis:
    def test_directions_are_dealt_in_turn(self):
        basis = torch.linalg.qr(torch.randn(12, 12, dtype=F64, generator=torch.Generator().manual_seed(0))).Q
        dealt = [columns(12, 3, slot=slot, basis=basis, slots=4) for slot in range(4)]
        assert torch.equal(dealt[1], basis[[1, 5, 9]].mT)
        together = torch.cat(dealt, 1)
        assert torch.allclose(together.mT @ together, torch.eye(12, dtype=F64), atol=1e-12)

    def test_the_leading_directions_go_first(self):
        basis = torch.eye(10, dtype=torch.float32)
        assert torch.equal(columns(10, 2, slot=0, basis=basis, slots=2), basis[[0, 2]].mT.double())
        assert torch.equal(columns(10, 2, slot=0, basis=basis), basis[[0, 5]].mT.double())

    @pytest.mark.parametrize(
        ("basis", "options", "message"),
        [
            (torch.eye(5), {"slot": 0}, r"shape \(m, 6\)"),
            (torch.eye(6, dtype=torch.int64), {"slot": 0}, "int64"),
            (2 * torch.eye(6), {"slot": 0}, "not orthonormal"),
            (torch.eye(6).fill_(math.nan), {"slot": 0}, "not orthonormal"),
            (torch.eye(6), {"key": "a"}, "give slot instead of key"),
            (torch.eye(6), {"slot": 3}, "slot 3 of 3 slots of rank 2 does not fit"),
            (torch.eye(6), {"slot": 0, "slots": 4}, "slot 0 of 4 slots of rank 2 does not fit a basis of 6"),
        ],
    )
    def test_bad_bases_are_refused(self, basis: torch.Tensor, options: dict, message: str):
        with pytest.raises(ValueError, match=message):
            shared_basis(6, 2, basis=basis, **options)


@pytest.mark.parametrize(
    ("n", "r", "options", "message"),
    [
        (8, 9, {"slot": 0}, "between 1 and the width n = 8, got 9"),
        (8, 0, {"slot": 0}, "got 0"),
        (8, 3, {"slot": 2}, "slot 2 does not exist: width 8 has ⌊8/3⌋ = 2 disjoint slots"),
        (8, 3, {"slot": -1}, "slot must be at least 0, got -1"),
        (8, 3, {}, "either slot or key, got slot=None and key=None"),
        (8, 3, {"slot": 0, "key": "a"}, "either slot or key"),
        (8, 3, {"slot": 0, "kind": "haar"}, "kind must be one of orthogonal, gaussian, hadamard, got 'haar'"),
    ],
)
def test_bad_requests_are_refused(n: int, r: int, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        shared_basis(n, r, **options)


def test_gaussian_slots_have_no_end():
    assert shared_basis(8, 3, slot=100, kind="gaussian").shape == (8, 3)
