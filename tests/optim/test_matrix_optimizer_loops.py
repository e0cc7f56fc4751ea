"""The base in the loops that users have: compiled, accumulating, and transformers' Trainer."""

import copy
import importlib.util
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from weightlab.optim import ROOT, AuON, HybridAuON, split_named_parameters

METHODS = {"auon": AuON, "hybrid": partial(HybridAuON, apply_to="matrices"), "root": ROOT}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 2))


def batch(seed):
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "backend"), [("auon", "eager"), ("hybrid", "aot_eager"), ("root", "aot_eager")]
)
def test_compiled_step_equals_the_plain_one(name, backend):
    method = METHODS[name]
    torch._dynamo.reset()
    model = net()
    twin = copy.deepcopy(model)
    plain, compiled = method(model.parameters()), method(twin.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its profiler hook
        step = torch.compile(compiled.step, backend=backend)
        for seed in range(3):
            for m, move in ((model, plain.step), (twin, step)):
                m.zero_grad()
                m(batch(seed)).square().mean().backward()
                move()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@every_method
def test_accumulated_gradients_step_as_one_batch(method):
    model = net()
    twin = copy.deepcopy(model)
    whole, parts = method(model.parameters()), method(twin.parameters())
    for seed in range(2):
        whole.zero_grad()
        model(batch(seed)).square().mean().backward()
        whole.step()
        parts.zero_grad()
        for part in batch(seed).split(2):
            (twin(part).square().mean() / 4).backward()
        parts.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None,
    reason="needs transformers and accelerate",
)
def test_transformers_trainer(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    warnings.simplefilter("ignore")
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    matrices, rest = split_named_parameters(model)
    optimizer = HybridAuON(
        [
            {"params": matrices, "use_matrix_rule": True},
            {"params": rest, "use_matrix_rule": False},
        ],
        lr=0.02,
        adamw={"lr": 0.02},
    )
    tokens = torch.randint(0, 16, (8,), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": tokens, "labels": tokens}] * 16
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert (tmp_path / "checkpoint-4" / "optimizer.pt").exists()
