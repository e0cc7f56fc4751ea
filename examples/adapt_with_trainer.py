"""Adapt a language model with transformers' Trainer: python examples/adapt_with_trainer.py --method eva

Any causal language model that is a folder or on the Hub: --model FOLDER --text FILE. Without these, a tiny Llama with
random weights reads the bytes of Python's language reference, and nothing is downloaded.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from weightlab.adapters import SorsaCallback, SorsaConfig, eva_init_, orthogonal_lora_
from weightlab.tasks.data import docs_text

CONTEXT = 64


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows of tokens, each its own labels, as a causal language model wants them."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def load(options: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return the model, and the text's tokens in rows."""
    text = Path(options.text).read_text(encoding="utf-8") if options.text else docs_text()
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokens = torch.tensor(AutoTokenizer.from_pretrained(options.model)(text)["input_ids"])
    else:
        model = LlamaForCausalLM(
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
        tokens = torch.tensor(list(text.encode()))
    return model, tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["eva", "sorsa", "orthogonal"], default="eva")
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="adapter")
    options = parser.parse_args()

    torch.manual_seed(0)
    base, rows = load(options)
    train, held_out = Rows(rows[:-64]), Rows(rows[-64:])

    callbacks = []
    if options.method == "sorsa":
        config = SorsaConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        callbacks.append(SorsaCallback())  # without it, SORSA trains unregularised
    else:
        # EVA and Orthogonal Adaptation start PEFT's own LoRA differently; the result is a LoRA like any other.
        config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        if options.method == "eva":
            report = eva_init_(model, DataLoader(train, batch_size=16), max_batches=16, progress=False)
            print(f"EVA: ranks from {min(report.ranks.values())} to {max(report.ranks.values())}")
        else:
            orthogonal_lora_(model, slot=0)  # further adapters take slots 1, 2, … and merge with this one

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=f"{options.out}-checkpoints",
            max_steps=options.steps,
            per_device_train_batch_size=16,
            learning_rate=5e-3,
            lr_scheduler_type="cosine",
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=callbacks,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"held-out loss: {before:.4f} before, {trainer.evaluate()['eval_loss']:.4f} after")
    model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
