"""A Hugging Face model and dataset as a task: weightlab trial --task examples/hf_task.py:task --arms adamw,muon

A tiny GPT-2 with random weights reads the bytes of Python's language reference; nothing is downloaded.
"""

import hashlib

import torch
from datasets import Dataset, disable_progress_bars
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from weightlab.tasks import Task
from weightlab.tasks.data import docs_text

CONTEXT = 64


def cut(rows):
    """Turn texts into blocks of CONTEXT bytes, as a `Dataset.map` over batches of rows."""
    symbols = list("\n\n".join(rows["text"]).encode())
    return {"input_ids": [symbols[i : i + CONTEXT] for i in range(0, len(symbols) - CONTEXT + 1, CONTEXT)]}


class TinyGPT2(Task):
    name, metric, mode = "tiny-gpt2", "loss", "min"
    batch_size, steps, minimal_effect = 16, 200, 0.02
    description = "GPT-2 of 120,000 weights on the bytes of Python's language reference"

    def __init__(self):
        disable_progress_bars()
        paragraphs = Dataset.from_dict({"text": docs_text().split("\n\n")})
        blocks = paragraphs.map(cut, batched=True, batch_size=100, remove_columns=["text"])
        first = blocks.train_test_split(test_size=0.2, seed=0)
        held_out = first["test"].train_test_split(test_size=0.5, seed=0)
        splits = {"train": first["train"], "validation": held_out["train"], "test": held_out["test"]}
        self.data = {split: blocks.with_format("torch") for split, blocks in splits.items()}

    def build(self, generator):
        # The trial has seeded PyTorch's global generator, which transformers draws its weights from.
        config = GPT2Config(
            vocab_size=256,
            n_positions=CONTEXT,
            n_embd=64,
            n_layer=2,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
        )
        return GPT2LMHeadModel(config)

    def batches(self, split, generator):
        seed = int(torch.randint(2**31, (), generator=generator))
        return self.data[split].shuffle(seed=seed).iter(self.batch_size, drop_last_batch=True)

    def loss(self, model, batch):
        symbols = batch["input_ids"]
        logits = model(symbols).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), symbols[:, 1:].flatten())

    def evaluate(self, model, split):
        blocks = self.data[split][:256]["input_ids"].to(model.device)
        losses = [self.loss(model, {"input_ids": part}) for part in blocks.split(64)]
        return {"loss": torch.stack(losses).mean().item()}

    def fingerprint(self):
        return hashlib.sha256(docs_text().encode()).hexdigest()


task = TinyGPT2
