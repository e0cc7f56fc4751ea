"""Time to merge adapters, beside PEFT's own ways, and to generate columns of a shared basis, beside a full QR.

    python benchmarks/adapters_orthogonal.py --threads 1 --out orthogonal.json

Contenders take turns, so that a busy machine slows all of them alike; medians over the rounds.
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
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from weightlab.adapters import basis
from weightlab.adapters.lora_layers import lora_layers
from weightlab.adapters.merging import delta, merge_adapters
from weightlab.adapters.orthogonal import orthogonal_lora_

WIDTH, LAYERS, RANK, ADAPTERS = 768, 12, 16, 4
WIDTHS = (320, 768, 1280, 4096)
CLOCKS = {"ms": time.perf_counter, "cpu_ms": time.process_time}


def model() -> PeftModel:
    """A stack of square layers with orthogonal adapters in slots 0, 1, ..."""
    torch.manual_seed(0)
    stack = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    config = LoraConfig(r=RANK, target_modules=[str(index) for index in range(LAYERS)])
    adapted: Any = get_peft_model(stack, config, "0")
    for slot in range(ADAPTERS):
        if slot:
            adapted.add_adapter(str(slot), config)
        orthogonal_lora_(adapted, str(slot), slot=slot)
        for layer in lora_layers(adapted, str(slot)).values():
            nn.init.normal_(layer.lora_B[str(slot)].weight, std=0.02)  # type: ignore[arg-type]
    return adapted


def timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return 1e3 * (clock() - start)


def merging(rounds: int, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    names = [str(slot) for slot in range(ADAPTERS)]
    factors = [0.6] * ADAPTERS
    adapted = model()
    layers = lora_layers(adapted, "0")
    exact = {key: delta(layer, dict(zip(names, factors, strict=True))) for key, layer in layers.items()}
    times: dict[str, list[float]] = {}
    errors: dict[str, float] = {}

    def error(found: Callable[[Any], torch.Tensor]) -> float:
        parts = [(found(layer) - exact[key]).square().sum() for key, layer in layers.items()]
        return float(sum(parts) / sum(e.square().sum() for e in exact.values())) ** 0.5

    def peft(kind: str) -> None:
        adapted.base_model.add_weighted_adapter(names, factors, "peft", combination_type=kind)  # type: ignore[operator, arg-type]

    for turn in range(-1, rounds):
        base = {key: layer.get_base_layer().weight.detach().clone() for key, layer in layers.items()}  # type: ignore[union-attr, operator]
        merges: list[Any] = []
        jobs: dict[str, Callable[[], object]] = {
            "merge_adapters weights": lambda m=merges: m.append(
                merge_adapters(adapted, dict(zip(names, factors, strict=True)))
            ),
            "merge_adapters cat": lambda: merge_adapters(
                adapted, dict(zip(names, factors, strict=True)), method="cat", adapter_name="peft"
            ),
            "PEFT cat": lambda: peft("cat"),
            "PEFT linear": lambda: peft("linear"),
            "PEFT svd": lambda: peft("svd"),
        }
        for name, job in jobs.items():
            if name == "PEFT svd" and turn >= 1:
                continue
            took = timed(job, clock)
            if merges:
                errors[name] = error(
                    lambda layer, base=base: layer.get_base_layer().weight - base[_key(layers, layer)]
                )
                merges.pop().unmerge()
            else:
                errors[name] = error(lambda layer: layer.get_delta_weight("peft"))
                adapted.delete_adapter("peft")
            if turn >= 0:
                times.setdefault(name, []).append(took)
    return {
        name: {"ms": statistics.median(values), "relative error": errors[name]}
        for name, values in times.items()
    }


def _key(layers: dict[str, Any], wanted: Any) -> str:
    return next(key for key, layer in layers.items() if layer is wanted)


def bases(rounds: int, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    result: dict[str, dict[str, float]] = {}
    for n in WIDTHS:
        jobs: dict[str, Callable[[], object]] = {
            "slot 0": lambda n=n: basis.shared_basis(n, RANK, slot=0),
            "key": lambda n=n: basis.shared_basis(n, RANK, key="cat"),
            "slot 0, again": lambda n=n: basis.shared_basis(n, RANK, slot=0),
            "hadamard": lambda n=n: basis.shared_basis(n, RANK, key="cat", kind="hadamard"),
            "gaussian": lambda n=n: basis.shared_basis(n, RANK, key="cat", kind="gaussian"),
            "QR of all": lambda n=n: torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)),
        }
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(rounds if n < 4096 else 1):
            basis._haar.cache_clear()
            for name, job in jobs.items():
                if name == "key":
                    basis._haar.cache_clear()
                times[name].append(timed(job, clock))
        result[str(n)] = {name: statistics.median(values) for name, values in times.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="ms",
        help="wall time, or processor time (for one thread on a machine that is busy)",
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = CLOCKS[args.clock]
    result = {
        "threads": args.threads,
        "clock": args.clock,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "merging": merging(args.rounds, clock),
        "basis": bases(args.rounds, clock),
    }
    print(f"{ADAPTERS} adapters of rank {RANK} on {LAYERS} layers of {WIDTH}×{WIDTH}, {args.clock}")
    for name, row in result["merging"].items():
        print(f"{name:24} {row['ms']:9.1f}   relative error {row['relative error']:.1e}")
    print(f"\nbasis, rank {RANK}, {args.clock}")
    for n, row in result["basis"].items():
        print(f"n {n:>5}  " + "  ".join(f"{name} {value:.2f}" for name, value in row.items()))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
