"""Spectra of whole checkpoints beside WeightWatcher, and of a 7B-shaped one beside the flops that it cannot do without.

    python benchmarks/spectra.py --layers 1 --out spectra.json
    python benchmarks/spectra.py --resnets
    python benchmarks/spectra.py --large --blocks 1

WeightWatcher is compared where it can be imported. Contenders take turns, and medians of the same run are compared,
of wall-clock and of processor time: the second is the one to read on a busy machine. The 7B checkpoint is random, in
bfloat16, and written one shard at a time, each read by a process of its own and deleted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from scipy.linalg import eigvalsh, get_blas_funcs
from torch import nn

from weightlab.inspect import Report, layer_report
from weightlab.tasks.models.pretrained import load_pretrained_resnet
from weightlab.trial.memory import PeakMemory

try:
    weightwatcher: Any = importlib.import_module("weightwatcher")
except ImportError:
    weightwatcher = None

# Our column -> WeightWatcher's.
SAME = {
    "alpha": "alpha",
    "ks": "D",
    "xmin": "xmin",
    "n_tail": "num_pl_spikes",
    "erg_count": "num_ERG_spikes",
    "alpha_hat": "alpha_weighted",
    "log_norm": "log_norm",
    "matrix_rank": "matrix_rank",
}
GPT2 = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
WIDTH, INNER, VOCABULARY, BLOCKS = 4096, 11008, 32000, 32
BLOCK = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]
EMBEDDINGS = [(VOCABULARY, WIDTH)] * 2


def gpt2(layers: int) -> nn.Module:
    """Matrices of the shapes in so many blocks of GPT-2 small, as its initialisation draws them."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(inner, outer) for _ in range(layers) for outer, inner in GPT2))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.02)
    return model


def watched(model: nn.Module, **options: Any) -> Any:
    """WeightWatcher's table with all metrics."""
    if weightwatcher is None:
        raise SystemExit("WeightWatcher cannot be imported")
    with contextlib.redirect_stdout(None):
        return weightwatcher.WeightWatcher(model=model).analyze(detX=True, **options)


def compare(contenders: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds of each contender in turns, with how many times faster than the first, and what each returned."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, call in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            results[name] = call()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    medians = {
        name: [statistics.median(column) for column in zip(*t, strict=True)] for name, t in times.items()
    }
    first = next(iter(medians.values()))
    figures = {
        name: {
            "wall s": wall,
            "cpu s": cpu,
            "times faster, wall": first[0] / wall,
            "times faster, cpu": first[1] / cpu,
        }
        for name, (wall, cpu) in medians.items()
    }
    return figures, results


def parity(report: Report, table: Any) -> dict[str, Any]:
    """Largest differences to WeightWatcher's numbers over the layers that both fit, and where counts differ."""
    theirs = {str(row["longname"]): row for _, row in table.iterrows()}
    pairs = [(row, theirs[row.name.removesuffix(".weight")]) for row in report.rows if row.status == "ok"]
    found: dict[str, Any] = {"layers": len(pairs)}
    for ours, other in SAME.items():
        if any(getattr(row, ours) is None for row, _ in pairs):
            continue
        values = [(float(getattr(row, ours)), float(them[other])) for row, them in pairs]
        found[ours] = {
            "largest difference": max(abs(a - b) for a, b in values),
            "relative": max(abs(a - b) / max(abs(b), 1e-300) for a, b in values),
            "layers that differ by over 1e-4": sum(abs(a - b) > 1e-4 for a, b in values),
            "mean": statistics.fmean(a for a, _ in values),
            "mean of theirs": statistics.fmean(b for _, b in values),
        }
    return found


def race(model: nn.Module, rounds: int, randomised: bool) -> dict[str, Any]:
    """Both tools on one model, plain and, if asked, with shuffled entries."""
    figures: dict[str, Any] = {}
    for kind in ("plain", "randomised")[: 1 + randomised]:
        random = kind == "randomised"
        contenders: dict[str, Callable[[], Any]] = {
            "float64": lambda random=random: layer_report(model, randomize=random),
            "float32": lambda random=random: layer_report(model, randomize=random, dtype=torch.float32),
        }
        if weightwatcher is not None:
            contenders = {
                "weightwatcher": lambda random=random: watched(model, randomize=random),
                **contenders,
            }
        figures[kind], results = compare(contenders, 1 if random else rounds)
        if weightwatcher is not None:
            for name in ("float64", "float32"):
                figures[kind][name]["parity"] = parity(results[name], results["weightwatcher"])
    return figures


def read(path: str, dtype: torch.dtype, threads: int) -> None:
    """What a child process does: read a shard, print seconds and memory."""
    torch.set_num_threads(threads)
    memory = PeakMemory(torch.device("cpu"))
    before = memory.read()
    wall, cpu = time.perf_counter(), time.process_time()
    report = layer_report(path, dtype=dtype)
    seconds = {"wall s": time.perf_counter() - wall, "cpu s": time.process_time() - cpu}
    statuses = sorted({row.status for row in report.rows})
    print(json.dumps({**seconds, "peak MiB": memory.read(), "MiB before": before, "statuses": statuses}))


def floor(dtype: torch.dtype) -> dict[str, float]:
    """Seconds of an eigvalsh of the width by the faster of two libraries, and flops a second of BLAS's symmetric product."""
    X = torch.randn(WIDTH, WIDTH, dtype=dtype)
    (syrk,) = get_blas_funcs(("syrk",), (X.numpy(),))

    def timed(call: Callable[[], Any]) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    product = min(timed(lambda: syrk(1.0, X.numpy().T)) for _ in range(2))
    G = X @ X.mT
    scipy = timed(lambda: eigvalsh(G.numpy(), driver="ev", check_finite=False))
    eigen = min(scipy, timed(lambda: torch.linalg.eigvalsh(G)))
    return {"eigvalsh cpu s": eigen, "flops a second": WIDTH**3 / product}


def least(shapes: Sequence[tuple[int, int]], rates: dict[str, float]) -> float:
    """Processor seconds of Gram products and eigenvalues alone."""
    flops = sum(math.prod(shape) * min(shape) for shape in shapes)
    return flops / rates["flops a second"] + len(shapes) * rates["eigvalsh cpu s"]


def large(blocks: int, embeddings: bool, dtype: torch.dtype, threads: int) -> dict[str, Any]:
    """Read shards of a 7B-shaped checkpoint, each written, read by a fresh process and deleted."""
    shards = [BLOCK] * blocks + [EMBEDDINGS] * embeddings
    found: list[dict[str, Any]] = []
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for index, shapes in enumerate(shards):
            path = Path(folder) / f"model-{index + 1:05d}-of-{BLOCKS + 1:05d}.safetensors"
            save_file(
                {
                    f"layers.{index}.{number}.weight": torch.randn(shape, generator=generator)
                    .mul_(0.02)
                    .bfloat16()
                    for number, shape in enumerate(shapes)
                },
                path,
            )
            command = [sys.executable, __file__, "--read", str(path), "--threads", str(threads)]
            command += ["--float32"] if dtype == torch.float32 else []
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append(json.loads(output))
            path.unlink()
            print(json.dumps(found[-1]), flush=True)
    rates = floor(dtype)
    share = sum(least(shapes, rates) for shapes in shards) / sum(row["cpu s"] for row in found)
    whole = [*BLOCK * BLOCKS, *EMBEDDINGS]
    return {
        "shards": found,
        "peak MiB": max(row["peak MiB"] for row in found),
        "floor": rates,
        "share of the floor": share,
        "parameters": sum(map(math.prod, whole)),
        "whole checkpoint, extrapolated cpu hours": least(whole, rates) / share / 3600,
    }


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12, help="blocks of GPT-2 small; 0 for none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--no-randomised", action="store_true", help="leave out shuffles, slow in WeightWatcher"
    )
    parser.add_argument(
        "--resnets", action="store_true", help="trained CIFAR-10 ResNets, from WEIGHTLAB_DATA"
    )
    parser.add_argument("--large", action="store_true", help="a 7B-shaped checkpoint instead")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="how many of its 32 blocks")
    parser.add_argument("--embeddings", action="store_true", help="its embeddings, too")
    parser.add_argument("--float32", action="store_true", help="compute the large one in float32")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dtype = torch.float32 if options.float32 else torch.float64
    if options.read:
        read(options.read, dtype, options.threads)
        return
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    figures: dict[str, Any] = {
        "torch": torch.__version__,
        "weightwatcher": getattr(weightwatcher, "__version__", None),
        "machine": platform.machine(),
        "threads": options.threads,
    }
    if options.large:
        figures["7B"] = large(options.blocks, options.embeddings, dtype, options.threads)
        print(json.dumps(figures["7B"], indent=2))
    else:
        models: dict[str, Callable[[], nn.Module]] = {}
        if options.layers:
            models[f"GPT-2 small, {options.layers} blocks"] = lambda: gpt2(options.layers)
        if options.resnets:
            for name in ("resnet20", "resnet32", "resnet56"):
                models[name] = lambda name=name: load_pretrained_resnet(name)
        for name, build in models.items():
            figures[name] = race(build(), options.rounds, not options.no_randomised)
            print(json.dumps({name: figures[name]}, indent=2), flush=True)
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
