"""What matching the weights of two networks costs, beside the algorithm done as it is written.

    python benchmarks/merge.py --out merge.json
    python benchmarks/merge.py --widths 4096 --rounds 1 --epochs 1 --restarts 1 --no-plain --threads 2

Two perceptrons with three hidden layers are trained on scikit-learn's digits from different seeds, another pair in every
round. Both sides have the same number of restarts; they take turns, and medians of processor time are compared. The wall time is that of `weight_matching`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from weightlab.merge import Permutation, PermutationSpec, apply_permutation, weight_matching
from weightlab.tasks.digits_mlp import digits

Params = dict[str, Tensor]


def plain_matching(a: Params, b: Params, spec: PermutationSpec, generator: torch.Generator) -> Permutation:
    """Coordinate descent as it is written: every product anew at every visit, every assignment solved."""
    indices = dict(Permutation.identity(spec.group_sizes(a)).indices)
    tied = {
        group: [(name, axes.index(group)) for name, axes in spec.axes.items() if group in axes]
        for group in indices
    }
    for _ in range(100):
        progress = False
        for i in torch.randperm(len(spec.groups), generator=generator).tolist():
            group = spec.groups[i]
            n = len(indices[group])
            similarity = torch.zeros(n, n)
            for name, axis in tied[group]:
                moved = b[name]
                for other, axis_group in enumerate(spec.axes[name]):
                    if isinstance(axis_group, str) and other != axis:
                        moved = moved.index_select(other, indices[axis_group])
                similarity += (
                    a[name].movedim(axis, 0).reshape(n, -1) @ moved.movedim(axis, 0).reshape(n, -1).T
                )
            new = torch.from_numpy(linear_sum_assignment(similarity.numpy(), maximize=True)[1])
            gain = (
                similarity.gather(1, new[:, None]).sum() - similarity.gather(1, indices[group][:, None]).sum()
            )
            indices[group] = new
            progress = progress or float(gain) > 1e-12
        if not progress:
            break
    return Permutation(indices)


def objective(a: Params, b: Params, spec: PermutationSpec, perm: Permutation) -> float:
    """Inner product of A and the permuted B."""
    moved = apply_permutation(spec, perm, b)
    return sum(float((a[name].double() * moved[name].double()).sum()) for name in a)


@functools.cache
def trained(width: int, seed: int, epochs: int) -> nn.Module:
    """A perceptron 64-width-width-width-10 on the digits, as in the paper's protocol."""
    torch.manual_seed(seed)
    sizes = [64, width, width, width, 10]
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(sizes):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    pixels, labels = digits()["train"]
    x = pixels.flatten(1).float() / 8 - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), labels[batch]).backward()
            optimizer.step()
    return model


def measure(width: int, epochs: int, rounds: int, restarts: int, plain: bool) -> dict[str, Any]:
    """Times of both sides in seconds, and the objectives that they reach."""
    times: dict[str, list[float]] = {"weight_matching": [], "plain": []}
    walls: list[float] = []
    objectives: dict[str, list[float]] = {"weight_matching": [], "plain": []}
    for pair in range(rounds):
        model, other = (trained(width, seed, epochs) for seed in (2 * pair, 2 * pair + 1))
        a, b = ({name: x.detach() for name, x in net.state_dict().items()} for net in (model, other))
        spec = PermutationSpec.from_model(model, torch.zeros(1, 64))
        generator = torch.Generator().manual_seed(pair)
        start, clock = time.process_time(), time.perf_counter()
        found = weight_matching(a, b, spec, n_restarts=restarts, generator=generator)
        times["weight_matching"].append(time.process_time() - start)
        walls.append(time.perf_counter() - clock)
        objectives["weight_matching"].append(found.objective)
        if plain:
            generator = torch.Generator().manual_seed(pair)
            start = time.process_time()
            orders = [plain_matching(a, b, spec, generator) for _ in range(restarts)]
            best = max(objective(a, b, spec, perm) for perm in orders)
            times["plain"].append(time.process_time() - start)
            objectives["plain"].append(best)
    figures: dict[str, Any] = {
        "width": width,
        "restarts": restarts,
        "seconds": {side: statistics.median(values) for side, values in times.items() if values},
        "wall": statistics.median(walls),
        "objective": {side: statistics.mean(values) for side, values in objectives.items() if values},
    }
    if plain:
        figures["times_faster"] = figures["seconds"]["plain"] / figures["seconds"]["weight_matching"]
        pairs = zip(objectives["weight_matching"], objectives["plain"], strict=True)
        figures["objective_as_good"] = f"{sum(ours >= theirs for ours, theirs in pairs)} of {rounds}"
    return figures


def main() -> None:
    """Measure, print a line for each width, and keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--restarts", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--no-plain", action="store_true", help="leave out the plain side, which is slow when wide"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": options.threads,
    }
    figures["matching"] = []
    for width, restarts in itertools.product(options.widths, options.restarts):
        found = measure(width, options.epochs, options.rounds, restarts, not options.no_plain)
        figures["matching"].append(found)
        print(json.dumps(found), flush=True)
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
