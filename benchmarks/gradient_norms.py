"""What the norm of each example's gradient costs, beside the ways that there are, in one run.

    python benchmarks/gradient_norms.py --threads 1 --out gradient-norms.json

Contenders take turns, so that a busy machine slows all of them alike. What is reported is the median over rounds of
each contender's processor time divided by that of a plain forward and backward pass of the batch in the same round. The loop and
`vmap` are PyTorch's own; BackPACK and Opacus take part where they are installed and know the model's layers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from weightlab.inspect import grad_norms
from weightlab.tasks.models.gpt import GPT, GPTConfig

Call = Callable[[], Tensor]


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    """A perceptron 784-512-512-10 and 256 examples."""
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return model, torch.randn(256, 784), torch.randint(10, (256,))


def cnn() -> tuple[nn.Module, Tensor, Tensor]:
    """Four convolutions 3 x 3 on 32 x 32 pixels, pooled after the second and at the end, and 64 examples."""
    model = nn.Sequential(
        *(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    return model, torch.randn(64, 3, 32, 32), torch.randint(10, (64,))


def gpt() -> tuple[nn.Module, Tensor, Tensor]:
    """A GPT of four blocks, 128 wide, and 32 texts of 64 symbols."""
    model = GPT(GPTConfig(vocabulary=256, context=64, width=128, depth=4, heads=4))
    tokens = torch.randint(256, (32, 65))
    return model, tokens[:, :-1], tokens[:, 1:]


CASES = {"mlp": mlp, "cnn": cnn, "gpt": gpt}


def example_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each example, over positions if it has some: `(B, ..., K)`, `(B, ...)` -> `(B,)`."""
    losses = functional.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none")
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def looped(model: nn.Module, x: Tensor, y: Tensor) -> Call:
    def call() -> Tensor:
        squares = []
        for i in range(len(x)):
            loss = example_losses(model(x[i : i + 1]), y[i : i + 1]).sum()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            squares.append(torch.stack([g.square().sum() for g in gradients]).sum())
        return torch.stack(squares)

    return call


def vectorised(model: nn.Module, x: Tensor, y: Tensor) -> Call:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return example_losses(functional_call(model, parameters, (x[None],)), y[None]).sum()

    def call() -> Tensor:
        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
        return torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)

    return call


def backpack_call(model: nn.Module, x: Tensor, y: Tensor) -> Call | None:
    """BackPACK's BatchL2Grad, which knows stacks of layers."""
    if not isinstance(model, nn.Sequential) or importlib.util.find_spec("backpack") is None:
        return None
    from backpack import backpack, extend  # pyright: ignore[reportMissingImports]
    from backpack.extensions import BatchL2Grad  # pyright: ignore[reportMissingImports]

    extended, loss = extend(deepcopy(model)), extend(nn.CrossEntropyLoss(reduction="sum"))

    def call() -> Tensor:
        extended.zero_grad()
        with backpack(BatchL2Grad()):
            loss(extended(x), y).backward()
        return torch.stack([p.batch_l2 for p in extended.parameters()]).sum(0)

    return call


def opacus_call(model: nn.Module, x: Tensor, y: Tensor) -> Call | None:
    """Opacus's GradSampleModule."""
    if importlib.util.find_spec("opacus") is None:
        return None
    from opacus import GradSampleModule  # pyright: ignore[reportMissingImports]

    try:
        wrapped = GradSampleModule(deepcopy(model).train(), loss_reduction="sum")
    except NotImplementedError:
        return None

    def call() -> Tensor:
        wrapped.zero_grad()
        example_losses(wrapped(x), y).sum().backward()
        return torch.stack([p.grad_sample.flatten(1).square().sum(1) for p in wrapped.parameters()]).sum(0)

    return call


def measure(case: str, seconds: float, slow: bool) -> dict[str, dict[str, float]]:
    """Times in milliseconds, ratios to the plain pass and largest relative errors of squared norms."""
    torch.manual_seed(0)
    model, x, y = CASES[case]()
    model.eval()

    def plain() -> Tensor:
        model.zero_grad()
        example_losses(model(x), y).mean().backward()
        return x

    calls: dict[str, Call | None] = {
        "plain": plain,
        "grad_norms": lambda: grad_norms(model, x, y, example_losses, squared=True),
        "BackPACK": backpack_call(model, x, y),
        "Opacus": opacus_call(model, x, y),
    }
    if slow:
        calls |= {"vmap": vectorised(model, x, y), "loop": looped(model, x, y)}
    exact = looped(model, x, y)()
    present = {name: call for name, call in calls.items() if call is not None}
    errors: dict[str, float] = {}
    for name, call in list(present.items()):
        try:
            found = call()
        except (
            AttributeError,
            NotImplementedError,
            RuntimeError,
        ) as error:  # a peer that cannot take this model
            print(f"{name} cannot do {case}: {str(error).splitlines()[0]}")
            del present[name]
        else:
            errors[name] = 0.0 if name == "plain" else float(((found - exact) / exact).abs().max())
    times: dict[str, list[float]] = {name: [] for name in present}
    end = time.perf_counter() + seconds
    while len(times["plain"]) < 3 or time.perf_counter() < end:
        for name, call in present.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {
        name: {
            "ms": 1e3 * statistics.median(column),
            "ratio": statistics.median(t / p for t, p in zip(column, times["plain"], strict=True)),
            "rounds": len(column),
            "error": errors[name],
        }
        for name, column in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="time for each case and number of threads"
    )
    parser.add_argument("--no-slow", action="store_true", help="leave out the loop and vmap")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    results: list[dict[str, Any]] = []
    for case in args.cases:
        for threads in args.threads:
            torch.set_num_threads(threads)
            rows = measure(case, args.seconds, not args.no_slow)
            print(f"\n{case}, {threads} thread(s)\n{'':14}{'ms':>10}{'x plain':>10}{'error':>10}")
            for name, row in rows.items():
                print(f"{name:14}{row['ms']:10.1f}{row['ratio']:10.2f}{row['error']:10.0e}", flush=True)
            results.append({"case": case, "threads": threads, "rows": rows})
    if args.out:
        facts = {"torch": torch.__version__, "processor": platform.processor() or platform.machine()}
        args.out.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
