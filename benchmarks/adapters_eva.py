"""What it costs to start LoRA from activations, and how right the result is: EVA here and in PEFT, in one run.

    python benchmarks/adapters_eva.py --out eva.json

The model is a Llama with random weights: a flat spectrum, the worst case for a test of convergence. PEFT's
initialiser runs once, since it takes long; ours take turns, and their medians are compared with it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from weightlab.adapters import eva_init_

RANK, RHO, BATCHES, SEQUENCES, LENGTH, VOCABULARY = 8, 2.0, 16, 8, 64, 1000
Batches = list[dict[str, Tensor]]


def llama(hidden: int, layers: int, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    model = transformers.LlamaForCausalLM(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", **options))


def tokens() -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)}
        for _ in range(BATCHES)
    ]


@torch.no_grad()
def exact_components(model: PeftModel, batches: Batches, names: list[str]) -> dict[str, Tensor]:
    """Right singular vectors of all inputs of a layer together, in float64."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: inputs[name].append(args[0].flatten(0, -2).double())

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    model.eval()
    with model.disable_adapter():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    found = {}
    for name, pieces in inputs.items():
        X = torch.cat(pieces)
        X = X - X.mean(0)
        found[name] = torch.linalg.eigh(X.T @ X).eigenvectors.flip(1).T
    return found


def overlaps(state: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of the exact leading subspace that each layer's rows span: least, mean, most."""
    shares = [
        float((rows.double() @ exact[name][: len(rows)].T).square().sum() / len(rows))
        for name, rows in state.items()
        if len(rows)
    ]
    return {"least": min(shares), "mean": statistics.fmean(shares), "most": max(shares)}


def measure(hidden: int, layers: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    batches = tokens()
    theirs = llama(hidden, layers, init_lora_weights="eva", eva_config=EvaConfig(rho=RHO))
    start = clock()
    state = peft.get_eva_state_dict(theirs, batches, show_progress_bar=False)
    peft.initialize_lora_eva_weights(theirs, eva_state_dict=dict(state))
    seconds = {"PEFT": clock() - start}
    exact = exact_components(llama(hidden, layers), batches, list(state))
    overlap = {"PEFT": overlaps(state, exact)}

    settings: dict[str, dict[str, Any]] = {
        "covariance": {},
        "covariance, tau 1": {"tau": 1.0},
        "incremental": {"method": "incremental"},
        "sketch": {"method": "sketch"},
    }
    times: dict[str, list[float]] = {name: [] for name in settings}
    for turn in range(-1, rounds):
        for name, options in settings.items():
            model = llama(hidden, layers)
            start = clock()
            report = eva_init_(model, batches, rho=RHO, progress=False, **options)
            if turn >= 0:
                times[name].append(clock() - start)
                overlap[name] = overlaps(report.eva_state_dict, exact)
    seconds |= {name: statistics.median(column) for name, column in times.items()}

    print(
        f"\nLlama of {layers} layers of {hidden}, rank {RANK}, rho {RHO:g}, {BATCHES}x{SEQUENCES}x{LENGTH} tokens"
    )
    print(f"  {'':20}{'seconds':>10}{'PEFT over it':>14}   overlap with the exact top-r: least, mean")
    for name, value in seconds.items():
        shares = overlap[name]
        print(
            f"  {name:20}{value:10.2f}{seconds['PEFT'] / value:14.1f}{shares['least']:14.4f}{shares['mean']:10.4f}"
        )
    return {"hidden": hidden, "layers": layers, "seconds": seconds, "overlap": overlap}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="wall time, or processor time (for one thread on a machine that is busy)",
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    result = measure(args.hidden, args.layers, args.rounds, clock)
    if args.out:
        facts = {"torch": torch.__version__, "peft": peft.__version__, "clock": args.clock}
        facts |= {"processor": platform.processor() or platform.machine(), "threads": args.threads}
        args.out.write_text(json.dumps({**facts, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
