"""Forward and backward of one layer with Bone, side by side with PEFT's MiSS and LoRA in one run: time and memory.

    python benchmarks/adapters_bone.py --threads 1 2 --out bone.json

Contenders take turns, so that a busy machine slows all of them alike; ratios are medians over rounds. Memory is the most
that a call holds at once by the allocator's own events, beyond output and input gradient, in tensors of the
weight's size. "plain products" are the three that no form can spare: output, input gradient, weight gradient; "two
plain products" spare the last, as additive forms do.
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

import peft
import torch
from peft import LoraConfig, MissConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from weightlab.adapters import BoneConfig

R = 64
CASES = {
    "1024 x 1024, 64 tokens": (1024, 64),
    "1024 x 1024, 512 tokens": (1024, 512),
    "1024 x 1024, 1024 tokens": (1024, 1024),
    "1024 x 1024, 2048 tokens": (1024, 2048),
    "2048 x 2048, 512 tokens": (2048, 512),
}
# Contender -> what it is compared with.
PEERS = {
    "three plain products": "PEFT MiSS bat",
    "PEFT MiSS bat": "PEFT MiSS bat",
    "Bone affine": "PEFT MiSS bat",
    "Bone affine_row": "PEFT MiSS bat",
    "two plain products": "PEFT MiSS",
    "PEFT MiSS": "PEFT MiSS",
    "Bone additive": "PEFT MiSS",
    "PEFT LoRA, r 32": "PEFT MiSS",
}
CONFIGS: dict[str, Any] = {
    "PEFT MiSS bat": lambda **k: MissConfig(r=R, init_weights="bat", **k),
    "Bone affine": lambda **k: BoneConfig(r=R, **k),
    "Bone affine_row": lambda **k: BoneConfig(r=R, variant="affine_row", **k),
    "PEFT MiSS": lambda **k: MissConfig(r=R, **k),
    "Bone additive": lambda **k: BoneConfig(r=R, variant="additive", **k),
    "PEFT LoRA, r 32": lambda **k: LoraConfig(r=R // 2, **k),
}


def calls(side: int, tokens: int) -> dict[str, Callable[[], object]]:
    """One forward and backward of each contender, in the order of `PEERS`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, side, generator=generator)
    gradient = torch.randn(tokens, side, generator=generator)
    weight = torch.randn(side, side, generator=generator)

    def train(config: Any) -> Callable[[], object]:
        model = get_peft_model(nn.Sequential(nn.Linear(side, side)), config(target_modules=["0"]))
        inputs = x.clone().requires_grad_()

        def call() -> None:
            inputs.grad = None
            model.zero_grad(set_to_none=True)
            model(inputs).backward(gradient)

        return call

    def two() -> tuple[Tensor, Tensor]:
        return x @ weight.T, gradient @ weight

    def three() -> tuple[Tensor, ...]:
        return *two(), gradient.T @ x

    plain = {"three plain products": three, "two plain products": two}
    return {name: plain[name] if name in plain else train(CONFIGS[name]) for name in PEERS}


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that a call has allocated and not yet freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, live)
    return peak


def measure(case: str, threads: int, rounds: int, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    torch.set_num_threads(threads)
    side, tokens = CASES[case]
    contenders = calls(side, tokens)
    for call in contenders.values():
        call()
    outside = 2 * 4 * tokens * side
    buffers = {name: (peak_bytes(call) - outside) / (4 * side**2) for name, call in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {
        name: {
            "ms": 1e3 * statistics.median(column),
            "best_ms": 1e3 * min(column),
            "ratio": statistics.median(t / r for t, r in zip(column, times[PEERS[name]], strict=True)),
            "buffers": buffers[name],
        }
        for name, column in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="wall time, or processor time (for one thread on a machine that is busy)",
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    clock = time.perf_counter if args.clock == "wall" else time.process_time
    results: list[dict[str, Any]] = []
    for case in args.cases:
        for threads in args.threads:
            rows = measure(case, threads, args.rounds, clock)
            print(f"\n{case}, r {R}: forward and backward, {threads} thread(s)")
            print(f"{'':24}{'ms':>9}{'best ms':>9}{'x peer':>8}{'buffers':>9}  peer")
            for name, row in rows.items():
                print(
                    f"{name:24}{row['ms']:9.1f}{row['best_ms']:9.1f}{row['ratio']:8.2f}{row['buffers']:9.2f}"
                    f"  {PEERS[name]}",
                    flush=True,
                )
            results.append({"case": case, "threads": threads, "rows": rows})
    if args.out:
        facts = {
            "torch": torch.__version__,
            "peft": peft.__version__,
            "clock": args.clock,
            "processor": platform.processor() or platform.machine(),
        }
        args.out.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
