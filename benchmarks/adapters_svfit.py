"""Leading singular triples by randomized iteration, side by side with a full decomposition: time and accuracy.

    python benchmarks/adapters_svfit.py --threads 1 --out svfit.json

Contenders take turns, so that a busy machine slows all of them alike; ratios are medians over rounds of processor time.
`torch.svd_lowrank` is what PEFT's PiSSA starts by; it has no certificate.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightlab.linalg import top_svd

SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "0.95^i": lambda i: 0.95**i,
    "1/i": lambda i: 1 / i,
    "1/√i": lambda i: i**-0.5,
}
FLAT = "Gaussian"


def matrix(spectrum: str, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, side, side, generator=generator)
    if spectrum == FLAT:
        return drawn[0]
    U, V = torch.linalg.qr(drawn).Q
    return (U * SPECTRA[spectrum](torch.arange(1, side + 1, dtype=torch.float32))) @ V.T


def contenders(W: Tensor, r: int) -> dict[str, Callable[[], Any]]:
    def quiet() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return top_svd(W, r, "randomized")

    return {
        "full": lambda: top_svd(W, r, "full"),
        "auto": lambda: top_svd(W, r),
        "randomized": quiet,
        "svd_lowrank, 4 iterations": lambda: torch.svd_lowrank(W, r + 16, niter=4),
        "svd_lowrank, 16 iterations": lambda: torch.svd_lowrank(W, r + 16, niter=16),
    }


def measure(spectrum: str, side: int, r: int, rounds: int) -> list[dict[str, Any]]:
    W = matrix(spectrum, side)
    true = torch.linalg.svdvals(W.double())[:r]
    calls = contenders(W, r)
    times: dict[str, list[float]] = {name: [] for name in calls}
    found: dict[str, Any] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            found[name] = call()
            times[name].append(time.process_time() - start)
    rows = []
    for name, spent in times.items():
        values = found[name][1][:r].double()
        certificate = getattr(found[name], "certificate", None)
        rows.append(
            {
                "spectrum": spectrum,
                "contender": name,
                "milliseconds": 1e3 * statistics.median(spent),
                "speed-up": statistics.median(a / b for a, b in zip(times["full"], spent, strict=True)),
                "relative error": float(((true - values).abs() / true).max()),
                "estimated": None if certificate is None else float(certificate.error),
                "passed": None if certificate is None else bool(certificate.passed),
                "exact": None if certificate is None else bool(certificate.exact),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--spectra", nargs="+", choices=[*SPECTRA, FLAT], default=[*SPECTRA, FLAT])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for spectrum in arguments.spectra:
        rows += measure(spectrum, arguments.side, arguments.r, arguments.rounds)
        for row in rows[-5:]:
            print(
                "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                flush=True,
            )
    if arguments.out:
        facts = {"torch": torch.__version__, "machine": platform.machine(), "threads": arguments.threads}
        arguments.out.write_text(
            json.dumps({**facts, "side": arguments.side, "r": arguments.r, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
