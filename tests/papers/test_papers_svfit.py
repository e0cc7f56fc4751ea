from __future__ import annotations

import json
from typing import Any

import pytest

from weightlab.papers import reproduce
from weightlab.papers.svfit import ARMS, CLAIMS, judge_gain, judge_no_worse, judge_part


@pytest.mark.parametrize(
    ("intervals", "no_worse", "gain"),
    [
        ([(-0.02, -0.01)], "held", "held"),
        ([(-0.02, 0.004)], "held", "inconclusive"),
        ([(-0.004, 0.004)], "held", "not held"),
        ([(0.0, 0.01)], "inconclusive", "not held"),
        ([(0.006, 0.01)], "not held", "not held"),
        ([(-0.02, -0.01), (0.006, 0.01)], "not held", "not held"),
        ([(-0.02, -0.01), (-0.02, 0.01)], "inconclusive", "inconclusive"),
    ],
)
def test_verdicts_on_differences(intervals: Any, no_worse: str, gain: str) -> None:
    assert judge_no_worse(intervals, 0.005) == no_worse
    assert judge_gain(intervals, 0.005) == gain


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ({"a": (0.1, 0.2), "b": (0.3, 0.4)}, {"a": (0.1, 0.2), "b": (0.3, 0.49)}, "held"),
        ({"a": (0.1, 0.2), "b": (0.6, 0.7)}, {"a": (0.1, 0.2), "b": (0.3, 0.4)}, "inconclusive"),
        ({"a": (0.1, 0.2), "b": (0.3, 0.4)}, {"a": (0.51, 0.6), "b": (0.7, 0.8)}, "not held"),
        ({"a": (0.1, 0.2), "b": (0.3, 0.4)}, {"a": (0.4, 0.6), "b": (0.7, 0.8)}, "inconclusive"),
    ],
)
def test_verdicts_on_parts(first: Any, second: Any, verdict: str) -> None:
    assert judge_part({"first": first, "second": second}) == verdict


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("smoke")
    (outcome,) = reproduce.reproduce(["svfit"], "smoke", folder / "record", work=folder / "work")
    assert outcome["failed"] == []
    text = (folder / "record" / "svfit.json").read_text()
    return {claim["name"]: claim for claim in json.loads(text)["scales"]["smoke"]["claims"]}


def test_all_claims_are_recorded(smoke: dict[str, Any]) -> None:
    assert list(smoke) == [claim.name for claim in CLAIMS]


def test_parameters_are_those_of_the_formulas(smoke: dict[str, Any]) -> None:
    rows = {row["trained"]: row["parameters"] for row in smoke["matches-lora-far"]["table"]}
    assert rows == {
        "SVFit": 64 + 256,
        "LoRA, rank 8": 8 * (64 + 256 + 256 + 256),
        "LoRA, rank 1": 64 + 256 + 256 + 256,
        "PiSSA, rank 8": 8 * (64 + 256 + 256 + 256),
        "biases": 256 + 256,
        "random vectors": 64 + 256,
        "LoRA-XS, rank 8": 2 * 8 * 8,
    }
    assert list(rows) == list(ARMS)


def test_both_tasks_are_compared(smoke: dict[str, Any]) -> None:
    tasks = [row["task"] for row in smoke["own-vectors-matter"]["table"]]
    assert set(tasks) == {"adapt-digits", "adapt-digits-contrast"}
    assert smoke["matches-lora-near"]["table"][0]["task"] == "adapt-digits-contrast"


def test_a_sum_needs_more_values_than_a_sum_of_squares(smoke: dict[str, Any]) -> None:
    rows = {
        (row["layer"], row["measure"]): row["part needed"] for row in smoke["few-values-hold-most"]["table"]
    }
    for layer in ("64 to 256", "256 to 256"):
        assert 0 < rows[layer, "sum of squares"] < rows[layer, "sum"] <= 1
