"""Forward and backward time of layers, side by side with PyTorch's in one run.

    python benchmarks/nn.py --threads 1 2 --out nn.json

Contenders take turns, so that a busy machine slows all of them alike; what is reported is the median
over rounds of each contender's time divided by `torch.nn`'s in the same round.
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

from weightlab.nn import GhostBatchNorm1d, GhostBatchNorm2d

CASES: dict[str, tuple[tuple[int, ...], int]] = {
    "(4096, 512), ghost 128": ((4096, 512), 128),
    "(4096, 512), ghost 32": ((4096, 512), 32),
    "(512, 64, 8, 8), ghost 32": ((512, 64, 8, 8), 32),
    "(256, 64, 32, 32), ghost 32": ((256, 64, 32, 32), 32),
}


class SplitLoop(nn.Module):
    """The usual implementation: one batch norm layer, called for each piece of the batch in turn."""

    def __init__(self, norm: nn.Module, ghost_size: int) -> None:
        super().__init__()
        self.norm, self.ghost_size = norm, ghost_size

    def forward(self, x: Tensor) -> Tensor:
        """Normalise piece by piece."""
        return torch.cat([self.norm(piece) for piece in x.split(self.ghost_size)])


class VarMean(nn.Module):
    """Composed from elementary operations, without running statistics."""

    def __init__(self, channels: int, ghost_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.ghost_size = ghost_size

    def forward(self, x: Tensor) -> Tensor:
        """Normalise all ghosts at once, one operation after another."""
        ghosts = x.unflatten(0, (-1, self.ghost_size))
        dims = [1, *range(3, ghosts.ndim)]
        variance, mean = torch.var_mean(ghosts, dims, correction=0, keepdim=True)
        shape = (-1, *[1] * (x.ndim - 2))
        y = (ghosts - mean) * (variance + 1e-5).rsqrt() * self.weight.view(shape) + self.bias.view(shape)
        return y.flatten(0, 1)


def contenders(channels: int, ndim: int, ghost_size: int) -> dict[str, nn.Module]:
    plain, ghost = (nn.BatchNorm1d, GhostBatchNorm1d) if ndim == 2 else (nn.BatchNorm2d, GhostBatchNorm2d)
    return {
        "BatchNorm": plain(channels),
        "GhostBatchNorm strided": ghost(channels, ghost_size, assignment="strided"),
        "GhostBatchNorm contiguous": ghost(channels, ghost_size),
        "split loop": SplitLoop(plain(channels), ghost_size),
        "var_mean": VarMean(channels, ghost_size),
    }


def pass_through(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    def call() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).backward(gradient)

    return call


def measure(case: str, threads: int, seconds: float) -> dict[str, dict[str, float]]:
    torch.set_num_threads(threads)
    shape, ghost_size = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    gradient = torch.randn(shape, generator=generator)
    layers = contenders(shape[1], len(shape), ghost_size)
    calls = {name: pass_through(layer, x, gradient) for name, layer in layers.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    turn = -1
    while turn < 5 or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
        turn += 1
    return {
        name: {
            "ms": 1e3 * statistics.median(column),
            "best_ms": 1e3 * min(column),
            "ratio": statistics.median(t / r for t, r in zip(column, times["BatchNorm"], strict=True)),
        }
        for name, column in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each case and number of threads")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    results: list[dict[str, Any]] = []
    for case in args.cases:
        for threads in args.threads:
            rows = measure(case, threads, args.seconds)
            print(f"\n{case}: forward and backward, {threads} thread(s)")
            print(f"{'':26}{'ms':>9}{'best ms':>9}{'x BatchNorm':>13}")
            for name, row in rows.items():
                print(f"{name:26}{row['ms']:9.2f}{row['best_ms']:9.2f}{row['ratio']:13.2f}")
            results.append({"case": case, "threads": threads, "rows": rows})
    if args.out:
        facts = {"torch": torch.__version__, "processor": platform.processor() or platform.machine()}
        args.out.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
