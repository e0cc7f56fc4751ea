"""The examples of docs/write-a-claim.md, run as printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from weightlab.papers import record
from weightlab.papers.figure import svg
from weightlab.papers.schema import ClaimContext, ClaimResult

PAGE = Path(__file__).parents[2] / "docs" / "write-a-claim.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def measure(example, tmp_path):
    names = {}
    exec(compile(example, str(PAGE), "exec"), names)
    (claim,) = names["CLAIMS"]
    context = ClaimContext(scale="smoke", out=tmp_path, store=tmp_path / "trials.sqlite")
    result = claim.run(context)
    assert isinstance(result, ClaimResult)
    return claim, result


def test_the_example_with_a_closed_form(tmp_path):
    claim, result = measure(EXAMPLES[0], tmp_path)
    low, high = result.interval
    assert low <= result.value <= high
    assert result.verdict == ("held" if low > 3 else "not held" if high < 3 else "inconclusive")
    assert svg(result.figure).count("<svg") == 1
    assert record.claim_entry(claim, result)["seeds"] == [0, 1]
    assert measure(EXAMPLES[0], tmp_path)[1].value == result.value
    gaussian = next(s for s in result.figure["series"] if s["name"] == "Gaussian")
    orthogonal = next(s for s in result.figure["series"] if s["name"] == "orthogonal")
    assert orthogonal["y"] == pytest.approx([0.0] * 4, abs=1e-9)
    assert gaussian["y"] == sorted(gaussian["y"])


def test_the_example_with_a_trial(tmp_path):
    claim, result = measure(EXAMPLES[1], tmp_path)
    assert [row["arm"] for row in result.table] == ["sgd", "adamw"]
    assert result.interval[0] <= result.value <= result.interval[1]
    assert len(record.claim_entry(claim, result)["seeds"]) == 2


def test_the_examples_import_nothing_heavy():
    for example in EXAMPLES:
        script = f"{example}\nimport sys; assert 'torch' not in sys.modules and 'scipy' not in sys.modules"
        subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
