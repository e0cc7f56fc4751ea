"""Adapt a language model in a plain PyTorch loop: python examples/adapt_causal_lm.py --method bone

A tiny Llama first learns the bytes of Python's language reference, then, with its weights frozen, to write it in
capitals, by an adapter of few parameters. Nothing is downloaded. Takes half a minute.
"""

import argparse

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from weightlab.adapters import BoneConfig, SorsaConfig, SvfitConfig, sorsa_regularizer
from weightlab.tasks.data import docs_text

CONTEXT, BATCH = 64, 16
METHODS = {
    "lora": (LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"), 1e-2),
    "bone": (BoneConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"), 1e-2),
    "sorsa": (SorsaConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"), 5e-3),
    "svfit": (SvfitConfig(r="all", target_modules="all-linear", task_type="CAUSAL_LM"), 3e-2),
}


def blocks(text: str) -> torch.Tensor:
    symbols = torch.tensor(list(text.encode()))
    return symbols[: len(symbols) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def train(model: torch.nn.Module, data: torch.Tensor, steps: int, lr: float) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        rows = data[torch.randint(len(data), (BATCH,), generator=generator)]
        loss = model(input_ids=rows, labels=rows).loss
        if any("sorsa_" in name for name, _ in model.named_parameters()):
            loss = loss + 1e-3 * sorsa_regularizer(model)  # keeps the factors nearly orthonormal
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def evaluate(model: torch.nn.Module, data: torch.Tensor) -> float:
    return model.eval()(input_ids=data, labels=data).loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, default="bone")
    parser.add_argument("--steps", type=int, default=200, help="of pre-training, and again of adapting")
    parser.add_argument("--out", default="capitals", help="folder for the adapter")
    options = parser.parse_args()

    torch.manual_seed(0)
    text = docs_text()
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            max_position_embeddings=CONTEXT,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    train(base, blocks(text), options.steps, lr=3e-3)

    capitals = blocks(text.upper())
    seen, unseen = capitals[:-64], capitals[-64:]
    print(f"capitals before: loss {evaluate(base, unseen):.4f}")
    config, lr = METHODS[options.method]
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    train(model, seen, options.steps, lr)
    after = evaluate(model, unseen)
    print(f"capitals after:  loss {after:.4f}")

    with model.disable_adapter():
        print(f"adapter off:     loss {evaluate(model, unseen):.4f}")
    model.save_pretrained(options.out)
    loaded = PeftModel.from_pretrained(model.unload(), options.out)
    print(f"loaded again:    loss {evaluate(loaded, unseen):.4f}")
    print(f"merged:          loss {evaluate(loaded.merge_and_unload(), unseen):.4f}")


if __name__ == "__main__":
    main()
