from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from weightlab.linalg import dct_matrix
from weightlab.papers import reproduce
from weightlab.papers.svd_free_dct import (
    BASES,
    CLAIMS,
    FRACTIONS,
    SIZES,
    judge_faster,
    judge_parity,
    judge_projection,
    projection_errors,
)

NEAR, FAR, UNSURE = (0.05, 0.04, 0.06), (0.5, 0.4, 0.6), (0.1, 0.05, 0.15)
BETTER, SAME, MAYBE = (-0.05, -0.06, -0.04), (0.0, -0.005, 0.005), (-0.01, -0.03, 0.01)


class TestJudges:
    """Each verdict, on numbers made to deserve it."""

    def test_projection_needs_both_comparisons_of_one_basis(self):
        assert judge_projection([(NEAR, BETTER), (FAR, SAME)]) == "held"
        assert judge_projection([(FAR, SAME), (NEAR, BETTER)]) == "held"
        assert judge_projection([(NEAR, SAME), (FAR, BETTER)]) == "not held"
        assert judge_projection([(NEAR, MAYBE), (FAR, BETTER)]) == "inconclusive"
        assert judge_projection([(UNSURE, BETTER), (FAR, BETTER)]) == "inconclusive"

    def test_parity_needs_every_rival_and_fails_on_one(self):
        equal, better, worse, unsure = (
            (0.0, -0.01, 0.01),
            (-0.1, -0.2, -0.05),
            (0.05, 0.02, 0.08),
            (0.01, 0.0, 0.02),
        )
        assert judge_parity([equal, better]) == "held"
        assert judge_parity([equal, worse]) == "not held"
        assert judge_parity([better, unsure]) == "inconclusive"

    def test_faster_needs_every_gap_and_fails_on_one(self):
        faster, slower, unsure = (2.0, 1.5, 2.5), (0.5, 0.4, 0.6), (1.0, 0.9, 1.1)
        assert judge_faster([faster, faster]) == "held"
        assert judge_faster([faster, slower]) == "not held"
        assert judge_faster([faster, unsure]) == "inconclusive"


class TestProjectionErrors:
    def test_singular_vectors_that_are_cosines_cost_the_cosine_basis_nothing(self):
        rows = dct_matrix(16, dtype=torch.float64)
        sizes = torch.tensor([0.5**i for i in range(16)], dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        left = torch.linalg.qr(torch.randn(32, 16, dtype=torch.float64, generator=generator))[0]
        errors = projection_errors(left * sizes @ rows)
        for fraction in FRACTIONS:
            assert errors["dct2", fraction] == pytest.approx(errors["svd", fraction], abs=1e-7)
            for other in ("dct3", "random", "identity"):
                assert errors[other, fraction] > 1.1 * errors["svd", fraction]

    def test_rank_one_by_hand(self):
        G = torch.diag(torch.tensor([4.0, 2.0, 2.0] + [1.0] * 13))
        expected = ((16 + 4 + 4 + 13 - 16) / 37) ** 0.5
        errors = projection_errors(G)
        assert errors["svd", 1 / 16] == pytest.approx(expected, rel=1e-5)
        assert errors["identity", 1 / 16] == pytest.approx(expected, rel=1e-5)

    def test_svd_is_never_beaten(self):
        for seed in range(5):
            torch.manual_seed(seed)
            errors = projection_errors(torch.randn(20, 32))
            assert all(errors["svd", f] <= errors[b, f] + 1e-6 for b in BASES for f in FRACTIONS)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("smoke")
    (outcome,) = reproduce.reproduce(["svd-free-dct"], "smoke", folder / "record", work=folder / "work")
    assert outcome["failed"] == []
    return {"folder": folder, "claims": {claim["name"]: claim for claim in outcome["claims"]}}


class TestSmoke:
    def test_writes_a_strict_record_of_all_claims(self, smoke: dict[str, Any]):
        def refuse(constant: str) -> None:
            raise AssertionError(constant)

        text = (smoke["folder"] / "record" / "svd-free-dct.json").read_text()
        recorded = json.loads(text, parse_constant=refuse)["scales"]["smoke"]["claims"]
        assert [claim["name"] for claim in recorded] == [claim.name for claim in CLAIMS]
        assert all(claim["figure"]["series"] and claim["table"] for claim in recorded)

    def test_projections_improve_with_rank_and_none_beats_the_svd(self, smoke: dict[str, Any]):
        table = smoke["claims"]["projection-quality"]["table"]
        assert len(table) == 3 * len(FRACTIONS)
        for row in table:
            assert all(row["svd"] <= row[basis] <= 1 for basis in BASES)
        for start in range(0, len(table), len(FRACTIONS)):
            rows = table[start : start + len(FRACTIONS)]
            for name in ("svd", *BASES):
                errors = [row[name] for row in rows]
                assert errors == sorted(errors, reverse=True)

    def test_arms_share_the_rank_and_save_the_memory(self, smoke: dict[str, Any]):
        rows = {row["arm"]: row for row in smoke["claims"]["loss-parity"]["table"]}
        assert set(rows) == {"adamw", "dct-adamw", "svd-adamw", "svd-adamw-200", "random-basis-adamw"}
        state = {name: row["state MiB"] for name, row in rows.items()}
        assert state["dct-adamw"] == state["random-basis-adamw"] < state["svd-adamw"] < state["adamw"]
        assert rows["dct-adamw"]["dct-adamw's over it"] == 1

    def test_times_and_state_are_those_of_the_shapes(self, smoke: dict[str, Any]):
        size = SIZES["smoke"]
        rows = smoke["claims"]["faster-than-svd"]["table"]
        assert all(row["ms a step"] > 0 for row in rows)
        numbers = sum(2 * 4 * max(shape) * size.rank for shape in size.shapes)
        dct, svd = numbers + len(size.shapes) * (8 * size.rank + 4), numbers
        svd += sum(4 * min(shape) * size.rank + 4 for shape in size.shapes)
        assert [row["state MiB"] for row in rows[:3]] == pytest.approx([dct / 2**20] * 2 + [svd / 2**20])

    def test_every_rank_is_timed(self, smoke: dict[str, Any]):
        rows = smoke["claims"]["rank-free-time"]["table"]
        assert [row["rank"] for row in rows] == list(SIZES["smoke"].ranks)
        assert [row["state MiB"] for row in rows] == sorted(row["state MiB"] for row in rows)
