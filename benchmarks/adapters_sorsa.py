"""A training step of SORSA against one of PEFT's LoRA and PiSSA at equal rank, in one run.

    python benchmarks/adapters_sorsa.py --threads 2 --out sorsa.json

A step is forward, backward, for SORSA the regulariser in closed form, and SGD's step, the cheapest there is.
Contenders take turns, and medians over the rounds are compared with LoRA's of the same run. The model
is a Llama with random weights whose seven projections are all adapted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim import SGD

from weightlab.adapters import SorsaConfig
from weightlab.adapters.sorsa import regularize_sorsa

VOCABULARY = 1000
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def configs(r: int) -> dict[str, Any]:
    """Give the contenders; what counts is LoRA's time over SORSA's."""
    common: dict[str, Any] = {"r": r, "target_modules": TARGETS}
    return {
        "LoRA": LoraConfig(lora_alpha=r, **common),
        "PiSSA": LoraConfig(lora_alpha=r, init_lora_weights="pissa", **common),
        "SORSA": SorsaConfig(**common),
        "SORSA, no regulariser": SorsaConfig(gamma=0.0, **common),
        "SORSA in place": SorsaConfig(residual="in_place", **common),
    }


def llama(hidden: int, layers: int, length: int, config: Any) -> PeftModel:
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=length,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(transformers.LlamaForCausalLM(settings), config)


def stepper(model: PeftModel, ids: torch.Tensor) -> Callable[[], None]:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = SGD(trained, lr=1e-3)
    if isinstance(model.peft_config["default"], SorsaConfig):
        regularize_sorsa(optimizer, model)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return step


def measure(args: argparse.Namespace, r: int) -> list[dict[str, Any]]:
    ids = torch.randint(0, VOCABULARY, (args.sequences, args.length))
    steppers: dict[str, Callable[[], None]] = {}
    starts: dict[str, float] = {}
    for name, config in configs(r).items():
        start = time.perf_counter()
        steppers[name] = stepper(llama(args.hidden, args.layers, args.length, config), ids)
        starts[name] = time.perf_counter() - start
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for number in range(args.rounds + 1):
        for name, step in steppers.items():
            start = clock()
            step()
            if number:
                times[name].append(clock() - start)
    ratios = {
        name: [own / lora for own, lora in zip(values, times["LoRA"], strict=True)]
        for name, values in times.items()
    }
    return [
        {
            "r": r,
            "contender": name,
            "ms": 1e3 * statistics.median(times[name]),
            "times LoRA": statistics.median(ratios[name]),
            "start s": starts[name],
        }
        for name in times
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: seconds of processor time, for a busy machine; with one thread only",
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"hidden {args.hidden}, {args.layers} layers, {args.sequences * args.length} tokens, threads {args.threads}"
    )
    rows = []
    for r in args.ranks:
        for row in measure(args, r):
            print(f"r {r:3}  {row['contender']:24}{row['ms']:9.1f} ms {row['times LoRA']:7.3f} x LoRA")
            rows.append(row)
    if args.out:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "peft": peft.__version__}
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        args.out.write_text(json.dumps({"versions": versions, "settings": settings, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
