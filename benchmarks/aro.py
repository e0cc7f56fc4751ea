"""Step time of ARO against Muon in float32, side by side in one run, and what its parts cost.

    python benchmarks/aro.py --threads 1 2 --out aro.json

Muon is PyTorch's, operation by operation, but in float32 instead of bfloat16: that is what a step of ARO, all in
float32, compares with. Contenders take turns, so that a busy machine slows all of them alike. ARO that turns
its frame at every fifth step is timed over whole cycles.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from weightlab.linalg import qr_factor, sinkhorn_normalize
from weightlab.linalg.native_dtype import has_native_bfloat16
from weightlab.optim import ARO, MatrixOptimizer

MATRICES = [(512, 512), (512, 512), (512, 1024), (1024, 512), (1024, 1024)]
SMALL = [(128, 128), (128, 128), (128, 256), (256, 128), (256, 256)]
CYCLE = 5


class PlainMuon(MatrixOptimizer):
    """Muon with five Newton-Schulz steps as `torch.optim.Muon` takes them, in the parameter's dtype."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 1e-3, "momentum": 0.95, "nesterov": True, "weight_decay": 0.1})

    def direction(self, update: Tensor, group: dict) -> Tensor:
        """Orthogonalise by plain products."""
        X = update.T if update.size(0) > update.size(1) else update
        X = X / X.norm().clamp(min=1e-7)
        for _ in range(5):
            gram = X @ X.T
            gram = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
            X = torch.addmm(X, gram, X, beta=3.4445)
        return X.T if update.size(0) > update.size(1) else X


CONTENDERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "Muon float32": PlainMuon,
    "torch.optim.Muon": lambda params: Muon(params, lr=1e-3),
    "AdamW": lambda params: AdamW(params),
    "ARO": lambda params: ARO(params),
    "ARO cholesky": lambda params: ARO(params, qr="cholesky"),
    "ARO sign": lambda params: ARO(params, base="sign"),
    "ARO every 5": lambda params: ARO(params, rotation_every=CYCLE),
    "Sinkhorn (none)": lambda params: ARO(params, policy="none"),
}


def build(
    make: Callable[[list[nn.Parameter]], Optimizer], shapes: Sequence[tuple[int, int]], device: str
) -> Optimizer:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(device)) for shape in shapes]
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * 1e-3).to(device)
    return make(params)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(run: Callable[[], object], device: str, clock: str) -> float:
    start = CLOCKS[clock]()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return CLOCKS[clock]() - start


def measure(
    shapes: Sequence[tuple[int, int]], threads: int, rounds: int, device: str, clock: str
) -> dict[str, dict[str, float]]:
    torch.set_num_threads(threads)
    # PyTorch's Muon computes in bfloat16: many seconds a step where the device has to emulate it.
    native = has_native_bfloat16(torch.device(device))
    optimizers = {
        name: build(make, shapes, device)
        for name, make in CONTENDERS.items()
        if native or name != "torch.optim.Muon"
    }
    for name, optimizer in optimizers.items():
        for _ in range(CYCLE if name == "ARO every 5" else 1):  # sets up state, and ends a cycle
            optimizer.step()
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            times[name].append(
                statistics.fmean(
                    seconds(optimizer.step, device, clock)
                    for _ in range(CYCLE if name == "ARO every 5" else 1)
                )
            )
    reference = statistics.median(times["Muon float32"])
    return {
        name: {"step_ms": 1e3 * statistics.median(t), "x_muon": statistics.median(t) / reference}
        for name, t in times.items()
    }


def parts(side: int, threads: int, rounds: int, device: str, clock: str) -> dict[str, float]:
    """Milliseconds of the operations that a step on one square matrix consists of."""
    torch.set_num_threads(threads)
    A = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(device)
    runs: dict[str, Callable[[], object]] = {
        "product": lambda: A @ A.T,
        "QR, Householder": lambda: qr_factor(A),
        "QR, Cholesky": lambda: qr_factor(A, "cholesky"),
        "Sinkhorn, 5 iterations": lambda: sinkhorn_normalize(A),
    }
    times = {name: [] for name in runs}
    for turn in range(-1, rounds):
        for name, run in runs.items():
            elapsed = seconds(run, device, clock)
            if turn >= 0:
                times[name].append(elapsed)
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: for one thread on a machine that is busy"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = []
    for threads in args.threads:
        for name, shapes in (("512 to 1024", MATRICES), ("128 to 256", SMALL)):
            rows = measure(shapes, threads, args.rounds, args.device, args.clock)
            results.append({"list": name, "threads": threads, "rows": rows})
            print(f"\nfive matrices, {name}; {threads} thread(s)\n{'':24}{'ms':>9}{'x Muon float32':>16}")
            for contender, row in rows.items():
                print(f"{contender:24}{row['step_ms']:9.2f}{row['x_muon']:16.3f}")
        costs = parts(1024, threads, args.rounds, args.device, args.clock)
        results.append({"parts of a step, 1024x1024, ms": costs, "threads": threads})
        print("\nparts, 1024x1024, ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in costs.items()))
    if args.out:
        facts = {"torch": torch.__version__, "processor": platform.processor() or platform.machine()}
        args.out.write_text(json.dumps({**facts, "clock": args.clock, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
