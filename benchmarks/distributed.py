"""The optimizer step of several ranks that share the matrices, against the step of one that has them all.

    python benchmarks/distributed.py --ranks 2 --width 384 --out distributed.json

Every rank takes the two kinds of step in turns, with one thread, on the parameters of a GPT, so that both suffer
alike from whatever else the machine does. What counts is the ratio of medians, of the slowest rank: of
processor time (arithmetic and packing) and of wall time (waiting for the others as well).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes

from weightlab.optim import ARO, ROOT, HybridAuON, MatrixOptimizer, distribute

Build = Callable[[list[nn.Parameter]], MatrixOptimizer]

CONTENDERS: dict[str, Build] = {
    "HybridAuON": lambda params: HybridAuON(params, apply_to="matrices"),
    "ROOT": ROOT,
    "ARO": ARO,
}
CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}


def gpt(layers: int, width: int) -> list[nn.Parameter]:
    """Hidden matrices and vectors of a GPT-2 with fused query, key and value; the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    matrices = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    shapes = [(width,), *matrices] * layers
    params = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    return params


def measure(build: Build, layers: int, width: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds on this rank, in seconds, and the largest relative difference of the weights."""
    kinds = {"one": gpt(layers, width), "shared": gpt(layers, width)}
    optimizers = {kind: build(params) for kind, params in kinds.items()}
    distribute(optimizers["shared"])
    times = {kind: {clock: [] for clock in CLOCKS} for kind in kinds}
    for turn in range(-1, rounds):
        for kind, optimizer in optimizers.items():
            dist.barrier()
            starts = {clock: read() for clock, read in CLOCKS.items()}
            optimizer.step()
            if turn >= 0:
                for clock, read in CLOCKS.items():
                    times[kind][clock].append(read() - starts[clock])
    error = max(
        float(((a - b).abs().max() / a.abs().max()).detach())
        for a, b in zip(kinds["one"], kinds["shared"], strict=True)
    )
    medians = {kind: {c: statistics.median(t) for c, t in clocks.items()} for kind, clocks in times.items()}
    return {"seconds": medians, "error": error}


def work(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=args.ranks)
    results: list[dict[str, Any]] = []
    for name in args.optimizers:
        by_rank: list[Any] = [None] * args.ranks
        dist.all_gather_object(by_rank, measure(CONTENDERS[name], args.layers, args.width, args.rounds))
        ratios = {
            clock: max(r["seconds"]["shared"][clock] / r["seconds"]["one"][clock] for r in by_rank)
            for clock in CLOCKS
        }
        results.append({"optimizer": name, "ratios": ratios, "ranks": by_rank})
        if rank == 0:
            one = 1e3 * by_rank[0]["seconds"]["one"]["processor"]
            error = max(r["error"] for r in by_rank)
            print(
                f"{name:14}{one:10.1f}{ratios['processor']:12.2f}{ratios['wall']:8.2f}{error:12.1e}",
                flush=True,
            )
    if rank == 0 and args.out:
        facts = {"torch": torch.__version__, "ranks": args.ranks, "layers": args.layers, "width": args.width}
        args.out.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--optimizers", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(f"GPT of {args.layers} layers, width {args.width}, on {args.ranks} ranks of one thread")
    print(f"{'':14}{'one, ms':>10}{'x processor':>12}{'x wall':>8}{'error':>12}")
    with tempfile.TemporaryDirectory() as folder:
        start_processes(work, (args, f"{folder}/rendezvous"), nprocs=args.ranks, start_method="spawn")


if __name__ == "__main__":
    main()
