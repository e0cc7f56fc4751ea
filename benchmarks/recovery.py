"""What a step of robust recovery and of Langevin sampling costs, side by side in one run.

    python benchmarks/recovery.py --out recovery.json

Contenders take turns, so that a busy machine slows all of them alike; medians over the rounds are
compared with one another, never with numbers of another run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from weightlab.optim import SGLD, robust_recovery

Contenders = dict[str, Callable[[], object]]
# Side and measurements, from an operator that fits any cache to one that fits none.
PROBLEMS = [(20, 600), (60, 1800), (64, 12800)]
VECTORS = [(64, 12800), (256, 12800)]
SHAPES = [(512, 512)] * 6 + [(2048, 512)] * 6 + [(512, 2048)] * 6 + [(512,)] * 12


def turns(contenders: Contenders, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return each contender's median time in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-1, rounds):
        for name, call in contenders.items():
            start = clock()
            call()
            if turn >= 0:
                times[name].append(clock() - start)
    return {name: 1e3 * statistics.median(column) for name, column in times.items()}


def plain_direction(A: Tensor, y: Tensor, U: Tensor) -> Tensor:
    """Q(U) as one would write it: the operator is read twice, each matrix in full."""
    flat = A.flatten(1)
    signs = (flat @ (U @ U.T).flatten() - y).sign()
    Q = (signs @ flat).view_as(A[0]) / len(y)
    return (Q + Q.T) / 2


def dense(dim: int, count: int) -> Contenders:
    A = torch.randn(count, dim, dim, dtype=torch.float64)
    y, U = torch.randn(count, dtype=torch.float64), torch.randn(dim, dim, dtype=torch.float64)
    arranged = {}
    for name, size in {"packed": 2**62, "packed, fused": robust_recovery._BLOCK_BYTES}.items():
        kept, robust_recovery._BLOCK_BYTES = robust_recovery._BLOCK_BYTES, size
        arranged[name] = robust_recovery._sensing(A, y, dim, None)
        robust_recovery._BLOCK_BYTES = kept
    contenders: Contenders = {"plain": lambda: plain_direction(A, y, U)}
    for name, sensing in arranged.items():
        contenders[name] = lambda sensing=sensing: robust_recovery._sign_fit(sensing, U, y)
    return contenders


def vectors(dim: int, count: int) -> Contenders:
    a = torch.randn(count, dim, dtype=torch.float64)
    y, U = torch.randn(count, dtype=torch.float64), torch.randn(dim, dim, dtype=torch.float64)
    contenders: Contenders = {}
    for name, center in {"fused": False, "with offset": True}.items():
        sensing = robust_recovery._sensing(a, y, dim, center)
        contenders[name] = lambda sensing=sensing: robust_recovery._sign_fit(sensing, U, y)

    def plain() -> Tensor:
        signs = ((a @ U).square().sum(1) - y).sign()
        return (a * signs[:, None]).T @ a / count

    return {"plain": plain, **contenders}


def sampling() -> Contenders:
    def build(method: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[], object]:
        params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        for p in params:
            p.grad = torch.randn_like(p)
        return method(params).step

    generator = torch.Generator().manual_seed(0)
    entries = sum(torch.Size(shape).numel() for shape in SHAPES)
    piece = torch.empty(2**16)

    def draw_cached() -> None:
        for _ in range(entries // piece.numel()):
            piece.normal_(generator=generator)

    def draw_fresh() -> None:
        for shape in SHAPES:
            torch.empty(shape).normal_(generator=generator)

    return {
        "SGD": build(lambda params: SGD(params, lr=1e-6, foreach=False)),
        "SGLD, temperature 0": build(lambda params: SGLD(params, 1e-6, 1e6, 0.0)),
        "SGLD": build(lambda params: SGLD(params, 1e-6, 1e6)),
        "SGLD, rmsprop": build(lambda params: SGLD(params, 1e-6, 1e6, preconditioner="rmsprop")),
        "noise alone, into cache": draw_cached,
        "noise alone, into memory": draw_fresh,
    }


def show(title: str, times: dict[str, float]) -> dict[str, Any]:
    reference = next(iter(times.values()))
    print(f"\n{title}")
    for name, value in times.items():
        print(f"  {name:26}{value:10.3f} ms{value / reference:8.2f}")
    return {"title": title, "ms": times, "ratios": {name: value / reference for name, value in times.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="wall time, or processor time (for one thread on a machine that is busy)",
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.clock == "wall" else time.process_time

    results = []
    for dim, count in PROBLEMS:
        times = turns(dense(dim, count), args.rounds, clock)
        results.append(show(f"direction, {count} matrices of {dim}x{dim}, float64", times))
    for dim, count in VECTORS:
        times = turns(vectors(dim, count), max(3, args.rounds // 5), clock)
        results.append(show(f"direction, {count} vectors of {dim}, float64", times))
    times = turns(sampling(), args.rounds, clock)
    result = show("step of 14.2 M parameters, float32", times)
    noise = times["noise alone, into memory"]
    result["SGLD over SGD and noise"] = times["SGLD"] / (times["SGD"] + noise)
    print(f"  SGLD over SGD and noise together: {result['SGLD over SGD and noise']:.2f}")
    results.append(result)
    if args.out:
        facts = {"torch": torch.__version__, "processor": platform.processor() or platform.machine()}
        facts |= {"clock": args.clock, "threads": args.threads}
        args.out.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
