"""What the trial store costs: time to write and to read a run with a 20-point curve.

Run with `python benchmarks/store.py [FILE]`; prints one JSON object, times in milliseconds.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from weightlab.trial.spec import CurvePoint, RunResult, RunSpec
from weightlab.trial.store import Store

RUNS = 500
LIMIT_MS = 5.0


def milliseconds(action: Callable[[], object]) -> float:
    """Time one call."""
    begun = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - begun)


def summary(times: list[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    return {"median": statistics.median(times), "p95": statistics.quantiles(times, n=20)[-1]}


def main() -> None:
    """Write, look up and read back runs of a realistic size."""
    spec = RunSpec(
        "docs-gpt", "f" * 32, "adamw", "a" * 16, {"lr": 3.1e-3, "weight_decay": 0.0123, "beta2": 0.95},
        0, "test", 200, 20, 16, 1, "cpu", {"torch": "2.13.0", "numpy": "2.3.0", "weightlab": "0.1.0"},
    )  # fmt: skip
    curve = tuple(CurvePoint(10 * i, i / 7, 4.6 / (i + 1), 4.5 / (i + 1.1)) for i in range(21))
    runs = [
        RunResult(
            replace(spec, seed=seed), "ok", {"loss": 1.5 + seed / 3e3, "accuracy": 0.5}, 4.6, curve, 31.4,
            6.28, 7.5, 412.7, 3.2, "b" * 64, "c" * 64, created_at="2025-01-01T00:00:00+00:00", host="host",
        )
        for seed in range(RUNS)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "store.sqlite"
        with Store(path) as store:
            claim = [milliseconds(lambda run=run: store.claim(run.key)) for run in runs]
            put = [milliseconds(lambda run=run: store.put(run)) for run in runs]
            get = [milliseconds(lambda run=run: store.get(run.key)) for run in runs]
            get_all = milliseconds(lambda: store.get_many([run.key for run in runs]))
        reopen = milliseconds(lambda: Store(path).close())
        size = path.stat().st_size
    figures = {
        "runs": RUNS,
        "claim_ms": summary(claim),
        "put_ms": summary(put),
        "get_ms": summary(get),
        "get_many_ms": get_all,
        "open_and_close_ms": reopen,
        "bytes_a_run": size / RUNS,
        "put_within_limit": summary(put)["p95"] <= LIMIT_MS,
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
