"""Step time and state of optimizers, side by side in one run.

    python benchmarks/optim.py --threads 1 2 --out optim.json
    python benchmarks/optim.py --lists gpt2 --contenders Muon ROOT DCTAdamW

Contenders take turns, so that a busy machine slows all of them alike; medians over the rounds are
compared with one another, never with numbers of another run. Optimizers that do some work only at every
k-th step are timed over whole cycles of k steps. All contenders of a list move the same parameters.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from weightlab._lazy import require
from weightlab.optim import ARO, ROOT, AuON, DCTAdamW, HybridAuON, Trion
from weightlab.trial.memory import state_size

Shapes = Sequence[tuple[int, ...]]


def gpt_shapes(layers: int = 6, width: int = 512, vocabulary: int = 256, context: int = 256) -> Shapes:
    shapes: list[tuple[int, ...]] = [(vocabulary, width), (context, width)]
    for _ in range(layers):
        matrices = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
        shapes += [(width,)] * 4 + matrices
    return [*shapes, (width,), (width,)]


# Matrices of GPT-2 small, fused query, key and value, without embeddings and vectors.
GPT2 = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12

LISTS: dict[str, Shapes] = {
    "matrices": [(512, 512), (512, 512), (512, 1024), (1024, 512), (1024, 1024)],
    "gpt": gpt_shapes(),
    "gpt2": GPT2,
}


@dataclass(frozen=True)
class Contender:
    """How to build an optimizer, and how to time it.

    Attributes:
        build: From parameters to the optimizers that move them.
        cheap: Its step costs about what AdamW's does, so that many rounds are affordable.
        cycle: Steps after which its work repeats.
        lists: Lists of shapes that it is measured on.
    """

    build: Callable[[list[nn.Parameter]], list[Optimizer]]
    cheap: bool = False
    cycle: int = 1
    lists: Collection[str] = tuple(LISTS)


def muon(params: list[nn.Parameter]) -> list[Optimizer]:
    matrices = [p for p in params if p.ndim == 2]
    others = [p for p in params if p.ndim != 2]
    return [Muon(matrices), *([AdamW(others, foreach=True)] if others else [])]


def peer(name: str, **settings: Any) -> Callable[[list[nn.Parameter]], list[Optimizer]]:
    return lambda params: [getattr(require("pytorch_optimizer", "bench"), name)(params, **settings)]


BF16 = torch.bfloat16
SMALL = ("matrices", "gpt")
CONTENDERS: dict[str, Contender] = {
    "AdamW foreach": Contender(lambda params: [AdamW(params, foreach=True)], cheap=True),
    "AdamW fused": Contender(lambda params: [AdamW(params, fused=True)], cheap=True),
    "SGD momentum foreach": Contender(
        lambda params: [SGD(params, lr=1e-3, momentum=0.95, foreach=True)], cheap=True
    ),
    "Muon": Contender(muon),
    "Lion": Contender(peer("Lion"), cheap=True),
    "SOAP": Contender(peer("SOAP"), cycle=10, lists=("matrices",)),
    "AuON": Contender(lambda params: [AuON(params)], cheap=True),
    "AuON code form": Contender(
        lambda params: [AuON(params, normalize=False, gamma=1.5)], cheap=True, lists=SMALL
    ),
    "AuON gamma=0": Contender(lambda params: [AuON(params, gamma=0.0)], cheap=True, lists=SMALL),
    "AuON gamma='rms'": Contender(lambda params: [AuON(params, gamma="rms")], cheap=True, lists=SMALL),
    "HybridAuON 1 step": Contender(lambda params: [HybridAuON(params, ns_steps=1)], lists=SMALL),
    "HybridAuON 5 steps": Contender(lambda params: [HybridAuON(params)], lists=("matrices",)),
    "ROOT as Muon, bf16": Contender(
        lambda params: [ROOT(params, clip_quantile=None, coefficients="muon", ns_dtype=BF16)]
    ),
    "ROOT bf16": Contender(lambda params: [ROOT(params, ns_dtype=BF16)]),
    "ROOT as Muon, fp32": Contender(
        lambda params: [ROOT(params, clip_quantile=None, coefficients="muon")], lists=SMALL
    ),
    "ROOT fp32": Contender(lambda params: [ROOT(params)], lists=SMALL),
    "ARO": Contender(lambda params: [ARO(params)]),
    "ARO every 5": Contender(lambda params: [ARO(params, rotation_every=5)], cycle=5, lists=SMALL),
    "DCTAdamW r=64": Contender(lambda params: [DCTAdamW(params, rank=64)]),
    "Trion r=64": Contender(lambda params: [Trion(params, rank=64)]),
}
REFERENCES = {"AdamW": "AdamW foreach", "SGD": "SGD momentum foreach", "Muon": "Muon"}


def parameters(shapes: Shapes) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    return params


def measure(
    contenders: dict[str, Contender], shapes: Shapes, threads: int, rounds: int, matrix_rounds: int
) -> dict[str, dict[str, float]]:
    torch.set_num_threads(threads)
    params = parameters(shapes)
    built = {name: contender.build(params) for name, contender in contenders.items()}
    wall: dict[str, list[float]] = {name: [] for name in built}
    cpu: dict[str, list[float]] = {name: [] for name in built}
    for turn in range(-1, rounds):
        for name, optimizers in built.items():
            contender = contenders[name]
            if not contender.cheap and turn >= matrix_rounds:
                continue
            start, cpu_start = time.perf_counter(), time.process_time()
            for _ in range(contender.cycle):
                for optimizer in optimizers:
                    optimizer.step()
            if turn >= 0:
                wall[name].append((time.perf_counter() - start) / contender.cycle)
                cpu[name].append((time.process_time() - cpu_start) / contender.cycle)
    return {
        name: {
            "step_ms": 1e3 * statistics.median(wall[name]),
            "cpu_ms": 1e3 * statistics.median(cpu[name]),
            "state_mb": state_size(optimizers),
        }
        for name, optimizers in built.items()
    }


def show(rows: dict[str, dict[str, float]], clock: str) -> dict[str, dict[str, float]]:
    """Print a table and return each contender's time as a multiple of the references' at hand."""
    references = {short: name for short, name in REFERENCES.items() if name in rows}
    ratios = {
        name: {short: row[clock] / rows[by][clock] for short, by in references.items()}
        for name, row in rows.items()
    }
    print(f"{'':22}{'ms':>9}{'state MiB':>11}" + "".join(f"{'x ' + short:>9}" for short in references))
    for name, row in rows.items():
        cells = "".join(f"{ratio:9.3g}" for ratio in ratios[name].values())
        print(f"{name:22}{row[clock]:9.2f}{row['state_mb']:11.1f}{cells}", flush=True)
    return ratios


def chosen(name: str, words: Sequence[str] | None) -> dict[str, Contender]:
    """Contenders of a list whose names start with one of the words."""
    installed = importlib.util.find_spec("pytorch_optimizer") is not None
    return {
        key: contender
        for key, contender in CONTENDERS.items()
        if name in contender.lists
        and (installed or key not in ("Lion", "SOAP"))
        and (words is None or key.lower().startswith(tuple(word.lower() for word in words)))
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=list(LISTS))
    parser.add_argument("--contenders", nargs="+", help="beginnings of names; all of them by default")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--matrix-rounds", type=int, default=2, help="rounds for contenders with slow steps")
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
        contenders = chosen(name, args.contenders)
        if not contenders:
            parser.error(
                f"no contender of {name} is called {' or '.join(args.contenders)}: {', '.join(CONTENDERS)}"
            )
        entries = sum(torch.Size(shape).numel() for shape in LISTS[name])
        # A step on gpt2 takes seconds: one thread number and one round tell enough.
        large = name == "gpt2"
        for threads in [max(args.threads)] if large else args.threads:
            print(f"\n{name}: {entries / 1e6:.2f} M entries, {threads} thread(s)")
            rounds = (min(args.rounds, 5), 1) if large else (args.rounds, args.matrix_rounds)
            rows = measure(contenders, LISTS[name], threads, *rounds)
            ratios = show(rows, args.clock)
            results.append(
                {"list": name, "entries": entries, "threads": threads, "rows": rows, "ratios": ratios}
            )
    if args.out:
        facts = {"torch": torch.__version__, "processor": platform.processor() or platform.machine()}
        args.out.write_text(json.dumps({**facts, "clock": args.clock, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
