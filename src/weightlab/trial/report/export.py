"""A trial as data for other programs: strict JSON, and CSV with one row a run."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightlab._pages.files import write_text
from weightlab.trial.result import TrialReport

_FIRST = ("task", "arm", "role", "seed", "status", "score", "chosen")
_LAST = ("steps", "train_seconds", "step_ms", "peak_memory_mb", "state_mb", "error")


def dumps(value: Any) -> str:
    """Return plain data as indented JSON that any parser takes: infinity and NaN become `null`.

    Example:
        >>> dumps([1.0, float("inf")]).split()
        ['[', '1.0,', 'null', ']']
    """
    return json.dumps(_strict(value), indent=2, allow_nan=False, ensure_ascii=False)


def to_json(report: TrialReport) -> str:
    """Return `report.to_dict()` as strict JSON, e.g. with `null` for the interval of a trial with one seed."""
    return dumps(report.to_dict())


def write_json(report: TrialReport, path: str | os.PathLike[str]) -> Path:
    """Write `to_json` to a file, whole or not at all, and return its path.

    Raises:
        WeightlabError: When the file cannot be written.
    """
    return write_text(path, to_json(report) + "\n")


def write_csv(report: TrialReport, path: str | os.PathLike[str]) -> Path:
    """Write one row a run, whole or not at all, and return the file's path.

    Columns: task, arm, role (`tune` or `report`), seed (empty for a tuning point scored on several
    seeds), status, score (on the validation split while tuning, on the test split in the report),
    chosen, a column `hp_NAME` for each hyper-parameter, steps, train_seconds of the run, and the arm's
    step_ms, peak_memory_mb and state_mb over its report runs, error. What is unknown, infinite or NaN
    is empty.

    Raises:
        WeightlabError: When the file cannot be written.
    """
    return write_text(path, to_csv(report))


def to_csv(report: TrialReport) -> str:
    """Return the text of `write_csv`."""
    rows = _rows(report)
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("hp_"))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*_FIRST, *names, *_LAST], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()


def _rows(report: TrialReport) -> list[dict[str, Any]]:
    rows = []
    tune_seeds = report.budget.tune_seeds
    for arm in report.arms:
        common = {"task": report.task, "arm": arm.name, "steps": report.budget.steps}
        for point in arm.tuning:
            rows.append(
                {
                    **common,
                    "role": "tune",
                    "seed": tune_seeds[0] if len(tune_seeds) == 1 else None,
                    "status": point.status,
                    "score": point.score,
                    "chosen": point.chosen,
                    **_prefixed(point.hyperparameters),
                }
            )
        for run in arm.runs:
            rows.append(
                {
                    **common,
                    "role": "report",
                    "seed": run.seed,
                    "status": run.status,
                    "score": run.score,
                    "chosen": None,
                    **_prefixed(arm.hyperparameters),
                    "train_seconds": run.train_seconds,
                    "step_ms": arm.step_ms,
                    "peak_memory_mb": arm.peak_memory_mb,
                    "state_mb": arm.state_mb,
                    "error": run.error,
                }
            )
    return rows


def _prefixed(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    return {f"hp_{name}": value for name, value in hyperparameters.items()}


def _cell(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else value


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _strict(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(part) for part in value]
    return value
