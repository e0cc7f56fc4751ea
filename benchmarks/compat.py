"""What holding weights near orthogonality and fitting maps between embeddings cost, beside peers.

    python benchmarks/compat.py --out compat.json
    PYTHONPATH=/where/geotorch/is python benchmarks/compat.py --sizes 128,512

Parametrizations: one forward and backward pass of a square layer on a batch of 64, everything else being equal. All take
turns within a round; medians of wall time are compared. Maps: the time until a rotation, an affine map and one within λ are fitted
in closed form or by projection, and within λ by Adam on the penalty, and the error that each ends with.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from weightlab.linalg import orthogonality_deviation
from weightlab.merge import LossWeights, fit_adapter
from weightlab.nn import OrthogonalityPenalty, relaxed_orthogonal

Step = Callable[[], None]


def layers(size: int) -> dict[str, nn.Module]:
    """A square layer by each way of holding it, with a stored matrix that is off by 5 %."""

    def linear() -> nn.Linear:
        torch.manual_seed(0)
        layer = nn.Linear(size, size, bias=False)
        nn.init.orthogonal_(layer.weight)
        return layer

    def shifted(layer: nn.Module) -> nn.Module:
        with torch.no_grad():
            layer.get_parameter("parametrizations.weight.original").mul_(1.05)
        return layer

    found: dict[str, nn.Module] = {
        "plain": linear(),
        "relaxed, within": relaxed_orthogonal(linear(), tol=10.0, relative=True),
        "relaxed, svd": shifted(relaxed_orthogonal(linear(), tol=0.05, relative=True)),
        "relaxed, polar": shifted(relaxed_orthogonal(linear(), tol=0.05, relative=True, method="polar")),
        "strict, svd": shifted(relaxed_orthogonal(linear(), tol=0.0)),
        "strict, polar": shifted(relaxed_orthogonal(linear(), tol=0.0, method="polar")),
    }
    for name in ("matrix_exp", "cayley", "householder"):
        found[f"torch orthogonal, {name}"] = parametrizations.orthogonal(linear(), orthogonal_map=name)
    if importlib.util.find_spec("geotorch") is not None:
        import geotorch  # pyright: ignore[reportMissingImports]

        for name, call in (
            ("geotorch almost_orthogonal", lambda m: geotorch.almost_orthogonal(m, "weight", lam=0.05)),
            ("geotorch orthogonal", lambda m: geotorch.orthogonal(m, "weight")),
        ):
            layer = linear()
            call(layer)
            found[name] = layer
    return found


def passes(size: int) -> dict[str, Step]:
    """Forward and backward through each layer; and the penalty on a plain one beside its pass."""
    torch.manual_seed(1)
    x = torch.randn(64, size)
    penalty = OrthogonalityPenalty(0.05, relative=True)

    def step(layer: nn.Module, extra: Callable[[Tensor], Tensor] | None = None) -> Step:
        def run() -> None:
            loss = layer(x).square().mean()
            if extra is not None:
                loss = loss + extra(layer.weight)  # pyright: ignore[reportArgumentType]
            loss.backward()
            for p in layer.parameters():
                p.grad = None

        return run

    found = {name: step(layer) for name, layer in layers(size).items()}
    shrunk = nn.Linear(size, size, bias=False)
    found["penalty"] = step(shrunk, penalty)
    return found


def medians(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Milliseconds of each, the contenders taking turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if index:
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(each) for name, each in times.items()}


def maps(n: int, d: int, steps: int) -> dict[str, Any]:
    """Fit a map within λ/√d = 0.2 between embeddings of `n` items, by projection and by a penalty."""
    torch.manual_seed(2)
    z = torch.randn(n, d) * torch.logspace(0, -1, d)
    h = z @ (torch.linalg.qr(torch.randn(d, d)).Q * torch.logspace(0.3, -0.7, d)) + 0.02 * torch.randn(n, d)
    fit_adapter(z[:8], h[:8], method="penalty", steps=1)  # loads what optimizers load at their first use
    found: dict[str, Any] = {}
    for name, settings in {
        "rotation": {"kind": "orthogonal"},
        "affine": {"kind": "affine"},
        "projection": {},
        "penalty": {"method": "penalty", "steps": steps, "lr": 1e-2, "weights": LossWeights(penalty=10.0)},
    }.items():
        started = time.perf_counter()
        adapter = fit_adapter(z, h, tol=0.2, normalize=False, forward=False, **settings)
        seconds = time.perf_counter() - started
        with torch.no_grad():
            error = float((adapter.to_old(z) - h).square().sum(1).mean())
        found[name] = {
            "seconds": seconds,
            "error": error,
            "deviation over λ": adapter.deviation / (0.2 * d**0.5),
        }
    for name in ("rotation", "affine", "projection"):
        found[name]["times faster"] = found["penalty"]["seconds"] / found[name]["seconds"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="64,256,512", help="sides of layers, by comma")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--maps", default="5000x64,5000x256", help="items x dimensions, by comma")
    parser.add_argument("--steps", type=int, default=600, help="steps of the penalty's training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": arguments.threads,
        "layers": {},
        "maps": {},
    }
    for size in map(int, arguments.sizes.split(",")):
        weight = layers(size)["relaxed, svd"].weight
        assert isinstance(weight, Tensor)
        assert float(orthogonality_deviation(weight.detach())) <= 0.0501 * size**0.5
        found = medians(passes(size), arguments.rounds)
        results["layers"][size] = found
        print(f"{size} x {size}: ms a pass, forward and backward")
        for name, ms in found.items():
            print(f"  {name:32}{ms:9.2f}{ms / found['relaxed, svd']:8.2f} x relaxed, svd")
    for text in filter(None, arguments.maps.split(",")):
        n, d = map(int, text.split("x"))
        found = maps(n, d, arguments.steps)
        results["maps"][text] = found
        print(f"map of {n} items, {d} dimensions, within λ/√d = 0.2")
        for name, one in found.items():
            print(
                f"  {name:12}{one['seconds']:9.3f} s, error {one['error']:.5f}, D/λ {one['deviation over λ']:.3f}, "
                f"{one.get('times faster', 1):.0f} times faster than the penalty"
            )
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
