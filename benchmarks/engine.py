"""What the trial engine costs: its training step against a bare loop, resuming, and importing.

Run with `python benchmarks/engine.py [--out FILE]`. Every ratio comes from contenders that took turns
in this one run; times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import torch

from weightlab.trial import Job, RunSpec, registry, run_trial
from weightlab.trial.hashing import derive_seed
from weightlab.trial.runner import execute

HYPERPARAMETERS = {"lr": 3e-3, "weight_decay": 0.01}


def bare_loop(task_name: str, steps: int) -> float:
    """Train as plainly as PyTorch allows and return seconds."""
    task, arm = registry.task(task_name), registry.arm("adamw")
    torch.manual_seed(derive_seed(0, "weights"))
    model = task.build(torch.Generator().manual_seed(0))
    optimizer = arm.optimizer(model, HYPERPARAMETERS)
    assert isinstance(optimizer, torch.optim.Optimizer)
    generator = torch.Generator().manual_seed(0)
    model.train()
    done = 0
    begun = perf_counter()
    while done < steps:
        for batch in task.batches("train", generator):
            loss = task.loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done == steps:
                break
    return perf_counter() - begun


def engine_loop(task_name: str, steps: int) -> float:
    """Train through the engine and return its training seconds, evaluation excluded."""
    task = registry.task(task_name)
    spec = RunSpec(
        task.name, "", "adamw", "", HYPERPARAMETERS, 0, "test", steps, 1, task.batch_size, 1, "cpu", {}
    )
    seconds = execute(Job(spec, task_name, "adamw")).train_seconds
    assert seconds is not None
    return seconds


def step_overhead(task: str, steps: int, rounds: int) -> dict[str, float]:
    """Compare the engine's step with the bare one's, taking turns."""
    torch.set_num_threads(1)
    engine_loop(task, 5)
    bare_loop(task, 5)
    pairs = []
    for turn in range(rounds):
        loops = (engine_loop, bare_loop) if turn % 2 else (bare_loop, engine_loop)
        times = {loop: loop(task, steps) for loop in loops}
        pairs.append((times[engine_loop], times[bare_loop]))
    return {
        "engine_step_ms": 1e3 * statistics.median(engine for engine, _ in pairs) / steps,
        "bare_step_ms": 1e3 * statistics.median(bare for _, bare in pairs) / steps,
        "ratio": statistics.median(engine / bare for engine, bare in pairs),
        "ratio_of_minima": min(engine for engine, _ in pairs) / min(bare for _, bare in pairs),
    }


def resume_seconds() -> float:
    """Time a finished trial (3 arms, 6 tuning points, 5 seeds) answered from its store."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"steps": 5, "tune": 6, "seeds": 5, "store": Path(folder) / "store.sqlite"}
        run_trial("digits-mlp", ["adamw", "sgd", "auon"], **settings)
        begun = perf_counter()
        run_trial("digits-mlp", ["adamw", "sgd", "auon"], **settings)
        return perf_counter() - begun


def import_milliseconds(rounds: int = 7) -> dict[str, float]:
    """Time `import torch` with and without `import weightlab`, in fresh interpreters that take turns."""
    code = "import time, torch; t = time.perf_counter(); import {}; print(1e3 * (time.perf_counter() - t))"

    def added(module: str) -> float:
        return float(subprocess.check_output([sys.executable, "-c", code.format(module)]))

    return {"weightlab_after_torch_ms": statistics.median(added("weightlab") for _ in range(rounds))}


def main() -> None:
    """Measure, print and, if asked, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    figures = {
        "docs-gpt step": step_overhead("docs-gpt", 60, arguments.rounds),
        "digits-mlp step": step_overhead("digits-mlp", 400, arguments.rounds),
        "finished trial, seconds": resume_seconds(),
        "import": import_milliseconds(),
    }
    print(json.dumps(figures, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
