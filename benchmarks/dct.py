"""Step time and state of DCTAdamW and Trion beside AdamW and a thin SVD of each matrix.

    python benchmarks/dct.py --threads 1 2 --out dct.json

Contenders take turns, so that a busy machine slows all of them alike; medians over the rounds are
compared with one another. The SVDs, a hundred times slower, are timed in the first rounds only.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from weightlab.linalg import dct, select_basis_columns
from weightlab.optim import DCTAdamW, Trion

SHAPES = [(512, 512), (512, 512), (512, 1024), (1024, 512), (1024, 1024)]
RANK = 64
SVD = "thin SVD of each matrix"

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "AdamW foreach": lambda params: AdamW(params, foreach=True),
    "AdamW fused": lambda params: AdamW(params, fused=True),
    "DCTAdamW": lambda params: DCTAdamW(params, rank=RANK),
    "DCTAdamW matmul": lambda params: DCTAdamW(params, rank=RANK, transform="matmul"),
    "DCTAdamW dct3": lambda params: DCTAdamW(params, rank=RANK, basis="dct3"),
    "DCTAdamW rank 256": lambda params: DCTAdamW(params, rank=256),
    "DCTAdamW gap 10": lambda params: DCTAdamW(params, rank=RANK, update_gap=10),
    "DCTAdamW fp32 error": lambda params: DCTAdamW(params, rank=RANK, error_feedback="fp32"),
    "DCTAdamW int8 error": lambda params: DCTAdamW(params, rank=RANK, error_feedback="int8"),
    "DCTAdamW int4 error": lambda params: DCTAdamW(params, rank=RANK, error_feedback="int4"),
    "Trion": lambda params: Trion(params, rank=RANK),
}


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in SHAPES]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    return params


def parts(params: list[nn.Parameter]) -> dict[str, Callable[[], object]]:
    """What a step is made of, and what it replaces."""
    matrices = [p.detach() for p in params]
    tall = [m if m.shape[0] >= m.shape[1] else m.T for m in matrices]

    def each(function: Callable[[torch.Tensor], object], tensors: list[torch.Tensor]) -> Callable[[], object]:
        return lambda: [function(tensor) for tensor in tensors]

    return {
        SVD: each(lambda G: torch.linalg.svd(G, full_matrices=False), matrices),
        "(selection)": each(lambda G: select_basis_columns(G, RANK), matrices),
        "(dct, fft)": each(lambda G: dct(G, transform="fft"), tall),
        "(dct, matmul)": each(lambda G: dct(G, transform="matmul"), tall),
    }


def state_bytes(optimizer: Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors if t.ndim > 0)


@torch.no_grad()
def measure(threads: int, rounds: int, svd_rounds: int) -> dict[str, dict[str, float]]:
    torch.set_num_threads(threads)
    optimizers = {name: build(parameters()) for name, build in OPTIMIZERS.items()}
    calls: dict[str, Callable[[], object]] = {name: o.step for name, o in optimizers.items()}
    calls |= parts(parameters())
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, rounds):
        for name, call in calls.items():
            if name == SVD and not 0 <= turn < svd_rounds:
                continue
            start, cpu_start = time.perf_counter(), time.process_time()
            call()
            if turn >= 0:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - cpu_start)
    return {
        name: {
            "ms": 1e3 * statistics.median(wall[name]),
            "cpu_ms": 1e3 * statistics.median(cpu[name]),
            "state_mb": state_bytes(optimizers[name]) / 2**20 if name in optimizers else 0.0,
        }
        for name in calls
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--svd-rounds", type=int, default=3)
    parser.add_argument(
        "--clock",
        choices=["ms", "cpu_ms"],
        default="ms",
        help="wall time, or processor time (for one thread on a machine that is busy)",
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    theory = sum(2 * 4 * max(shape) * RANK + 8 * RANK for shape in SHAPES) / 2**20
    results = []
    for threads in args.threads:
        rows = measure(threads, args.rounds, args.svd_rounds)
        adamw, svd = rows["AdamW foreach"][args.clock], rows[SVD][args.clock]
        print(
            f"\n{threads} thread(s), rank {RANK}; state by theory 2·m·r + r: {theory:.3f} MiB\n"
            f"{'':26}{'ms':>9}{'state MiB':>11}{'x AdamW':>9}{'SVD / it':>10}"
        )
        for name, row in rows.items():
            ms = row[args.clock]
            print(f"{name:26}{ms:9.2f}{row['state_mb']:11.3f}{ms / adamw:9.2f}{svd / ms:10.1f}")
        results.append({"threads": threads, "rows": rows})
    if args.out:
        facts = {"torch": torch.__version__, "processor": platform.processor() or platform.machine()}
        args.out.write_text(json.dumps({**facts, "clock": args.clock, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
