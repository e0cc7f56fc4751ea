"""Step time and state of optimizers, side by side in one run.

    python benchmarks/optim.py --threads 1 2 --out optim.json

Contenders take turns, so that a busy machine slows all of them alike; medians over the rounds are
compared with one another, never with numbers of another run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from weightlab.optim import AuON, HybridAuON

Shapes = Sequence[tuple[int, ...]]


def gpt_shapes(layers: int = 6, width: int = 512, vocabulary: int = 256, context: int = 256) -> Shapes:
    shapes: list[tuple[int, ...]] = [(vocabulary, width), (context, width)]
    for _ in range(layers):
        matrices = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
        shapes += [(width,)] * 4 + matrices
    return [*shapes, (width,), (width,)]


LISTS: dict[str, Shapes] = {
    "matrices": [(512, 512), (512, 512), (512, 1024), (1024, 512), (1024, 1024)],
    "gpt": gpt_shapes(),
}

CONTENDERS: dict[str, Callable[[list[nn.Parameter]], list[Optimizer]]] = {
    "AdamW foreach": lambda params: [AdamW(params, foreach=True)],
    "AdamW fused": lambda params: [AdamW(params, fused=True)],
    "SGD momentum foreach": lambda params: [SGD(params, lr=1e-3, momentum=0.95, foreach=True)],
    "AuON": lambda params: [AuON(params)],
    "AuON code form": lambda params: [AuON(params, normalize=False, gamma=1.5)],
    "AuON gamma=0": lambda params: [AuON(params, gamma=0.0)],
    "AuON gamma='rms'": lambda params: [AuON(params, gamma="rms")],
}
MATRIX_CONTENDERS: dict[str, Callable[[list[nn.Parameter]], list[Optimizer]]] = {
    "Muon": lambda params: [
        Muon([p for p in params if p.ndim == 2]),
        AdamW([p for p in params if p.ndim != 2] or [nn.Parameter(torch.zeros(1))], foreach=True),
    ],
    "HybridAuON 5 steps": lambda params: [HybridAuON(params)],
    "HybridAuON 5 bfloat16": lambda params: [HybridAuON(params, ns_dtype=torch.bfloat16)],
    "HybridAuON 1 step": lambda params: [HybridAuON(params, ns_steps=1)],
}


def make(build: Callable[[list[nn.Parameter]], list[Optimizer]], shapes: Shapes) -> list[Optimizer]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    return build(params)


def state_bytes(optimizers: Sequence[Optimizer]) -> int:
    tensors = [t for o in optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(shapes: Shapes, threads: int, rounds: int, matrix_rounds: int) -> dict[str, dict[str, float]]:
    torch.set_num_threads(threads)
    built = {name: make(build, shapes) for name, build in {**CONTENDERS, **MATRIX_CONTENDERS}.items()}
    wall: dict[str, list[float]] = {name: [] for name in built}
    cpu: dict[str, list[float]] = {name: [] for name in built}
    for turn in range(-1, rounds):
        for name, optimizers in built.items():
            if name in MATRIX_CONTENDERS and turn >= matrix_rounds:
                continue
            start, cpu_start = time.perf_counter(), time.process_time()
            for optimizer in optimizers:
                optimizer.step()
            if turn >= 0:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - cpu_start)
    return {
        name: {
            "step_ms": 1e3 * statistics.median(wall[name]),
            "cpu_ms": 1e3 * statistics.median(cpu[name]),
            "state_mb": state_bytes(optimizers) / 2**20,
        }
        for name, optimizers in built.items()
    }


def show(rows: dict[str, dict[str, float]], clock: str) -> dict[str, dict[str, float]]:
    """Print a table and return each contender's time as a multiple of the references'."""
    references = ("AdamW foreach", "SGD momentum foreach", "Muon")
    ratios = {name: {r: row[clock] / rows[r][clock] for r in references} for name, row in rows.items()}
    print(f"{'':22}{'ms':>9}{'state MiB':>11}{'x AdamW':>9}{'x SGD':>8}{'x Muon':>8}")
    for name, row in rows.items():
        by = ratios[name]
        print(
            f"{name:22}{row[clock]:9.2f}{row['state_mb']:11.1f}"
            + "".join(f"{by[r]:{w}.2f}" for r, w in zip(references, (9, 8, 8), strict=True))
        )
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=list(LISTS))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument(
        "--matrix-rounds", type=int, default=2, help="rounds for contenders that orthogonalise"
    )
    parser.add_argument(
        "--clock",
        choices=["step_ms", "cpu_ms"],
        default="step_ms",
        help="wall time, or processor time (for one thread on a machine that is busy)",
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    results: list[dict[str, Any]] = []
    for name in args.lists:
        entries = sum(torch.Size(shape).numel() for shape in LISTS[name])
        for threads in args.threads:
            print(f"\n{name}: {entries / 1e6:.2f} M entries, {threads} thread(s)")
            rows = measure(LISTS[name], threads, args.rounds, args.matrix_rounds)
            ratios = show(rows, args.clock)
            results.append(
                {"list": name, "entries": entries, "threads": threads, "rows": rows, "ratios": ratios}
            )
    if args.out:
        facts = {"torch": torch.__version__, "processor": platform.processor() or platform.machine()}
        args.out.write_text(json.dumps({**facts, "clock": args.clock, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
